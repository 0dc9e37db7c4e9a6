"""``softverb compare``: runs side by side, and a gate for CI."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from lm_eval_softverb.cli.arguments import command
from lm_eval_softverb.errors import ConfigError

GATE = 3
"""Exit status of a comparison that fell below its bound."""


def add_arguments(group: Any) -> None:
    p = command(
        group,
        "compare",
        compare,
        "Compare runs of lm_eval on the same documents: paired differences, tests, cost, one page.",
        """
  softverb compare none=runs/none fewshot=runs/fewshot prompt=runs/prompt --out report
  softverb compare runs/new --baseline runs/main --metric acc --fail-under -0.02 --out report

A run is the folder given to lm_eval as --output_path, with --log_samples; NAME=FOLDER names it. The exit status is 3 if a run
falls below --fail-under, so that CI can gate on it.
""",
    )
    p.add_argument("runs", nargs="+", metavar="RUN", help="folder, or NAME=FOLDER")
    p.add_argument("--baseline", help="run to compare with: a name among RUN, or a folder (default: the first RUN)")
    p.add_argument("--metric", action="append", help="only this metric; may be given again (default: all in common)")
    p.add_argument("--out", type=Path, help="folder for compare.md, compare.csv and compare.html")
    p.add_argument(
        "--fail-under",
        type=float,
        metavar="X",
        help="exit 3 if a run's difference to the baseline (macro average, or the only task) is below X, e.g. -0.02",
    )
    p.add_argument("--fail-worse", action="store_true", help="exit 3 if a run is worse on some task with p (Holm) < .05")


def compare(a: argparse.Namespace) -> int:
    from lm_eval_softverb import storage
    from lm_eval_softverb.compare import comparison, pages, report
    from lm_eval_softverb.compare.runs import read_run

    if a.out:
        report.require_plots()
        storage.require_writable(a.out)
    named = [(name, folder) if equals else ("", text) for text in a.runs for name, equals, folder in [text.partition("=")]]
    runs = [read_run(folder, name) for name, folder in named]
    baseline = a.baseline
    if baseline and baseline not in [r.name for r in runs]:
        if not Path(baseline).exists():
            names = ", ".join(r.name for r in runs)
            raise ConfigError(f"--baseline {baseline!r} is neither the name of a run ({names}) nor a folder.")
        runs.insert(0, read_run(baseline, "baseline"))
        baseline = "baseline"
    found = comparison.compare(runs, baseline, a.metric)
    print(pages.to_markdown(found))
    if a.out:
        pages.save(a.out, found, pages.to_html(found, runs))
        print(f"Page: {a.out / 'compare.html'}")
    problems = _below(found, a.fail_under) + (_worse(found) if a.fail_worse else [])
    for problem in problems:
        print(f"softverb: {problem}", file=sys.stderr)
    return GATE if problems else 0


def _below(found: Any, bound: float | None) -> list[str]:
    if bound is None:
        return []
    from lm_eval_softverb.compare.comparison import MACRO

    whole = [c for c in found.cells if c.task == MACRO] or list(found.cells)
    return [
        f"{c.run} on {c.metric}, {c.task}: {c.difference.interval.value:+.4f} against {found.baseline}, below {bound:+.4f}"
        for c in whole
        if c.difference and c.difference.interval.value < bound
    ]


def _worse(found: Any) -> list[str]:
    return [
        f"{c.run} on {c.metric}, {c.task}: worse than {found.baseline} on {c.difference.losses} and better on "
        f"{c.difference.wins}, p (Holm) {c.difference.adjusted:.3g}"
        for c in found.cells
        if c.difference and c.difference.adjusted < 0.05 and c.difference.losses > c.difference.wins
    ]
