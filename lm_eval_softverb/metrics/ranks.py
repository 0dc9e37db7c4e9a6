"""Percentile ranks: is a text closer to its own ground truth than to others'?

Per document against a fixed pool of texts (``pool.jsonl``, written for this project), so that the score of a document
depends on no other document and has a standard error. For a whole corpus against its own texts: MPR (arXiv 2605.27642).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from lm_eval_softverb.errors import ConfigError, DataError, did_you_mean
from lm_eval_softverb.metrics import similarity
from lm_eval_softverb.storage import read_jsonl, sha256_file

POOL = Path(__file__).with_name("pool.jsonl")
Kind = Literal["labels", "instructions"]
KINDS: tuple[str, ...] = get_args(Kind)
CHANCE = 0.5


def pool_version() -> str:
    """Identifies the pool: the first twelve digits of its file's SHA-256. Ranks against two pools do not compare."""
    return sha256_file(POOL)[:12]


@functools.cache
def pool(kind: Kind) -> tuple[str, ...]:
    """The pool's texts of one kind; a label set is its labels joined by ", ".

    Raises:
        ConfigError: an unknown kind.
        DataError: a line of the pool that cannot be used, with ``file:line``.
    """
    if kind not in KINDS:
        raise ConfigError(f"There is no pool of {kind!r}. {did_you_mean(str(kind), list(KINDS))}")
    rows = [(row.get("kind"), _text(number, row)) for number, row in read_jsonl(POOL)]
    return tuple(text for own, text in rows if own == kind)


def _text(number: int, row: dict[str, Any]) -> str:
    match row:
        case {"kind": "instructions", "text": str(text)} if text.strip():
            return text
        case {"kind": "labels", "labels": [*labels]} if labels and all(isinstance(x, str) and x.strip() for x in labels):
            return ", ".join(labels)
    raise DataError(f"{POOL}:{number}: expected kind 'labels' with 'labels' or kind 'instructions' with 'text', got {row}.")


def percentile_rank(gold: str, prediction: str, kind: Kind) -> float:
    """Share of the pool's texts that are further from the prediction than the ground truth is; ties count 1/2.

    1 is best, 0.5 is chance. A pool text equal to the ground truth is left out.
    """
    others = [text for text in pool(kind) if text != gold]
    rows = similarity.embed([prediction, gold, *others])
    own, *rest = similarity.cosines(rows[1:], rows[:1])[:, 0]
    return half_tied_share(own, np.asarray(rest))


def half_tied_share(value: float, others: npt.NDArray[np.float64]) -> float:
    """Share of ``others`` [K] below ``value``, ties as 1/2; chance for no others."""
    return float(np.mean((value > others) + 0.5 * (value == others))) if len(others) else CHANCE


def mean_percentile_ranks(cosines: npt.NDArray[np.float64]) -> dict[str, float]:
    """MPR of a corpus from ``cosines`` [N, N], ground truths in rows and predictions in columns.

    Returns:
        ``mpr_pred``: among all ground truths, how high a prediction's own ranks (the paper's text); ``mpr_gold``: among all
        predictions, how high a ground truth's own ranks (the paper's code). Both count a pair against itself and ties as won,
        so a constant prediction has an ``mpr_gold`` of 1. The ``_half`` variants leave the pair itself out and count ties
        1/2: chance is exactly .5, also for one document.
    """
    own = np.diag(cosines)
    n = len(own)
    won = {"mpr_pred": own[None, :] - cosines, "mpr_gold": own[:, None] - cosines}
    plain = {name: float(np.mean(gap >= 0)) for name, gap in won.items()}
    # The diagonal is always a tie: its half point is taken out again.
    points = {name: float(np.sum((gap > 0) + 0.5 * (gap == 0))) - 0.5 * n for name, gap in won.items()}
    return plain | {f"{name}_half": total / (n * (n - 1)) if n > 1 else CHANCE for name, total in points.items()}
