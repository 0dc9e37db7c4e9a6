"""ROUGE-L of one text against one reference."""

from __future__ import annotations

import functools
from typing import Any


def rouge_l(prediction: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words, Porter stemmer on, as ``rouge_score`` computes it.

    Stemming makes "positive" and "positivity" one word, which changes label tasks a lot. Words are runs of a–z and 0–9:
    texts in other scripts score 0. So does an empty text.
    """
    return float(_scorer().score(reference, prediction)["rougeL"].fmeasure)


@functools.cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)
