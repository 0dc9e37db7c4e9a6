"""One table for every arm: CSV for programs, text for the terminal, one self-contained HTML page with a plot."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

from lm_eval_softverb.compare.stats import mean_interval, paired_interval
from lm_eval_softverb.errors import DataError, MissingExtra

Scores = Mapping[str, float]
"""Per-document score by document hash."""


@dataclass(frozen=True)
class Line:
    """One row of ``report.csv``: a score, or with ``arm`` "a - b" a paired difference on the same documents."""

    arm: str
    task: str
    metric: str
    value: float
    low: float
    high: float
    n: int


def score_lines(arm: str, scores: Mapping[tuple[str, str], Scores]) -> list[Line]:
    """One line per task and metric of an arm, with its interval."""
    return [
        Line(arm, task, metric, **asdict(mean_interval(list(values.values()))))
        for (task, metric), values in sorted(scores.items())
    ]


def difference_lines(
    ours: str, our_scores: Mapping[tuple[str, str], Scores], other: str, other_scores: Mapping[tuple[str, str], Scores]
) -> list[Line]:
    """Paired differences ``ours - other`` for every task and metric both have.

    Raises:
        DataError: the two arms scored different documents.
    """
    lines = []
    for key in sorted(our_scores.keys() & other_scores.keys()):
        a, b = our_scores[key], other_scores[key]
        if a.keys() != b.keys():
            raise DataError(
                f"Task {key[0]}: '{ours}' and '{other}' scored different documents ({len(a.keys() ^ b.keys())} are in one "
                "only). Run both arms on the same data and without different limits."
            )
        order = sorted(a)
        interval = paired_interval([a[k] for k in order], [b[k] for k in order])
        lines.append(Line(f"{ours} - {other}", *key, **asdict(interval)))
    return lines


def to_csv(lines: Sequence[Line]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([f.name for f in fields(Line)])
    for line in lines:
        writer.writerow([line.arm, line.task, line.metric, *(f"{x:.6f}" for x in (line.value, line.low, line.high)), line.n])
    return out.getvalue()


def to_text(lines: Sequence[Line]) -> str:
    """Aligned table for a terminal; values in percent points of the metric."""
    head = ("arm", "task", "metric", "value", "95 % interval", "n")
    body = [
        (x.arm, x.task, x.metric, f"{100 * x.value:.1f}", f"[{100 * x.low:.1f}, {100 * x.high:.1f}]", str(x.n)) for x in lines
    ]
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    rows = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *body]]
    return "\n".join([rows[0], "-" * len(rows[0]), *rows[1:]])


def require_plots() -> None:
    """Called before long work whose page will need it.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtra("The plot needs matplotlib: pip install 'lm_eval_softverb[plots]'.") from error


@contextmanager
def figure(columns: int, size: tuple[float, float]) -> Iterator[tuple[Any, Any]]:
    """A matplotlib figure and its row of axes, closed afterwards; the same data gives the same SVG.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    require_plots()
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"svg.hashsalt": "softverb"}):
        drawn, axes = plt.subplots(1, columns, figsize=size, squeeze=False)
        try:
            yield drawn, axes[0]
        finally:
            plt.close(drawn)


def inline_svg(drawn: Any) -> str:
    """A figure as an ``<svg>`` element for a page."""
    out = io.StringIO()
    drawn.tight_layout()
    drawn.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]


def plot_svg(lines: Sequence[Line]) -> str:
    """Dots with intervals, one panel per (task, metric), as inline SVG.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    panels = sorted({(x.task, x.metric) for x in lines})
    arms = list(dict.fromkeys(x.arm for x in lines))
    with figure(len(panels), (4.2 * len(panels), 0.9 + 0.45 * len(arms))) as (drawn, axes):
        for axis, panel in zip(axes, panels, strict=True):
            for place, arm in enumerate(reversed(arms)):
                for x in (x for x in lines if (x.task, x.metric) == panel and x.arm == arm):
                    axis.plot([100 * x.low, 100 * x.high], [place, place], color="#4a6fa5", linewidth=2)
                    axis.plot([100 * x.value], [place], "o", color="#1d3557")
            axis.set_yticks(range(len(arms)), list(reversed(arms)))
            axis.set_xlim(-2, 102)
            axis.set_ylim(-0.5, len(arms) - 0.5)
            axis.set_title(" · ".join(panel), fontsize=9)
            axis.set_xlabel("% of documents, 95 % interval", fontsize=8)
            axis.grid(axis="x", alpha=0.3)
        return inline_svg(drawn)


def line_table(lines: Sequence[Line]) -> str:
    """Lines as an HTML table, in percent points of the metric."""
    body = [
        (x.arm, x.task, x.metric, f"{100 * x.value:.1f}", f"{100 * x.low:.1f} to {100 * x.high:.1f}", str(x.n)) for x in lines
    ]
    return table(("arm", "task", "metric", "value (%)", "95 % interval", "n"), body, numbers=3)


def table(head: Sequence[str], body: Sequence[Sequence[str]], numbers: int) -> str:
    """An HTML table with everything escaped; the last ``numbers`` columns are aligned to the right."""

    def cell(i: int, text: str) -> str:
        return f"<td{' class=n' if i >= len(head) - numbers else ''}>{html.escape(text)}</td>"

    rows = "".join(f"<tr>{''.join(cell(i, text) for i, text in enumerate(row))}</tr>" for row in body)
    return f"<table><thead><tr>{''.join(f'<th>{html.escape(h)}</th>' for h in head)}</tr></thead><tbody>{rows}</tbody></table>"


def page(title: str, intro: str, blocks: Sequence[str], sections: Mapping[str, str]) -> str:
    """A page that needs nothing from outside. ``blocks`` are HTML of ours; title, intro and sections are plain text."""
    more = "".join(f"<h2>{html.escape(k)}</h2><pre>{html.escape(v)}</pre>" for k, v in sections.items())
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>"
        "body{font:15px/1.5 system-ui,sans-serif;max-width:80rem;margin:2rem auto;padding:0 1rem;color:#1d2433}"
        "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.3rem .7rem;border-bottom:1px solid #ccd;text-align:left}"
        "td{vertical-align:top}"
        ".n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}pre{background:#f4f6fa;padding:1rem;white-space:pre-wrap}"
        "svg{max-width:100%;height:auto}</style></head><body>"
        f"<h1>{html.escape(title)}</h1><p>{html.escape(intro)}</p>{''.join(blocks)}{more}</body></html>"
    )


def heading(text: str) -> str:
    return f"<h2>{html.escape(text)}</h2>"
