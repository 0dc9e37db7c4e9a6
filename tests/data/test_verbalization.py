"""Documents of the verbalize tasks: what a bank's manifest must hold, and what its absence says."""

from __future__ import annotations

import json

import pytest
import torch
from toys import FakeDod

from lm_eval_softverb import bank as banks
from lm_eval_softverb.bank import MANIFEST, Bank
from lm_eval_softverb.data import verbalization
from lm_eval_softverb.data.verbalization import load
from lm_eval_softverb.errors import ArtifactError, ConfigError, DataError
from lm_eval_softverb.prompt import SoftPrompt
from lm_eval_softverb.storage import sha256_json

ROWS = [
    {"prompt_id": "p0", "path": "p0", "labels": ["red", "dark blue"], "task": "colours", "split": "train"},
    {"prompt_id": "p1", "path": "p1", "labels": ["up", "down"], "task": "ways", "split": "test"},
    {"prompt_id": "p2", "path": "p2", "instruction": "[Add the numbers.]"},
    {"prompt_id": "p3", "path": "p3", "labels": ["a"], "instruction": "Say {{ a }}.", "split": "test"},
    {"prompt_id": "p4", "path": "p4", "labels": None, "task": None, "split": None},
]


@pytest.fixture
def write(tmp_path):
    def make(rows) -> str:
        (tmp_path / MANIFEST).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path)

    return make


def docs(*args, **kw):
    loaded = load(*args, **kw)
    assert list(loaded) == ["test"]
    return loaded["test"].to_list()


def test_the_manifest_has_one_name():
    assert verbalization.manifest_of is banks.manifest_of
    assert MANIFEST == banks.MANIFEST == "manifest.jsonl"


def test_labels_of_the_test_split_by_default(write):
    assert docs("labels", bank=write(ROWS)) == [
        {"prompt_id": "p1", "task": "ways", "kind": "labels", "target": "up, down", "labels": ["up", "down"]},
        {"prompt_id": "p3", "task": "", "kind": "labels", "target": "a", "labels": ["a"]},
    ]


def test_instructions_have_no_labels(write):
    (doc,) = docs("instructions", bank=write(ROWS))
    assert doc == {"prompt_id": "p3", "task": "", "kind": "instructions", "target": "Say {{ a }}.", "labels": []}


def test_a_split_is_chosen_and_without_test_entries_all_are_taken(write):
    assert [d["prompt_id"] for d in docs("labels", bank=write(ROWS), split="train")] == ["p0"]
    assert [d["prompt_id"] for d in docs("labels", bank=write(ROWS), split="all")] == ["p0", "p1", "p3"]
    assert [d["prompt_id"] for d in docs("instructions", bank=write(ROWS[:3]))] == ["p2"]
    assert [d["prompt_id"] for d in docs("labels", bank=write([ROWS[0], {**ROWS[3], "split": "validation"}]))] == ["p0", "p3"]


def test_other_arguments_of_the_model_are_ignored(write):
    bank = write(ROWS)
    assert docs("labels", bank=bank, pretrained="x", method="nearest", kind="labels", version=1.0) == docs("labels", bank=bank)


def test_a_bank_written_by_bank_save_is_read_without_its_tensors(tmp_path):
    prompt = SoftPrompt(torch.ones(2, 32))
    folder = banks.Bank.save(tmp_path / "bank", [(prompt, {"prompt_id": "p", "labels": ["a", "b"]})])
    (folder / banks.TENSORS).unlink()
    assert docs("labels", bank=str(folder))[0]["labels"] == ["a", "b"]


@pytest.mark.parametrize(
    ("given", "says"), [({}, "no bank"), ({"peft": "prompts/one"}, "peft=prompts/one"), ({"bank": ""}, "no bank")]
)
def test_without_a_bank_the_message_says_how_to_pass_one(given, says):
    with pytest.raises(ConfigError, match=says) as caught:
        load("labels", **given)
    assert "--model_args bank=DIR" in str(caught.value)
    assert '--metadata \'{"bank": "DIR"}\'' in str(caught.value)


def test_an_unknown_target_is_named():
    with pytest.raises(ConfigError, match="'labels'"):
        load("label", bank="x")


def test_a_folder_without_a_manifest_is_no_bank(tmp_path):
    with pytest.raises(ArtifactError, match="written last"):
        load("labels", bank=str(tmp_path))


@pytest.mark.parametrize(
    ("rows", "target", "split", "says"),
    [
        (ROWS, "labels", "dev", r"split dev; it holds 1 in train, 2 in test"),
        (ROWS[:1], "instructions", None, "no prompts with 'instruction'; it holds others only"),
        ([ROWS[2]], "instructions", "test", "1 in no split"),
        ([], "labels", None, "no prompts"),
    ],
)
def test_no_matching_entries_says_what_the_bank_holds(write, rows, target, split, says):
    with pytest.raises(DataError, match=says):
        load(target, bank=write(rows), split=split)


