"""``softverb bank``: a bank from a DoD, and what is refused before work begins."""

from __future__ import annotations

import pytest
from toys import FakeDod

from lm_eval_softverb import cli
from lm_eval_softverb.bank import Bank


@pytest.fixture
def dod(monkeypatch):
    found = FakeDod(5)
    opened = {}

    def open_with(source, settings):
        opened.update(source=source, **settings)
        return found

    monkeypatch.setattr("lm_eval_softverb.metrics.dod.open_with", open_with)
    found.opened = opened
    return found


def run(tiny, out, *more):
    small = ["--tokens", "2", "--epochs", "1", "--patience", "0", "--batch-size", "8", "--quiet", "--device", "cpu"]
    return cli.main(["bank", "--dod", "fake", "--out", str(out), "--model", tiny("llama", window=256), *small, *more])


def test_bank_end_to_end(tiny, dod, tmp_path, capsys):
    assert run(tiny, tmp_path / "b", "--most-train", "2", "--most-test", "1", "--most-rows", "50", "--width", "2") == 0
    out = capsys.readouterr().out
    assert "3 tasks, 1 of them for testing; 3 prompts left" in out and "held-out accuracy" in out
    assert "--tasks dod_classification" in out
    assert dod.opened == {"source": "fake", "max_rows": 50}
    bank = Bank.load(tmp_path / "b")
    assert [e["task"] for e in bank.entries] == ["task0", "task1", "task2"]
    assert all(p.n == 2 and len(p.info["losses"]) == 1 for p in bank.prompts)
    assert run(tiny, tmp_path / "b", "--most-train", "2", "--most-test", "1") == 0
    assert "0 prompts left" in capsys.readouterr().out


def test_tasks_and_shards(tiny, dod, tmp_path, capsys):
    chosen = ["--tasks", "task4,task1,task3", "--exclude", "task3"]
    assert run(tiny, tmp_path / "b", *chosen, "--shard", "2/2") == 0
    assert "1 prompts of other shards are not" in capsys.readouterr().out
    assert run(tiny, tmp_path / "b", *chosen, "--shard", "1/2", "--no-texts") == 0
    entries = Bank.load(tmp_path / "b").entries
    assert [e["task"] for e in entries] == ["task1", "task4"] and "labels" not in entries[0]


def test_the_shipped_label_sets_are_a_dod(tiny, tmp_path):
    small = ["--tokens", "2", "--epochs", "1", "--batch-size", "16", "--quiet", "--device", "cpu", "--heldout-rows", "5"]
    arguments = ["bank", "--dod", "classification", "--tasks", "weather,music", "--model", tiny("llama", window=256)]
    assert cli.main([*arguments, "--out", str(tmp_path / "b"), *small]) == 0
    entries = Bank.load(tmp_path / "b").entries
    assert sorted(entries[0]["labels"]) == ["foggy", "rainy", "snowy", "sunny", "windy"]
    assert entries[0]["rows"] == {"train": 70, "heldout": 50} and entries[0]["heldout"]["rows"] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "task9"], "no task 'task9'"),
        (["--shard", "two"], "expected i/n"),
        (["--shard", "3/2"], "1 <= i <= n"),
        (["--preset", "papr"], "Did you mean 'paper'"),
    ],
)
def test_wrong_use(tiny, dod, tmp_path, capsys, arguments, message):
    assert run(tiny, tmp_path / "b", *arguments) == 2
    assert message in capsys.readouterr().err
