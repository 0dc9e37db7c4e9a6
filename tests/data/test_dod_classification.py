"""Reading the classification DoD: splits, held-out rows, and files that cannot be trusted."""

from __future__ import annotations

import gzip
import json
import sqlite3

import pytest

from lm_eval_softverb.data import labelsets
from lm_eval_softverb.data.dod.classification import FORMAT, SCHEMA, ClassificationDod, Reading
from lm_eval_softverb.errors import ConfigError, DataError
from lm_eval_softverb.generators import prompts
from lm_eval_softverb.generators.config import evaluation_labels

LABELS = ("red", "blue", "green")


def make(path, sets=30, per_label=24, change=()):
    """A valid file, then SQL statements (with parameters) that spoil it."""
    with sqlite3.connect(path) as db:
        db.executescript(SCHEMA)
        db.execute("INSERT INTO meta VALUES ('format', ?)", (json.dumps(FORMAT),))
        for d in range(sets):
            db.execute("INSERT INTO datasets VALUES (?, 'one two three')", (d,))
            for label in LABELS:
                k = db.execute("INSERT INTO keywords (dataset_id, keyword) VALUES (?, ?)", (d, f"{label}{d}")).lastrowid
                rows = [(k, f"Sentence {i} of {label} in set {d}.") for i in range(per_label)]
                db.executemany("INSERT INTO sentences (keyword_id, sentence) VALUES (?, ?)", rows)
        for statement in change:
            db.execute(*statement)
    db.close()
    return path


def test_rows_of_a_task(tmp_path):
    dod = ClassificationDod.open(make(tmp_path / "d.sqlite", sets=3))
    assert dod.kind == "classification" and dod.names() == ["labels_00000", "labels_00001", "labels_00002"]
    task = dod.task("labels_00001")
    assert sorted(task.labels) == ["blue1", "green1", "red1"] and task.instruction == ""
    assert len(task.train) == 3 * 14 and len(task.heldout) == 3 * 10
    for rows, n in ((task.train, 14), (task.heldout, 10)):
        assert {label: sum(r.output == label for r in rows) for label in task.labels} == dict.fromkeys(task.labels, n)
    assert not {r.input for r in task.train} & {r.input for r in task.heldout}
    row = next(r for r in task.train if r.output == "red1")
    assert (
        row.input.startswith("Sentence: Sentence ") and row.input.endswith("of red in set 1. Label:") and row.delimiter == " "
    )
    assert dod.task("labels_00001") == task


def test_reading_is_a_function_of_its_settings(tmp_path):
    path = make(tmp_path / "d.sqlite")
    one, two = ClassificationDod.open(path), ClassificationDod.open(path, Reading(seed=1))
    assert one.sha256 == ClassificationDod.open(path).sha256 != two.sha256
    orders = {d.task(n).labels.index(f"red{int(n[-5:])}") for d in (one, two) for n in d.names()}
    assert orders == {0, 1, 2}
    assert one.names("test") == two.names("test")
    assert one.task("labels_00000").heldout != two.task("labels_00000").heldout
    assert two.reference() == {"kind": "classification", "source": str(path), "settings": {"seed": 1}, "sha256": two.sha256}


def test_the_split_is_by_set_and_does_not_move_when_the_file_grows(tmp_path):
    small = ClassificationDod.open(make(tmp_path / "small.sqlite", sets=20))
    large = ClassificationDod.open(make(tmp_path / "large.sqlite", sets=600))
    assert set(small.names("test")) == set(large.names("test")) & set(small.names())
    assert 90 <= len(large.names("test")) <= 150  # 20 % of 600
    assert sorted(large.names("train") + large.names("test")) == large.names()
    assert all(large.task(n).split == "test" for n in large.names("test")[:3])
    half = ClassificationDod.open(tmp_path / "large.sqlite", Reading(test_share=0.5))
    assert set(half.names("test")) > set(large.names("test"))


def test_a_compressed_file_is_the_same(tmp_path, monkeypatch):
    plain = make(tmp_path / "d.sqlite", sets=3)
    packed = tmp_path / "d.sqlite.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert ClassificationDod.open(packed).sha256 == ClassificationDod.open(plain).sha256
    monkeypatch.setattr("lm_eval_softverb.data.dod.classification.MAX_BYTES", 1000)
    with pytest.raises(DataError, match="unpacks to more"):
        ClassificationDod.open(packed)
    packed.write_bytes(packed.read_bytes()[:200])
    monkeypatch.undo()
    with pytest.raises(DataError, match="Cannot read"):
        ClassificationDod.open(packed)


