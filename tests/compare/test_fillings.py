"""Texts of a bank's prompts that need no model: each line by hand."""

from __future__ import annotations

import pytest
from toy_dods import general_bank

from lm_eval_softverb.bank import Bank
from lm_eval_softverb.compare import fillings
from lm_eval_softverb.models.hardprompts import BREAK
from lm_eval_softverb.storage import read_jsonl, sha256_json


@pytest.fixture
def given(tmp_path, monkeypatch):
    """A bank of a tiny general DoD whose manifest only names its texts."""
    monkeypatch.setenv("SOFTVERB_CACHE", str(tmp_path / "cache"))
    folder, dod = general_bank(tmp_path)
    entries = []
    for _, entry in read_jsonl(folder / "manifest.jsonl"):
        truth = {"labels": [], "instruction": dod.task(entry["task"]).instruction}
        entries.append({**entry, "truth_sha256": sha256_json(truth)})
    return Bank((), tuple(entries), str(folder)), dod


def texts(lines):
    assert all(line["rank"] == 0 for line in lines)
    return {line["prompt_id"]: line["text"] for line in lines}


def test_every_filling(given):
    bank, dod = given
    gold = {f"p-{name}": dod.task(name).instruction for name in dod.names()}
    assert texts(fillings.gold(bank)) == gold
    assert gold["p-task4_black_four"] == "{{ 7*7 }}\nSay [black]."
    swapped = texts(fillings.other(bank))
    assert swapped["p-task1_red_one"] == gold["p-task2_blue_two"]  # two tasks per split: each gets the other's
    assert swapped["p-task4_black_four"] == gold["p-task3_green_three"]
    for name, text in texts(fillings.shots(bank, 2)).items():
        rows = {f"{r.input} {r.output}" for r in dod.task(name.removeprefix("p-")).train}
        parts = text.split("\n\n")
        assert len(parts) == 2 and set(parts) <= rows
    assert fillings.shots(bank, 2) == fillings.shots(bank, 2, 0) != fillings.shots(bank, 2, 1)
    for line in fillings.majority(bank):
        outputs = [r.output for r in dod.task(line["prompt_id"].removeprefix("p-")).train]
        assert outputs.count(line["text"]) == max(map(outputs.count, outputs))


def test_examples_and_hard_prompts_are_separated_alike():
    assert fillings.rows.BREAK == BREAK
