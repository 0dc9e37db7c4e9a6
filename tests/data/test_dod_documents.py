"""Which held-out rows become documents, and manifests that cannot be used."""

from __future__ import annotations

from collections import Counter

import pytest
from toy_dods import general_bank, write_bank

from lm_eval_softverb.errors import ArtifactError, ConfigError, DataError, ModelUnavailable
from lm_eval_softverb.metrics import dod as metrics


@pytest.fixture
def general(tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTVERB_CACHE", str(tmp_path / "cache"))
    return general_bank(tmp_path)


def test_which_documents(general):
    bank, dod = general

    def docs(**metadata):
        found = metrics.general(**metadata)["test"].to_list()
        return found, Counter(doc["task"] for doc in found)

    test, train = dod.names("test"), dod.names("train")
    assert set(docs(bank=bank)[1]) == set(test)
    assert set(docs(bank=bank, split="train")[1]) == set(train)
    assert docs(bank=bank, rows=2)[1] == dict.fromkeys(test, 2)
    assert docs(bank=bank, rows="1", split="train", version=1.0)[1] == dict.fromkeys(train, 1)
    first = docs(bank=bank, rows=1)[0]
    assert [(d["target"], d["label"], d["choices"]) for d in first] == [
        (dod.task(name).heldout[0].output, -1, []) for name in test
    ]
    # The DoD named directly: stock settings, under which no toy task passes.
    with pytest.raises(DataError, match="holds none"):
        metrics.general(dod=f"general:{dod.path}")
    for bad in (0, "x", -1, True):
        with pytest.raises(ConfigError, match="expected how many held-out rows"):
            metrics.general(bank=bank, rows=bad)


def test_a_dod_named_directly_gives_the_documents_of_its_bank_but_for_the_name(general, monkeypatch):
    bank, dod = general
    monkeypatch.setattr(metrics, "open_dod", lambda source, **kw: dod)
    direct = metrics.general(dod="general:somewhere")["test"].to_list()
    ours = metrics.general(bank=bank)["test"].to_list()
    assert [d["prompt_id"] for d in direct] == [d["task"] for d in ours]
    assert [{**d, "prompt_id": f"p-{d['task']}"} for d in direct] == ours


def test_the_dod_may_have_moved(general, tmp_path):
    bank, _ = general
    wanted = metrics.general(bank=bank)["test"].to_list()
    moved = tmp_path / "elsewhere"
    (tmp_path / "ni").rename(moved)
    with pytest.raises(ModelUnavailable, match="ni is neither a folder here"):
        metrics.general(bank=bank)
    assert metrics.general(bank=bank, dod=f"general:{moved}")["test"].to_list() == wanted


def test_f26_manifests_that_cannot_be_used_say_so(general, tmp_path):
    bank, dod = general
    with pytest.raises(ConfigError, match=r"dod_general got neither a bank nor a DoD.*--metadata"):
        metrics.general()
    with pytest.raises(ArtifactError, match="is no bank"):
        metrics.general(bank=tmp_path)
    with pytest.raises(DataError, match=r"no prompts of a classification DoD; it holds 4 of kind 'general'"):
        metrics.classification(bank=bank)
    with pytest.raises(ConfigError, match="is a general DoD; run the task dod_general"):
        metrics.classification(dod=f"general:{dod.path}")
    with pytest.raises(DataError, match=r"no prompts in split dev; it holds 2 in train, 2 in test"):
        metrics.general(bank=bank, split="dev")
    for changes, message in {
        "heldout_sha256": ("f" * 64, r"manifest\.jsonl:3: the rows held out of task3_green_three are not those"),
        "task": ("task9", r"manifest\.jsonl:1: .*'task9' is not in this DoD|manifest\.jsonl:3: Task 'task9'"),
        "prompt_id": (7, r"manifest\.jsonl:1: 'prompt_id' is 7"),
        "dod": (None, "it holds 4 without 'dod'"),
    }.items():
        value, pattern = message
        write_bank(tmp_path / "bad", dod, **{changes: value})
        with pytest.raises(DataError, match=pattern):
            metrics.general(bank=tmp_path / "bad")
    write_bank(tmp_path / "bad", dod, dod={**dod.reference(), "kind": "general", "source": 3})
    with pytest.raises(DataError, match=r"jsonl:1: 'dod' is"):
        metrics.general(bank=tmp_path / "bad")
    write_bank(tmp_path / "bad", dod, prompt_id="same")
    with pytest.raises(DataError, match=r"jsonl:2: a second prompt is named 'same'"):
        metrics.general(bank=tmp_path / "bad")


def test_a_manifest_does_not_choose_where_verdicts_are_written(general, tmp_path):
    bank, dod = general
    reference = dod.reference()
    reference["settings"]["cache"] = str(tmp_path / "canary")
    write_bank(bank, dod, dod=reference)
    assert metrics.general(bank=bank) and not (tmp_path / "canary").exists()
    assert (tmp_path / "cache" / "dod").is_dir()
