"""Intervals and tests over documents, single and paired; over tasks for macro averages.

Everything here is a plain function of numbers. Random draws are seeded, so that the same scores give the same report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from lm_eval_softverb.errors import DataError

LEVEL = 0.95
RESAMPLES = 9999
_EXACT = 12  # up to so many non-zero differences all sign patterns are tried

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval over ``n`` documents."""

    value: float
    low: float
    high: float
    n: int


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of per-document scores: Wilson's interval when they are all 0 or 1, a bootstrap otherwise.

    Raises:
        DataError: no values.
    """
    x = np.asarray(values, dtype=float)
    if x.size == 0:
        raise DataError("There are no scored documents to take a mean of.")
    if np.isin(x, (0.0, 1.0)).all():
        ci = stats.binomtest(int(x.sum()), x.size).proportion_ci(LEVEL, method="wilson")
        return Interval(float(x.mean()), float(ci.low), float(ci.high), int(x.size))
    return _bootstrap(x)


def paired_interval(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Mean difference ``ours - theirs`` of two scores of the same documents, bootstrapped over documents.

    Raises:
        DataError: the two do not have the same length.
    """
    return _bootstrap(_differences(ours, theirs))


def paired_p(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, str]:
    """Two-sided p-value of "no difference" and the test's name.

    McNemar's exact test where all scores are 0 or 1; otherwise the sign-flip test of the mean difference: exact for up to
    twelve documents that differ, by 9,999 random patterns beyond (the observed one counts).

    Raises:
        DataError: the two do not have the same length, or are empty.
    """
    difference = _differences(ours, theirs)
    binary = bool(np.isin(np.asarray([*ours, *theirs], dtype=float), (0.0, 1.0)).all())
    if binary:
        wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
        return (float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0), "McNemar"
    return sign_flip_p(difference), "sign flip"


def sign_flip_p(difference: Sequence[float] | Array) -> float:
    """Two-sided p-value of a mean difference under random signs."""
    x = np.asarray(difference, dtype=float)
    x = x[x != 0]
    if x.size == 0:
        return 1.0
    observed = abs(x.sum()) * (1 - 1e-12)  # sums in another order may be a rounding smaller
    if x.size <= _EXACT:
        patterns = 1 - 2 * ((np.arange(2**x.size)[:, None] >> np.arange(x.size)) & 1)
        return float((abs(patterns @ x) >= observed).mean())
    rng, hits = np.random.default_rng(0), 0
    for size in _chunks(x.size):
        hits += int((abs(rng.choice((-1.0, 1.0), (size, x.size)) @ x) >= observed).sum())
    return (hits + 1) / (RESAMPLES + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment for several tests, in the order given (Holm 1979)."""
    order = np.argsort(p_values, kind="stable")
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * float(p_values[i])))
        adjusted[i] = running
    return adjusted


def macro_interval(scores: Mapping[str, Sequence[float]]) -> Interval:
    """Mean over tasks of each task's mean; ``n`` counts tasks. Differences of paired scores go in as scores.

    The bootstrap draws tasks first and then documents within each drawn task, since documents of one task are alike.

    Raises:
        DataError: no tasks, or one without documents.
    """
    if not scores or not all(len(values) for values in scores.values()):
        raise DataError("A macro average needs at least one task, and documents in each of them.")
    rng = np.random.default_rng(0)
    within = np.stack([_means(np.asarray(values, dtype=float), rng) for values in scores.values()], axis=1)
    tasks = within.shape[1]
    # A task drawn twice gets two different resamples of its documents.
    means = within[rng.integers(RESAMPLES, size=(RESAMPLES, tasks)), rng.integers(tasks, size=(RESAMPLES, tasks))].mean(axis=1)
    low, high = np.percentile(means, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    value = float(np.mean([np.mean(values) for values in scores.values()]))
    return Interval(value, float(low), float(high), tasks)


def _differences(ours: Sequence[float], theirs: Sequence[float]) -> Array:
    if len(ours) != len(theirs):
        raise DataError(f"Paired scores need the same documents: got {len(ours)} and {len(theirs)}.")
    if not len(ours):
        raise DataError("There are no scored documents to compare.")
    return np.asarray(np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float))


def _bootstrap(x: Array) -> Interval:
    if np.ptp(x) == 0:
        return Interval(float(x.mean()), float(x.mean()), float(x.mean()), int(x.size))
    ci = stats.bootstrap(
        (x,), np.mean, confidence_level=LEVEL, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return Interval(float(x.mean()), float(ci.low), float(ci.high), int(x.size))


def _means(x: Array, rng: np.random.Generator) -> Array:
    """Means of :data:`RESAMPLES` bootstrap samples."""
    return np.concatenate([x[rng.integers(x.size, size=(size, x.size))].mean(axis=1) for size in _chunks(x.size)])


def _chunks(width: int) -> list[int]:
    """Parts of :data:`RESAMPLES` that keep a matrix of draws under about 30 MB."""
    size = max(1, min(RESAMPLES, 4_000_000 // width))
    return [size] * (RESAMPLES // size) + ([RESAMPLES % size] if RESAMPLES % size else [])