@pytest.mark.parametrize(
    "change",
    [
        {"labels": []}, {"labels": "up, down"}, {"labels": ["up", ""]}, {"labels": ["up", 3]}, {"labels": ["\ud83d"]},
        {"labels": {"up": 1}}, {"prompt_id": None}, {"prompt_id": ""}, {"prompt_id": 7}, {"prompt_id": "p0"},
        {"task": 3}, {"split": ["test"]}, {"split": ""},
    ],
)  # fmt: skip
def test_an_entry_that_cannot_be_used_is_named(write, change):
    with pytest.raises(DataError, match=rf"{MANIFEST}:2"):
        load("labels", bank=write([ROWS[0], {**ROWS[1], **change}]))


@pytest.mark.parametrize("instruction", ["", " ", 3, ["Add."], "\udc00"])
def test_an_instruction_that_cannot_be_used_is_named(write, instruction):
    with pytest.raises(DataError, match=rf"{MANIFEST}:1: 'instruction'"):
        load("instructions", bank=write([{**ROWS[2], "instruction": instruction}]))


def test_targets_and_fields_go_together():
    assert set(verbalization.FIELDS) == {"labels", "instructions"}


# --- ground truth that is only named -------------------------------------------------------------------------------


@pytest.fixture
def named(write):
    """Two lines without texts, of a DoD whose even tasks have an instruction and whose odd ones have labels."""
    dod = FakeDod(3)

    def line(name, **changes):
        task = dod.task(name)
        truth = {"labels": list(task.labels), "instruction": task.instruction}
        entry = {"prompt_id": name, "task": name, "truth_sha256": sha256_json(truth), "dod": {"kind": "general", "source": "x"}}
        return entry | changes

    opened = []

    def open_(source, settings):
        opened.append(source)
        return dod

    return line, open_, opened


def test_texts_are_read_from_the_dod(write, named):
    line, open_, opened = named
    bank = write([line("task0"), line("task1"), line("task2")])
    assert [d["target"] for d in load("instructions", bank=bank, open_=open_)["test"]] == ["Say it.", "Say it."]
    assert [d["labels"] for d in load("labels", bank=bank, open_=open_, dod="general:here")["test"]] == [["red", "table"]]
    assert opened == ["general:x", "general:here"]  # once per load


def test_a_bank_gets_the_texts_that_its_manifest_only_names(named):
    line, open_, opened = named
    entries = (
        line("task0"),
        line("task1"),
        {"prompt_id": "own", "labels": ["a"], "instruction": "Sort."},
        {"prompt_id": "none"},
    )
    bank = verbalization.with_truth(Bank((), entries, "bank"), open_=open_)
    assert [e.get("instruction") for e in bank.entries] == ["Say it.", None, "Sort.", None]
    assert [e.get("labels") for e in bank.entries] == [None, ["red", "table"], ["a"], None]
    assert opened == ["general:x"]
    with pytest.raises(DataError, match=r"'task0'.*another text"):
        verbalization.with_truth(Bank((), (line("task0", truth_sha256="0" * 64),), "bank"), open_=open_)


def test_the_texts_of_a_bank_and_those_of_others():
    entries = [{"prompt_id": f"p{i}", "instruction": f"Do {i // 2}.", "split": "test" if i < 6 else "train"} for i in range(10)]
    entries.append({"prompt_id": "p10", "labels": ["a", "b"], "split": "train"})
    found = verbalization.truths(Bank((), tuple(entries), "bank"))
    assert found["p3"] == ("test", "Do 1.") and found["p10"] == ("train", "a, b")
    other = verbalization.another(found, 0)
    assert list(other) == list(found)
    for split in ("test", "train"):
        own, theirs = ({name: text for name, (s, text) in x.items() if s == split} for x in (found, other))
        assert sorted(own.values()) == sorted(theirs.values()) and not any(own[name] == theirs[name] for name in own)
    assert verbalization.another(found, 0) == other != verbalization.another(found, 1)
    with pytest.raises(DataError, match="too few different texts"):
        verbalization.another({"a": ("", "x"), "b": ("", "x"), "c": ("", "y")}, 0)
    with pytest.raises(DataError, match="'p'"):
        verbalization.truths(Bank((), ({"prompt_id": "p"},), "bank"))


@pytest.mark.parametrize(
    ("changes", "says"), [({"truth_sha256": "0" * 64}, "another text"), ({"dod": {"kind": "poems"}}, "dod=")]
)
def test_a_text_that_is_not_the_one_meant_is_refused(write, named, changes, says):
    line, open_, _ = named
    with pytest.raises(DataError, match=rf"manifest.jsonl:1: .*{says}"):
        load("instructions", bank=write([line("task0", **changes)]), open_=open_)
