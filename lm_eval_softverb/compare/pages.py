"""A comparison as Markdown, CSV, and one self-contained HTML page."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from lm_eval_softverb import storage
from lm_eval_softverb.compare import report
from lm_eval_softverb.compare.comparison import MACRO, Cell, Comparison
from lm_eval_softverb.compare.runs import Run

SAMPLES = 30
"""Documents per task that the page shows; the rest is in the runs' own files."""
WIDE = 8
"""Up to so many tasks stand side by side in Markdown; more of them, as in a DoD, stand below each other."""

_COLUMNS = ("run", "task", "metric", "score", "low", "high", "n", "unscored", "difference", "difference_low", "difference_high",
            "p", "p_holm", "test", "wins", "ties", "losses")  # fmt: skip
# Clicking a heading sorts its table: numbers as numbers, a second click the other way round.
_SORT = """<script>
document.querySelectorAll('table.sortable th').forEach(function (th) {
  th.addEventListener('click', function () {
    var table = th.closest('table'), column = Array.from(th.parentNode.children).indexOf(th);
    var up = th.dataset.up !== '1';
    table.querySelectorAll('th').forEach(function (other) { delete other.dataset.up; });
    th.dataset.up = up ? '1' : '0';
    var rows = Array.from(table.tBodies[0].rows);
    rows.sort(function (a, b) {
      var x = a.cells[column].textContent, y = b.cells[column].textContent, p = parseFloat(x), q = parseFloat(y);
      var order = isNaN(p) || isNaN(q) ? x.localeCompare(y) : p - q;
      return up ? order : -order;
    });
    rows.forEach(function (row) { table.tBodies[0].appendChild(row); });
  });
});
</script>"""


