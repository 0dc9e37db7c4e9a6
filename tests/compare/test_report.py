"""The report: pairing by document, refusal of different documents, and a page that escapes what models wrote."""

from __future__ import annotations

import csv
import io

import pytest

from lm_eval_softverb.compare import report
from lm_eval_softverb.compare.report import Line
from lm_eval_softverb.errors import DataError


def test_scores_and_paired_differences():
    ours, other = (
        {("t", "acc"): {"a": 1.0, "b": 1.0, "c": 0.0, "d": 1.0}},
        {("t", "acc"): dict(zip("abcd", (0, 1, 0, 0), strict=True))},
    )
    (line,) = report.score_lines("x", ours)
    assert (line.arm, line.task, line.metric, line.value, line.n) == ("x", "t", "acc", 0.75, 4)
    (difference,) = report.difference_lines("x", ours, "y", other)
    assert (difference.arm, difference.value) == ("x - y", 0.5)


def test_different_documents_are_refused():
    ours, other = {("t", "acc"): {"a": 1.0, "b": 0.0}}, {("t", "acc"): {"a": 1.0, "z": 0.0}}
    with pytest.raises(DataError, match="different documents"):
        report.difference_lines("x", ours, "y", other)


def test_csv_has_the_documented_columns():
    rows = list(csv.DictReader(io.StringIO(report.to_csv([Line("none", "t", "acc", 0.5, 0.4, 0.6, 10)]))))
    assert rows == [
        {"arm": "none", "task": "t", "metric": "acc", "value": "0.500000", "low": "0.400000", "high": "0.600000", "n": "10"}
    ]


def test_page_is_self_contained_and_escapes_text():
    pytest.importorskip("matplotlib", reason="the plot needs the extra [plots]")
    lines = [Line("none", "t", "acc", 0.5, 0.4, 0.6, 10), Line("<b>arm</b>", "t", "acc", 0.9, 0.8, 1.0, 10)]
    said = "<script>alert(3)</script>"
    table = report.table(("a", "b"), [(said, "1")], numbers=1)
    blocks = [report.plot_svg(lines), report.heading(said), report.line_table(lines), table]
    page = report.page("Title", "<script>alert(1)</script>", blocks, {"said": "</pre><script>alert(2)</script>"})
    assert "<script" not in page
    assert "<b>arm" not in page
    assert "<svg" in page
    assert "src=" not in page
    assert "<td class=n>90.0</td>" in page and "<td class=n>1</td>" in page


def test_text_table_aligns():
    text = report.to_text([Line("none", "task", "acc", 0.5, 0.4, 0.6, 10)])
    assert text.splitlines()[2].split() == ["none", "task", "acc", "50.0", "[40.0,", "60.0]", "10"]
