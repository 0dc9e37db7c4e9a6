"""``softverb compare``: files, and the exit status that CI reads."""

from __future__ import annotations

import json

import pytest

from lm_eval_softverb import cli

pytest.importorskip("matplotlib", reason="the page needs the extra [plots]")
STAMP = "2026-11-20T20-49-28.494689"


@pytest.fixture
def run(tmp_path):
    """``run(name, scores)`` → folder of a run with one task, as the harness writes it."""

    def write(name, scores):
        root = tmp_path / name / "model"
        root.mkdir(parents=True)
        value = {"results": {"t": {}}, "config": {"model": "toy"}, "higher_is_better": {"t": {"acc": True}}}
        (root / f"results_{STAMP}.json").write_text(json.dumps(value))
        lines = [
            {"doc_id": i, "doc": {}, "doc_hash": f"h{i}", "filter": "none", "metrics": ["acc"], "acc": s, "arguments": {},
             "target": "x", "filtered_resps": ["y"]}
            for i, s in enumerate(scores)
        ]  # fmt: skip
        (root / f"samples_t_{STAMP}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        return str(tmp_path / name)

    return write


def test_compare_writes_the_report(run, tmp_path, capsys):
    runs = [f"old={run('x', [1, 0, 1, 0])}", f"new={run('y', [1, 1, 1, 0])}"]
    assert cli.main(["compare", *runs, "--out", str(tmp_path / "report")]) == 0
    assert "| new | 75.0 (+25.0" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == ["compare.csv", "compare.html", "compare.md"]


def test_the_gate(run, capsys):
    main, worse, same = run("main", [1] * 30 + [0] * 10), run("worse", [1] * 10 + [0] * 30), run("same", [1] * 29 + [0] * 11)
    gate = ["--baseline", main, "--metric", "acc"]
    assert cli.main(["compare", same, *gate, "--fail-under", "-0.05", "--fail-worse"]) == 0
    assert cli.main(["compare", same, *gate, "--fail-under", "-0.01"]) == 3
    assert "same on acc, t: -0.0250 against baseline, below -0.0100" in capsys.readouterr().err
    assert cli.main(["compare", same, worse, *gate, "--fail-worse"]) == 3
    assert "worse on acc, t: worse than baseline on 20 and better on 0" in capsys.readouterr().err


def test_an_unknown_baseline(run, capsys):
    assert cli.main(["compare", run("a", [1, 0]), "--baseline", "nowhere"]) == 2
    assert "neither the name of a run (a) nor a folder" in capsys.readouterr().err
