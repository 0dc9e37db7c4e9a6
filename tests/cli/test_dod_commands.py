"""``softverb dod list``, ``audit`` and ``texts`` on tiny data."""

from __future__ import annotations

import argparse
import csv
import json

import pytest
from toy_dods import SMALL, labels_bank, task, tasks, write_clone

from lm_eval_softverb.cli.dod_general import add_arguments
from lm_eval_softverb.data.dod.general import PAPER, GeneralDod
from lm_eval_softverb.errors import ConfigError


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser.add_subparsers())
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


def test_list_prints_counts_and_writes_every_task(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SOFTVERB_CACHE", str(tmp_path / "cache"))
    root = write_clone(tmp_path / "c", tasks() | {"task5_missing": {"split": "test"}})
    assert run("list", root, "--out", str(tmp_path / "list.csv")) == 0
    text = capsys.readouterr().out
    assert "train: 0 pass (the paper has 539), 2 too few instances\n" in text
    assert "test: 0 pass (the paper has 96), 1 no data, 2 too few instances\n" in text
    rows = list(csv.DictReader((tmp_path / "list.csv").open()))
    assert [row["name"] for row in rows] == [*tasks(), "task5_missing"] and rows[-1]["reason"] == "no data"
    assert run("list", root, "--out", str(tmp_path / "list.json")) == 0
    written = json.loads((tmp_path / "list.json").read_text())
    assert written["counts"]["train"] == {"too few instances": 2} and written["paper"] == PAPER and len(written["tasks"]) == 5
    assert len(list((tmp_path / "cache" / "dod").iterdir())) == 1
    with pytest.raises(ConfigError, match=r"expected a \.csv or \.json"):
        run("list", root, "--out", "x.txt")


def test_the_command_prints_the_table_and_writes_the_report(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SOFTVERB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lm_eval_softverb.metrics.dod.open_dod", lambda source, **kw: GeneralDod.open(source, **SMALL))
    given = tasks() | {"task5_copy": task("red", "test")}
    root = write_clone(tmp_path / "c", given)
    assert run("audit", root, "--out", str(tmp_path / "audit.json"), "--near", "0.9") == 0
    report = json.loads((tmp_path / "audit.json").read_text())
    assert report["near_duplicates"]["list"][0]["tasks"] == ["task1_red_one", "task5_copy"]
    assert report["corpora"]["list"].keys() == {"red_corpus"} and report["corpora"]["known_by"] == "source field"
    assert "near-duplicate pairs" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"--near is 2\.0"):
        run("audit", root, "--near", "2")


def test_texts_of_every_kind(tmp_path, monkeypatch, capsys):
    from lm_eval_softverb.models.hardprompts import HardPrompts
    from lm_eval_softverb.models.replay import ReplayLM

    names = ["emotion", "weather", "sport", "room"]
    bank, dod = labels_bank(tmp_path / "bank", names)

    def texts(*more):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        assert run("texts", "--bank", str(bank), "--out", str(out), *more) == 0
        return out, HardPrompts.read(str(out)).texts

    gold = texts()[1]
    assert gold == {f"p-{n}": ", ".join(dod.task(n).labels) for n in names}
    other = texts("--other", "--seed", "3")[1]
    assert sorted(other.values()) == sorted(gold.values()) and all(other[n] != gold[n] for n in gold)
    for name, text in texts("--shots", "5")[1].items():
        task = dod.task(name.removeprefix("p-"))
        examples = [part.partition(" Label: ") for part in text.split("\n\n")]
        assert sorted(label for _, _, label in examples) == sorted(task.labels)
        assert {f"{sentence} Label:" for sentence, _, _ in examples} <= {r.input for r in task.train}
    out, most = texts("--majority")
    assert all(most[f"p-{n}"] in dod.task(n).labels for n in names)
    assert len(ReplayLM(file=str(out)).texts) == len(names)
    assert "Texts of" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        texts("--majority", "--shots", "5")
    with pytest.raises(ConfigError, match="is 0, expected at least 1"):
        texts("--shots", "0")
