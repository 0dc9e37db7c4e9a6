"""Label sets out of other sets' labels: never across splits, never with a sentence that says another label."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from lm_eval_softverb import cli
from lm_eval_softverb.data.dod.classification import ClassificationDod
from lm_eval_softverb.errors import ArtifactError, ConfigError
from lm_eval_softverb.generators.prompts import mentions
from lm_eval_softverb.generators.recombine import Recombination, recombine
from lm_eval_softverb.generators.store import Store

SMALL = Recombination(sets=40, labels=4, sentences=14)


@pytest.fixture(scope="module")
def tight():
    return ClassificationDod.open("tight")


@pytest.fixture(scope="module")
def made(tight, tmp_path_factory):
    path = tmp_path_factory.mktemp("loose") / "loose.sqlite"
    counts = recombine(tight, path, SMALL)
    return path, counts, ClassificationDod.open(path)


def test_labels_of_different_sets_and_one_split(tight, made):
    _, counts, dod = made
    owners = {}
    for name in tight.names():
        for label in tight.sets[name]:
            owners.setdefault((tight.splits[name], label), set()).add(name)
    assert counts == Counter(dod.splits.values()) and set(counts) == {"train", "test"} and sum(counts.values()) == 40
    for name, labels in dod.sets.items():
        homes = [owners[dod.splits[name], label] for label in labels]  # KeyError: a label of the other split
        assert len(labels) == 4 and len(set.union(*homes)) >= 4
    trained = {label for name in tight.names("train") for label in tight.sets[name]}
    assert not trained & {label for name in dod.names("test") for label in dod.sets[name]}


def test_sentences_are_the_sources_and_name_no_label(tight, made):
    _, _, dod = made
    source = {}
    for name in tight.names():
        for label, parts in tight.sets[name].items():
            source.setdefault(label, set()).update(*parts)
    for labels in dod.sets.values():
        for label, (training, heldout) in labels.items():
            sentences = [*training, *heldout]
            assert len(sentences) == len(set(sentences)) == 14 and set(sentences) <= source[label]
            assert not any(mentions(s, word) for s in sentences for word in labels)


def test_all_labels_come_about_equally_often(made):
    _, counts, dod = made
    used = Counter(label for name in dod.names("train") for label in dod.sets[name])
    assert max(used.values()) <= 2 and len(used) > 3 * counts["train"]  # more labels than places: hardly one comes twice


def test_the_same_again_and_going_on(tight, made, tmp_path, monkeypatch):
    path, _, dod = made
    again = tmp_path / "again.sqlite"
    real, added = Store.add, []

    def stop(self, number, *a, **k):
        added.append(number)
        if len(added) == 20:
            raise KeyboardInterrupt
        real(self, number, *a, **k)

    monkeypatch.setattr(Store, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        recombine(tight, again, SMALL)
    assert len(ClassificationDod.open(again).sets) == 19
    recombine(tight, again, SMALL)
    assert ClassificationDod.open(again).sets == dod.sets
    recombine(tight, path, SMALL)
    assert ClassificationDod.open(path).sha256 == dod.sha256
    with pytest.raises(ArtifactError, match="other settings"):
        recombine(tight, path, Recombination(sets=40, labels=4, sentences=14, seed=1))


def test_what_cannot_be_made_is_refused(tight, tmp_path):
    with pytest.raises(ConfigError, match="labels is 1"):
        Recombination(labels=1)
    with pytest.raises(ConfigError, match="sentences is 10, expected at least 11"):
        Recombination(sentences=10)
    with pytest.raises(ConfigError, match="No 5 labels with 25 sentences"):
        recombine(tight, tmp_path / "x.sqlite", Recombination(sets=1, sentences=25))
    assert not (tmp_path / "x.sqlite").exists()  # the same name is free for better settings
    mixed = ClassificationDod.open("tight")
    one, two = mixed.names("train")[:2]
    rows = (tuple(f"sentence {i}" for i in range(14)), tuple(f"held out {i}" for i in range(10)))
    alike = replace(mixed, sets={one: {"dark blue": rows}, two: {"Dark Blue": rows}}, splits={one: "train", two: "train"})
    with pytest.raises(ConfigError, match="No 2 labels"):
        recombine(alike, tmp_path / "y.sqlite", Recombination(sets=1, labels=2))


def test_the_command(tmp_path, capsys):
    out = tmp_path / "loose.sqlite"
    assert cli.main(["dod", "recombine", "--sets", "6", "--sentences", "12", "--out", str(out)]) == 0
    splits = Counter(ClassificationDod.open(out).splits.values())
    assert splits.total() == 6 and f"{splits['train']} label sets to train on" in capsys.readouterr().out
    assert cli.main(["dod", "list", f"classification:{out}"]) == 0
    assert cli.main(["dod", "recombine", "--dod", "general:/nowhere", "--out", str(tmp_path / "y.sqlite")]) != 0
