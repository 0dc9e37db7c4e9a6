"""Intervals against the same numbers computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lm_eval_softverb.compare.stats import mean_interval, paired_interval
from lm_eval_softverb.errors import DataError


def test_zero_one_scores_get_wilsons_interval():
    k, n, z = 46, 50, 1.959963984540054
    p = k / n
    centre, half = (p + z * z / (2 * n)), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    found = mean_interval([1.0] * k + [0.0] * (n - k))
    assert (found.value, found.n) == (p, n)
    assert found.low == pytest.approx((centre - half) / (1 + z * z / n))
    assert found.high == pytest.approx((centre + half) / (1 + z * z / n))
    assert mean_interval([1.0] * 10).low < 0.75  # never "certain" because all ten happened to be right


def test_bootstrap_interval_is_close_to_the_normal_one():
    x = np.random.default_rng(1).normal(0.4, 0.2, 400)
    found = mean_interval(list(x))
    se = x.std(ddof=1) / 20
    assert found.low == pytest.approx(x.mean() - 1.96 * se, abs=0.2 * se)
    assert found.high == pytest.approx(x.mean() + 1.96 * se, abs=0.2 * se)


def test_pairing_takes_out_what_documents_have_in_common():
    difficulty = np.random.default_rng(2).normal(0, 1, 100)
    noise = np.random.default_rng(3).normal(0.1, 0.05, 100)
    found = paired_interval(list(difficulty + noise), list(difficulty))
    assert found.low > 0.05
    assert found.high - found.low < 0.05


def test_degenerate_and_wrong_input():
    same = paired_interval([0.5, 0.5], [0.5, 0.5])
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    with pytest.raises(DataError, match="2 and 1"):
        paired_interval([1.0, 0.0], [1.0])
    with pytest.raises(DataError):
        mean_interval([])
