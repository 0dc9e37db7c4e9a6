"""``softverb compare``: every run against one of them, on the same documents, with what chance alone could do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval_softverb.compare.runs import Key, Run
from lm_eval_softverb.compare.stats import Interval, holm, macro_interval, mean_interval, paired_interval, paired_p, sign_flip_p
from lm_eval_softverb.errors import ConfigError, DataError, did_you_mean

MACRO = "macro average"


@dataclass(frozen=True)
class Difference:
    """One run minus the baseline, on one task, paired by document.

    Attributes:
        interval: of the mean difference.
        p: two-sided; ``adjusted`` by Holm over the tasks of this run and metric (the macro average is one test of its own).
        test: its name.
        wins, ties, losses: documents (for the macro average, tasks) where this run scores higher, equal, lower; by the score's
            own direction, so that a win is always better.
    """

    interval: Interval
    p: float
    adjusted: float
    test: str
    wins: int
    ties: int
    losses: int


@dataclass(frozen=True)
class Cell:
    """One run on one task by one metric.

    Attributes:
        score: mean with its interval; over tasks for the macro average.
        unscored: documents left out because some run has no score for them.
        difference: to the baseline; None for the baseline itself.
    """

    run: str
    task: str
    metric: str
    score: Interval
    unscored: int
    difference: Difference | None = None


@dataclass(frozen=True)
class Comparison:
    """All cells, in the order runs, metrics and tasks were given.

    Attributes:
        notes: what a reader must know: runs that were left out, runs of a part of the documents.
    """

    baseline: str
    runs: tuple[str, ...]
    metrics: tuple[str, ...]
    tasks: tuple[str, ...]
    cells: tuple[Cell, ...]
    costs: Mapping[str, Mapping[str, Any]]
    notes: tuple[str, ...] = ()

    def cell(self, run: str, task: str, metric: str) -> Cell | None:
        """The cell, or None where the task has no such metric."""
        return next((c for c in self.cells if (c.run, c.task, c.metric) == (run, task, metric)), None)


def compare(runs: Sequence[Run], baseline: str | None = None, metrics: Sequence[str] | None = None) -> Comparison:
    """Joins runs by document. Runs with ``--limit`` are left out and noted, unless all have it.

    Args:
        baseline: name of the run that all others are compared with; the first by default.
        metrics: only these; by default those that every run has.

    Raises:
        ConfigError: fewer than two runs, two of one name, an unknown baseline or metric.
        DataError: the runs did not score the same documents; the message lists where they differ.
    """
    names = [run.name for run in runs]
    if len(runs) < 2 or len(set(names)) < len(names):
        raise ConfigError(f"Comparing needs at least two runs of different names, got {names}. Name them: NAME=FOLDER.")
    base = baseline or names[0]
    if base not in names:
        raise ConfigError(f"There is no run {base!r} to compare with. {did_you_mean(base, names)}")
    runs, notes = _whole(runs, base)
    names = [run.name for run in runs]
    _same_documents(runs)
    tasks = list(runs[0].tasks)
    common = [m for m in _metrics(runs[0]) if all(m in _metrics(r) for r in runs)]
    chosen = list(metrics) if metrics else common
    for metric in chosen:
        if metric not in common:
            raise ConfigError(f"Not every run has the metric {metric!r}. {did_you_mean(metric, common)}")
    reference = next(r for r in runs if r.name == base)
    cells = [cell for metric in chosen for run in runs for cell in _cells(run, reference, runs, metric)]
    if not cells:
        raise DataError("The runs have no metric in common on any task; nothing can be compared.")
    costs = {run.name: _costs(run) for run in runs}
    return Comparison(base, tuple(names), tuple(chosen), tuple(tasks), tuple(cells), costs, notes)


def _whole(runs: Sequence[Run], base: str) -> tuple[list[Run], tuple[str, ...]]:
    """The runs that can stand in one table, and notes on the others: a trial run is no result."""
    limits = {run.name: run.config.get("limit") for run in runs}
    limited = [name for name, limit in limits.items() if limit is not None]
    if len(limited) == len(runs):
        shown = ", ".join(map(str, dict.fromkeys(limits.values())))
        return list(runs), (f"All runs have --limit {shown}: they scored only the first documents of each task.",)
    kept = [run for run in runs if run.name not in limited]
    if base in limited or len(kept) < 2:
        raise DataError(
            f"Only {', '.join(limited)} ran with --limit, so the runs cannot be compared: {len(kept)} of {len(runs)} scored "
            f"whole tasks, and the baseline is {base}. Run all of them without --limit, or all with the same."
        )
    return kept, tuple(f"{name} is left out: it ran with --limit {limits[name]}, the others did not." for name in limited)


def _metrics(run: Run) -> list[str]:
    return list(dict.fromkeys(metric for task in run.tasks.values() for metric in task.scores))


def _same_documents(runs: Sequence[Run]) -> None:
    first, problems = runs[0], []
    for run in runs[1:]:
        for task in [*first.tasks, *(t for t in run.tasks if t not in first.tasks)]:
            if task not in run.tasks or task not in first.tasks:
                problems.append(f"{task}: only in {first.name if task in first.tasks else run.name}")
                continue
            a, b = (_documents(r, task) for r in (first, run))
            if a != b:
                example = sorted(a ^ b)[0].partition("/")
                problems.append(
                    f"{task}: {len(a - b)} documents only in {first.name}, {len(b - a)} only in {run.name} "
                    f"(for example number {example[2]}, {example[0][:12]}…)"
                )
    if problems:
        more = f"\n  … and {len(problems) - 10} more" if len(problems) > 10 else ""
        listed = "\n  ".join(problems[:10])
        raise DataError(
            f"The runs did not score the same documents, so they cannot be paired:\n  {listed}{more}\n"
            "Run all arms on the same tasks, data and --limit."
        )


def _documents(run: Run, task: str) -> set[Key]:
    found = run.tasks[task]
    return set(found.unscored).union(*(scores.keys() for scores in found.scores.values()))


def _cells(run: Run, base: Run, runs: Sequence[Run], metric: str) -> list[Cell]:
    """Cells of all tasks with this metric, then that of their macro average."""
    up = run.higher_is_better.get(metric.partition(",")[0], True)
    own: dict[str, list[float]] = {}
    differences: dict[str, list[float]] = {}
    tests: dict[str, tuple[float, str]] = {}
    missing: dict[str, int] = {}
    for task in run.tasks:
        if any(metric not in r.tasks[task].scores for r in runs):
            continue
        # Paired means: the same documents for every run, so that one arm's failures do not make its sample easier.
        keys = sorted(set.intersection(*(set(r.tasks[task].scores[metric]) for r in runs)))
        missing[task] = len(_documents(run, task)) - len(keys)
        if not keys:
            raise DataError(f"Task {task}: no document has a score of {metric} in every run; see which run left them unscored.")
        own[task] = [run.tasks[task].scores[metric][k] for k in keys]
        theirs = [base.tasks[task].scores[metric][k] for k in keys]
        differences[task] = [a - b for a, b in zip(own[task], theirs, strict=True)]
        tests[task] = paired_p(own[task], theirs)
    if not own:
        return []
    adjusted = dict(zip(tests, holm([p for p, _ in tests.values()]), strict=True))
    cells = []
    for task, values in own.items():
        difference = None
        if run is not base:
            p, test = tests[task]
            counts = _tally(differences[task], up)
            interval = paired_interval(differences[task], [0.0] * len(values))
            difference = Difference(interval, p, adjusted[task], test, *counts)
        cells.append(Cell(run.name, task, metric, mean_interval(values), missing[task], difference))
    if len(own) > 1:
        difference = None
        if run is not base:
            means = [sum(d) / len(d) for d in differences.values()]
            p = sign_flip_p(means)
            difference = Difference(macro_interval(differences), p, p, "sign flip over tasks", *_tally(means, up))
        cells.append(Cell(run.name, MACRO, metric, macro_interval(own), sum(missing.values()), difference))
    return cells


def _tally(differences: Sequence[float], up: bool) -> tuple[int, int, int]:
    """Wins, ties, losses."""
    signs = [d if up else -d for d in differences]
    return sum(d > 0 for d in signs), sum(d == 0 for d in signs), sum(d < 0 for d in signs)


def _costs(run: Run) -> dict[str, Any]:
    """What the run's model reports about itself: tokens, requests, money, seconds, whatever there is."""
    out: dict[str, Any] = {"model": run.config.get("model")}
    for block in run.config.values():
        if isinstance(block, dict):
            out |= {k: v for k, v in block.items() if k in ("cost", "usage", "requests", "seconds", "unscored", "served_model")}
    return out
