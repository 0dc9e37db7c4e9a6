"""How much of a label set a text names: recall, precision and F1 over words, and over phrases (arXiv 2605.27642).

Words follow the paper's code, so that its printed numbers come out: ASCII punctuation is deleted ("a-b" becomes "ab"),
case is folded, white space separates. A label of several words can never be found that way; phrases are for those.
"""

from __future__ import annotations

import re
import string
from collections.abc import Collection, Iterable

from lm_eval_softverb.errors import DataError

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PHRASE_ENDS = re.compile(r"[,;|\n\r•‣·▪●]|^\s*(?:[-*–]|\d+[.)])\s", re.MULTILINE)
_AND = re.compile(r"\s+and\s+|^\s*and\s+", re.IGNORECASE)


def label_scores(prediction: str, labels: Collection[str]) -> dict[str, float]:
    """Word-level ``recall`` (the paper's class rate), ``precision`` and ``f1`` of a text against a label set.

    A text without words scores 0.

    Raises:
        DataError: no labels, or a blank one.
    """
    _check(labels)
    return _scores(set(_plain(prediction).split()), {label.lower().strip() for label in labels})


def phrase_scores(prediction: str, labels: Collection[str]) -> dict[str, float]:
    """The same scores over whole phrases, for labels of several words; both sides lose punctuation and case.

    Phrases end at commas, semicolons, bars, line breaks, bullets and "and"; a label that has an "and" inside stays whole.

    Raises:
        DataError: no labels, or a blank one.
    """
    _check(labels)
    gold = set(_phrases(labels))
    found = set()
    for part in _PHRASE_ENDS.split(prediction):
        whole = set(_phrases([part]))
        found |= whole if whole <= gold else set(_phrases(_AND.split(part)))
    return _scores(found, gold)


def first_part(text: str) -> str:
    """``text`` up to its first "|" or line break: what came before a model went on to invent more examples (InSPEcT).

    Blanks and line breaks in front do not count.
    """
    return re.split(r"[|\n\r]", text.strip(), maxsplit=1)[0].strip()


def _plain(text: str) -> str:
    return text.translate(_PUNCTUATION).lower()


def _phrases(texts: Iterable[str]) -> list[str]:
    """Normal forms, blanks collapsed; what is empty then is no phrase."""
    return [phrase for text in texts if (phrase := " ".join(_plain(text).split()))]


def _scores(found: set[str], gold: set[str]) -> dict[str, float]:
    hits = len(found & gold)
    return {
        "recall": hits / len(gold) if gold else 0.0,
        "precision": hits / len(found) if found else 0.0,
        "f1": 2 * hits / (len(gold) + len(found)) if gold or found else 0.0,
    }


def _check(labels: Collection[str]) -> None:
    if isinstance(labels, str) or not labels or not all(isinstance(label, str) and label.strip() for label in labels):
        raise DataError(
            f"The label set is {labels!r}, expected at least one label, none of them blank. Check the ground truth."
        )
