"""Percentile ranks: against loops that say what is counted, chance, ties, and the pool itself."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lm_eval_softverb.errors import ConfigError, DataError
from lm_eval_softverb.metrics import ranks, similarity
from lm_eval_softverb.metrics.ranks import half_tied_share, mean_percentile_ranks, percentile_rank, pool, pool_version

SQUARE = st.integers(1, 6).flatmap(lambda n: arrays(np.float64, (n, n), elements=st.sampled_from([-0.5, 0.0, 0.25, 0.5, 1.0])))


def loops(c) -> dict[str, float]:
    """The slow twin: every comparison by itself."""
    n = len(c)
    points = dict.fromkeys(("mpr_pred", "mpr_gold", "mpr_pred_half", "mpr_gold_half"), Fraction(0))
    for mine in range(n):
        for other in range(n):
            for name, rival in (("mpr_pred", c[other, mine]), ("mpr_gold", c[mine, other])):
                points[name] += c[mine, mine] >= rival
                if other != mine:
                    points[f"{name}_half"] += Fraction(2 * (c[mine, mine] > rival) + (c[mine, mine] == rival), 2)
    pairs = n * (n - 1)
    return {
        k: float(v / (pairs if k.endswith("half") else n * n)) if pairs or "half" not in k else 0.5 for k, v in points.items()
    }


@settings(deadline=None)
@given(SQUARE)
def test_mpr_equals_the_loops(c):
    assert mean_percentile_ranks(c) == pytest.approx(loops(c))


@settings(deadline=None)
@given(SQUARE)
def test_gold_and_pred_are_each_others_mirror(c):
    ours, mirror = mean_percentile_ranks(c), mean_percentile_ranks(c.T)
    assert ours["mpr_pred"] == mirror["mpr_gold"]
    assert ours["mpr_pred_half"] == mirror["mpr_gold_half"]


def test_a_constant_prediction_is_chance_without_self_and_perfect_in_the_papers_code():
    c = np.repeat(np.array([[0.1], [0.5], [0.3]]), 3, axis=1)
    found = mean_percentile_ranks(c)
    assert found["mpr_gold"] == 1.0
    assert found["mpr_gold_half"] == found["mpr_pred_half"] == 0.5
    assert found["mpr_pred"] == pytest.approx(2 / 3)


def test_perfect_reversed_and_single():
    assert mean_percentile_ranks(np.eye(4)) == dict.fromkeys(("mpr_pred", "mpr_gold", "mpr_pred_half", "mpr_gold_half"), 1.0)
    worst = mean_percentile_ranks(-np.eye(4))
    assert worst["mpr_pred_half"] == worst["mpr_gold_half"] == 0.0
    assert worst["mpr_pred"] == 0.25
    assert mean_percentile_ranks(np.ones((1, 1)))["mpr_pred_half"] == 0.5


@settings(deadline=None)
@given(st.floats(-1, 1), arrays(np.float64, st.integers(0, 8), elements=st.floats(-1, 1)))
def test_half_tied_share_equals_a_loop(value, others):
    points = [1.0 if value > o else 0.5 if value == o else 0.0 for o in others]
    assert half_tied_share(value, others) == pytest.approx(sum(points) / len(points) if points else 0.5)


TEXTS = ("red blue", "one two", "cat dog", "red green", "one two")


@pytest.fixture
def small_pool(monkeypatch):
    monkeypatch.setattr(ranks, "pool", lambda kind: TEXTS)


@pytest.mark.parametrize("gold", ["red blue", "blue sky", "one two"])
@pytest.mark.parametrize("prediction", ["red blue", "blue", "one", "", "cat dog"])
def test_percentile_rank_equals_a_loop(hashing, small_pool, gold, prediction):
    def cos(a, b):
        x, y = similarity.embed([a])[0].astype(float), similarity.embed([b])[0].astype(float)
        return round(float(x @ y), 6)

    others = [p for p in TEXTS if p != gold]
    own = cos(gold, prediction)
    points = sum(1.0 if own > cos(p, prediction) else 0.5 if own == cos(p, prediction) else 0.0 for p in others)
    assert percentile_rank(gold, prediction, "labels") == pytest.approx(points / len(others))


def test_the_gold_text_itself_ranks_first_and_another_pool_text_does_not(hashing, small_pool):
    assert percentile_rank("red blue", "red blue", "labels") == 1.0
    assert percentile_rank("red blue", "cat dog", "labels") < 1.0


def test_chance_is_one_half(hashing):
    """Over all pairs of pool texts: a prediction that has nothing to do with the ground truth wins half of the time."""
    texts = pool("labels")
    scores = [percentile_rank(gold, prediction, "labels") for gold in texts[:30] for prediction in texts[-30:]]
    assert np.mean(scores) == pytest.approx(0.5, abs=0.05)


# --- the pool itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["labels", "instructions"])
def test_the_shipped_pool(kind):
    texts = pool(kind)
    assert len(texts) >= 90
    assert len(set(texts)) == len(texts)
    if kind == "labels":
        assert all(", " in text for text in texts)
    rows = [json.loads(line) for line in ranks.POOL.read_text("utf-8").splitlines()]
    assert len(rows) == len(pool("labels")) + len(pool("instructions"))


def test_the_tasks_record_the_version_of_the_pool():
    """Change the pool and its version in the tasks together: ranks against two pools do not compare."""
    from lm_eval_softverb.plugin import task_dir

    recorded = (task_dir() / "verbalize" / "_verbalize_yaml").read_text("utf-8")
    assert f'rank_pool: "{pool_version()}"' in recorded


def test_an_unknown_kind_is_named():
    with pytest.raises(ConfigError, match="'labels'"):
        pool("label")


@pytest.mark.parametrize(
    "row",
    [
        {"kind": "labels", "labels": []},
        {"kind": "labels", "labels": ["a", ""]},
        {"kind": "labels", "labels": "a"},
        {"kind": "labels", "text": "a"},
        {"kind": "instructions", "text": " "},
        {"kind": "instructions", "labels": ["a"]},
        {"kind": "other", "text": "a"},
        {"text": "a"},
    ],
)
def test_a_line_of_the_pool_that_cannot_be_used_is_named(tmp_path, monkeypatch, row):
    good = {"kind": "instructions", "text": "Add."}
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (good, row)))
    monkeypatch.setattr(ranks, "POOL", tmp_path / "pool.jsonl")
    with pytest.raises(DataError, match=r"pool\.jsonl:2"):
        pool.__wrapped__("instructions")