def to_csv(comparison: Comparison) -> str:
    """One line per run, task and metric."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for c in comparison.cells:
        row: list[object] = [
            c.run,
            c.task,
            c.metric,
            *_numbers(c.score.value, c.score.low, c.score.high),
            c.score.n,
            c.unscored,
        ]
        if d := c.difference:
            row += [*_numbers(d.interval.value, d.interval.low, d.interval.high, d.p, d.adjusted)]
            row += [d.test, d.wins, d.ties, d.losses]
        else:
            row += [""] * (len(_COLUMNS) - len(row))
        writer.writerow(row)
    return out.getvalue()


def to_markdown(comparison: Comparison) -> str:
    """One table per metric: runs down, tasks across; scores in percent, with the paired difference to the baseline.

    Many tasks stand in a second table, tasks down and runs across.
    """
    parts = []
    for metric in comparison.metrics:
        tasks = [t for t in comparison.tasks if any(comparison.cell(r, t, metric) for r in comparison.runs)]
        whole = [MACRO] if any(comparison.cell(r, MACRO, metric) for r in comparison.runs) else []
        head = [*whole, *tasks] if len(tasks) <= WIDE else whole
        rows = []
        for run in comparison.runs:
            cells = [comparison.cell(run, task, metric) for task in head]
            more = [_tally(comparison.cell(run, MACRO, metric))] if whole else []
            rows.append([run, *(_short(c) if c else "" for c in cells), *more])
        columns = ["run", *head, *(["tasks won–tied–lost"] if whole else [])]
        parts.append(f"### {_plain(metric)}\n\n" + markdown_table(columns, rows))
        if len(tasks) > WIDE:
            body = [[task, *(_bare(comparison.cell(run, task, metric)) for run in comparison.runs)] for task in tasks]
            parts.append(markdown_table(["task", *comparison.runs], body))
    note = (
        f"Percent, with the paired difference to {_plain(comparison.baseline)} in brackets and its 95 % interval; "
        "* Holm-adjusted p < .05 over the tasks of a run (for the macro average: its own test)."
    )
    return "\n\n".join([*parts, note, *map(_plain, comparison.notes)]) + "\n"


def to_html(
    comparison: Comparison,
    runs: Sequence[Run],
    title: str = "softverb compare",
    *,
    intro: str = "",
    blocks: Sequence[str] = (),
    sections: Mapping[str, str] | None = None,
) -> str:
    """The page: plots, sortable tables, costs, and each task's documents behind a click.

    Args:
        intro: sentences in front of ours; plain text.
        blocks: HTML of ours between the tables and the documents.
        sections: heading → plain text at the end.
    """
    runs = [r for r in runs if r.name in comparison.runs]
    shown: list[str] = []
    for metric in comparison.metrics:
        cells = [c for c in comparison.cells if c.metric == metric]
        whole, tasks = [c for c in cells if c.task == MACRO], [c for c in cells if c.task != MACRO]
        lines = [report.Line(c.run, c.task, metric, **asdict(c.score)) for c in whole or cells]
        shown += [report.heading(metric), report.plot_svg(lines), _table(whole or tasks)]
        if whole:
            shown.append(behind(f"{metric}, every task", _table(tasks)))
    shown += blocks
    if costs := _costs(comparison):
        shown += [report.heading("Cost"), costs]
    shown += [report.heading("Documents"), *(_documents(task, comparison, runs) for task in comparison.tasks), _SORT]
    ours = (
        f"{len(comparison.runs)} runs on the same documents of {len(comparison.tasks)} tasks. Differences are to "
        f"'{comparison.baseline}', paired by document; intervals are 95 %, over documents, and for the macro average over "
        "tasks and the documents within them; p-values are adjusted by Holm over the tasks of a run. Click a heading to sort."
    )
    return report.page(title, " ".join(filter(None, [intro, ours, *comparison.notes])), shown, sections or {})


def save(folder: Path, comparison: Comparison, page: str) -> None:
    """Writes ``compare.md``, ``compare.csv`` and ``compare.html``."""
    storage.write_text(folder / "compare.md", to_markdown(comparison))
    storage.write_text(folder / "compare.csv", to_csv(comparison))
    storage.write_text(folder / "compare.html", page)


def _numbers(*values: float) -> list[str]:
    return [f"{x:.6g}" for x in values]


def _plain(text: str) -> str:
    """Text that cannot end a Markdown cell or start an element."""
    return html.escape(text.replace("\n", " ")).replace("|", "\\|")


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table of plain texts: what a model wrote in a cell stays text."""
    rows = [[_plain(text) for text in row] for row in (head, *body)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def _tally(cell: Cell | None) -> str:
    return f"{d.wins}–{d.ties}–{d.losses}" if cell and (d := cell.difference) else ""


def _bare(cell: Cell | None) -> str:
    """Score and star."""
    if cell is None:
        return ""
    return f"{100 * cell.score.value:.1f}" + ("*" if cell.difference and cell.difference.adjusted < 0.05 else "")


def _short(cell: Cell) -> str:
    text = f"{100 * cell.score.value:.1f}"
    if d := cell.difference:
        star = "*" if d.adjusted < 0.05 else ""
        text += f" ({100 * d.interval.value:+.1f}{star} [{100 * d.interval.low:+.1f}, {100 * d.interval.high:+.1f}])"
    return text


def _table(cells: Sequence[Cell]) -> str:
    head = ["run", "task", "score (%)", "95 % interval", "n", "unscored"]
    head += ["difference", "95 % interval", "p (Holm)", "test", "wins–ties–losses"]
    body = []
    for c in cells:
        row = [c.run, c.task, f"{100 * c.score.value:.1f}", _range(c.score.low, c.score.high), str(c.score.n), str(c.unscored)]
        if d := c.difference:
            row += [f"{100 * d.interval.value:+.1f}", _range(d.interval.low, d.interval.high), f"{d.adjusted:.3g}", d.test]
            row += [_tally(c)]
        else:
            row += ["", "", "", "", ""]
        body.append(row)
    return report.table(head, body, numbers=9).replace("<table>", "<table class=sortable>", 1)


def _range(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f}"


def _costs(comparison: Comparison) -> str:
    keys = list(dict.fromkeys(k for cost in comparison.costs.values() for k in cost))
    if keys in ([], ["model"]):
        return ""
    body = [[run, *(str(cost.get(k, "")) for k in keys)] for run, cost in comparison.costs.items()]
    return report.table(("run", *keys), body, numbers=len(keys) - 1)


def _documents(task: str, comparison: Comparison, runs: Sequence[Run]) -> str:
    metric = next((m for m in comparison.metrics if comparison.cell(runs[0].name, task, m)), None)
    texts: Mapping[str, Mapping[str, str]] = runs[0].tasks[task].texts
    keys = sorted(texts, key=lambda k: int(k.rpartition("/")[2]) if k.rpartition("/")[2].isdigit() else 0)
    body = []
    for key in keys[:SAMPLES]:
        row = [texts[key]["input"], texts[key]["target"]]
        for run in runs:
            mine = run.tasks[task]
            score = mine.scores.get(metric, {}).get(key) if metric else None
            row.append(f"{mine.texts.get(key, {}).get('answer', '')} [{'unscored' if score is None else f'{score:.3g}'}]")
        body.append(row)
    more = f", the first {SAMPLES} of {len(keys)}" if len(keys) > SAMPLES else ""
    table = report.table(("input", "target", *(r.name for r in runs)), body, numbers=0)
    return behind(f"{task} ({metric or 'no common metric'}{more})", table)


def behind(summary: str, block: str) -> str:
    """A block of HTML that a click on its summary shows."""
    return f"<details><summary>{html.escape(summary)}</summary>{block}</details>"
