"""The pages of a comparison: every number is there, everything is escaped, and headings sort."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess

import pytest
from toys import ROOT

from lm_eval_softverb.compare import pages
from lm_eval_softverb.compare.comparison import MACRO, compare
from lm_eval_softverb.compare.runs import Run, Task

pytest.importorskip("matplotlib", reason="the page needs the extra [plots]")
EVIL = "<script>alert('x')</script> | `rm` {{ 7 * 7 }}"


def run_of(name, offset, tasks=("t1", "t2"), **config):
    made = {}
    for t, task in enumerate(tasks):
        scores = {f"h{i}/{i}": float((i + offset + t) % 3 > 0) for i in range(40)}
        texts = {k: {"input": f"in {k} {EVIL}", "target": EVIL, "answer": f"{name} {EVIL}"} for k in scores}
        made[task] = Task({"acc": scores}, frozenset(), texts)
    return Run(name, made, config, {"acc": True})


@pytest.fixture
def runs():
    return [run_of("none", 0), run_of(f"ours {EVIL}", 1, toy={"cost": 0.25, "usage": {"tokens": 7}})]


def test_csv_holds_every_cell(runs):
    found = compare(runs)
    rows = list(csv.DictReader(io.StringIO(pages.to_csv(found))))
    assert len(rows) == len(found.cells) == 6
    for row, cell in zip(rows, found.cells, strict=True):
        assert (row["run"], row["task"]) == (cell.run, cell.task)
        assert float(row["score"]) == pytest.approx(cell.score.value, rel=1e-5)
        if cell.difference:
            assert float(row["p_holm"]) == pytest.approx(cell.difference.adjusted, rel=1e-5)
            assert [int(row[k]) for k in ("wins", "ties", "losses")] == [
                cell.difference.wins, cell.difference.ties, cell.difference.losses
            ]  # fmt: skip
        else:
            assert row["difference"] == ""


def test_markdown(runs):
    text = pages.to_markdown(compare(runs))
    lines = text.splitlines()
    assert lines[0] == "### acc" and lines[2] == f"| run | {MACRO} | t1 | t2 | tasks won–tied–lost |"
    assert len([x for x in lines if x.startswith("| ")]) == 3
    assert "<script" not in text and all(x.replace("\\|", "").count("|") == 6 for x in lines if x.startswith("| "))


def test_many_tasks_stand_below_each_other(tmp_path):
    tasks = [f"dod_x/{i}" for i in range(12)]
    runs = [run_of("none", 0, tasks), run_of("ours", 1, tasks)]
    found = compare(runs)
    lines = pages.to_markdown(found).splitlines()
    assert lines[2] == f"| run | {MACRO} | tasks won–tied–lost |" and lines[7] == "| task | none | ours |"
    whole = found.cell("ours", MACRO, "acc")
    d = whole.difference
    assert lines[5].startswith(f"| ours | {100 * whole.score.value:.1f} (") and lines[5].endswith(
        f"| {d.wins}–{d.ties}–{d.losses} |"
    )
    body = [x.strip("|").split(" | ") for x in lines[9:21]]
    for task, (name, *scores) in zip(tasks, body, strict=True):
        cells = [found.cell(run, task, "acc") for run in ("none", "ours")]
        assert name.strip() == task
        assert [float(s.strip(" *|")) for s in scores] == [round(100 * c.score.value, 1) for c in cells]
    page = pages.to_html(found, runs, "T", intro=f"First {EVIL}.", blocks=["<p>mine</p>"], sections={"By hand": EVIL})
    headline = page[page.index("<table class=sortable>") :]
    assert headline[: headline.index("</table>")].count("<tr>") == 3  # the runs, and the head
    assert "<p>mine</p>" in page and "<h2>By hand</h2>" in page and "<script>alert" not in page
    pages.save(tmp_path, found, page)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["compare.csv", "compare.html", "compare.md"]


def test_html_is_self_contained_and_escaped(runs):
    page = pages.to_html(compare(runs), runs)
    assert page.count("<script>") == 1 and "<script>alert" not in page
    assert "src=" not in page and "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")
    assert page.count("<details>") == 3 and "the first 30 of 40" in page
    assert "0.25" in page


BROWSER = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)


@pytest.mark.skipif(BROWSER is None, reason="no headless browser is installed")
def test_clicking_a_heading_sorts_in_a_real_browser(runs, tmp_path):
    page = pages.to_html(compare([run_of(n, i, ("t1",)) for i, n in enumerate(("b", "a", "c"))]), [run_of("b", 0, ("t1",))])
    click = """<script>document.querySelectorAll('table.sortable th')[0].click();
    var rows = Array.from(document.querySelector('table.sortable').tBodies[0].rows);
    document.title = rows.map(r => r.cells[0].textContent).join('');
    </script></body>"""
    path = tmp_path / "page.html"
    path.write_text(page.replace("</body>", click))
    dumped = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, check=True, timeout=120, cwd=ROOT,
    ).stdout  # fmt: skip
    assert "<title>abc</title>" in dumped