def test_a_read_only_file_is_enough_and_stays_as_it_is(tmp_path):
    path = make(tmp_path / "d.sqlite", sets=2)
    path.chmod(0o444)
    before = path.read_bytes()
    ClassificationDod.open(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["d.sqlite"]


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        (("UPDATE sentences SET sentence = x'ff00' WHERE id = 5",), r"sentences, id 5"),
        (("UPDATE sentences SET sentence = CAST(x'ff41' AS TEXT) WHERE id = 5",), r"sentences, id 5: not UTF-8"),
        (("UPDATE sentences SET sentence = ' ' WHERE id = 6",), "sentences, id 6"),
        (("UPDATE sentences SET sentence = ? WHERE id = 6", ("x" * 5000,)), "5000 characters"),
        (("UPDATE sentences SET sentence = ? WHERE id = 7", ("a\x1b[31m",)), "control characters"),
        (("UPDATE sentences SET keyword_id = 999 WHERE id = 7",), "keyword_id is 999"),
        (("UPDATE sentences SET keyword_id = 'one' WHERE id = 7",), "sentences, id 7: an id is bytes"),
        (
            ("UPDATE sentences SET sentence = (SELECT sentence FROM sentences WHERE id = 1) WHERE id = 2",),
            "same sentence twice",
        ),
        (("UPDATE keywords SET dataset_id = 77 WHERE id = 2",), "keywords, id 2: dataset_id is 77"),
        (("UPDATE keywords SET keyword = 'red0' WHERE id = 2",), "'red0' occurs twice"),
        (("DELETE FROM sentences WHERE keyword_id = 2 AND id % 2",), "12 sentences|11 sentences"),
        (("DELETE FROM keywords",), "keyword_id"),
        (("UPDATE meta SET value = '2'",), "format is 2"),
        (("UPDATE meta SET value = '{'",), "meta, key"),
        (("DROP TABLE keywords",), "no such table"),
        (("ALTER TABLE sentences RENAME COLUMN sentence TO text",), "no such column"),
    ],
)
def test_f26_a_file_that_cannot_be_trusted(statement, message, tmp_path):
    change = (
        [statement] if "DELETE FROM sentences" not in statement[0] else [statement, ("DELETE FROM sentences WHERE id = 26",)]
    )
    path = make(tmp_path / "d.sqlite", sets=2, change=change)
    with pytest.raises(DataError, match=message):
        ClassificationDod.open(path, Reading(heldout=12))


def test_f26_no_database_at_all(tmp_path):
    (tmp_path / "text.sqlite").write_text("this is a text and no database, however its name ends")
    whole = make(tmp_path / "d.sqlite", sets=20).read_bytes()
    (tmp_path / "half.sqlite").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.sqlite").write_bytes(b"")
    for name in ("text", "half", "empty", "missing"):
        with pytest.raises(DataError):
            ClassificationDod.open(tmp_path / f"{name}.sqlite")
    assert not (tmp_path / "missing.sqlite").exists()


def test_no_task_of_that_name_and_settings_out_of_range(tmp_path):
    dod = ClassificationDod.open(make(tmp_path / "d.sqlite", sets=2))
    with pytest.raises(ConfigError, match="labels_00001"):
        dod.task("labels_0001")
    with pytest.raises(ConfigError):
        Reading(heldout=0)


def test_the_shipped_dod_is_what_its_card_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dod = ClassificationDod.open("tight")
    card = (labelsets.FILE.parent / "tight.md").read_text()
    assert (len(dod.names()), len(dod.names("train")), len(dod.names("test"))) == (282, 231, 51)
    assert "282 classification tasks" in card and "231 label sets are for training, 51" in card
    texts = {name: {label: [*a, *b] for label, (a, b) in labels.items()} for name, labels in dod.sets.items()}
    assert all(len(labels) == 5 and all(len(s) == 24 for s in labels.values()) for labels in texts.values())
    every = [sentence for labels in texts.values() for s in labels.values() for sentence in s]
    assert len({prompts.normalised(s) for s in every}) == len(every) == 33_840
    for labels in texts.values():
        for sentence in [s for own in labels.values() for s in own][::7]:
            assert not any(prompts.mentions(sentence, label) for label in labels), sentence
    assert not {prompts.stem(label) for labels in texts.values() for label in labels} & evaluation_labels()
    assert dod.reference()["source"] == "tight"
    (tmp_path / "tight").write_text("a file of that name comes first")
    with pytest.raises(DataError, match="not a readable file"):
        ClassificationDod.open("tight")


def test_the_shipped_label_sets_are_a_small_dod():
    dod = ClassificationDod.from_labelsets()
    assert dod.names() == labelsets.names()
    task = dod.task("weather")
    assert sorted(task.labels) == sorted(labelsets.label_words("weather"))
    assert (len(task.train), len(task.heldout)) == (70, 50)
    texts = {f"Sentence: {row['text']} Label:" for row in labelsets.load("weather")["test"]}
    assert {r.input for r in task.heldout} == texts
