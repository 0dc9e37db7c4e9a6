"""Intervals over documents, single and paired."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from lm_eval_softverb.errors import DataError

LEVEL = 0.95
_RESAMPLES = 9999


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
    if len(ours) != len(theirs):
        raise DataError(f"Paired scores need the same documents: got {len(ours)} and {len(theirs)}.")
    return _bootstrap(np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float))


def _bootstrap(x: np.ndarray) -> Interval:
    if x.size == 0:
        raise DataError("There are no scored documents to compare.")
    if np.ptp(x) == 0:
        return Interval(float(x.mean()), float(x.mean()), float(x.mean()), int(x.size))
    ci = stats.bootstrap(
        (x,), np.mean, confidence_level=LEVEL, n_resamples=_RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return Interval(float(x.mean()), float(ci.low), float(ci.high), int(x.size))
