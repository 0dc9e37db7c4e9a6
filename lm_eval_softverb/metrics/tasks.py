"""What the ``verbalize_*`` tasks call: scores of one document, and of the whole corpus.

Values of corpus metrics are pairs (ground truth, prediction) until all documents are done. Aggregations are plain functions:
the harness writes their source code into the results.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval_softverb.metrics import similarity
from lm_eval_softverb.metrics.labels import first_part, label_scores, phrase_scores
from lm_eval_softverb.metrics.ranks import Kind, mean_percentile_ranks, percentile_rank
from lm_eval_softverb.metrics.rouge import rouge_l

Pair = tuple[str, str]
CORPUS = ("mpr_pred", "mpr_gold", "mpr_pred_half", "mpr_gold_half")


def labels(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """All scores of a text that should name a label set."""
    text, gold = results[0], list(doc["labels"])
    return {
        **label_scores(text, gold),
        "phrase_f1": phrase_scores(text, gold)["f1"],
        "recall_first_part": label_scores(first_part(text), gold)["recall"],
        **_similarities(doc["target"], text, "labels"),
    }


def instructions(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """All scores of a text that should state an instruction."""
    return _similarities(doc["target"], results[0], "instructions")


def _similarities(gold: str, text: str, kind: Kind) -> dict[str, Any]:
    rows = similarity.embed([gold, text])
    encoder = similarity.default()
    return {
        "rouge_l": rouge_l(text, gold),
        "cosine": float(similarity.cosines(rows[:1], rows[1:])[0, 0]),
        "percentile_rank": percentile_rank(gold, text, kind),
        # Share of documents whose cosine is that of beginnings only.
        "cosine_of_cut_text": float(encoder.cut(gold) or encoder.cut(text)),
        **dict.fromkeys(CORPUS, (gold, text)),
    }


def mpr_pred(pairs: Sequence[Pair]) -> float:
    return _corpus(pairs)["mpr_pred"]


def mpr_gold(pairs: Sequence[Pair]) -> float:
    return _corpus(pairs)["mpr_gold"]


def mpr_pred_half(pairs: Sequence[Pair]) -> float:
    return _corpus(pairs)["mpr_pred_half"]


def mpr_gold_half(pairs: Sequence[Pair]) -> float:
    return _corpus(pairs)["mpr_gold_half"]


def _corpus(pairs: Sequence[Pair]) -> dict[str, float]:
    return _ranks(tuple((gold, text) for gold, text in pairs))


@functools.lru_cache(maxsize=2)  # the four aggregations of a task get the same pairs
def _ranks(pairs: tuple[Pair, ...]) -> dict[str, float]:
    rows = similarity.embed([*(gold for gold, _ in pairs), *(text for _, text in pairs)])
    return mean_percentile_ranks(similarity.cosines(rows[: len(pairs)], rows[len(pairs) :]))
