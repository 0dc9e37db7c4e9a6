"""Texts that fill the slot of a bank's prompts without any model: lines for ``prompt_file=`` and, of answers, for replay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm_eval_softverb.bank import Bank
from lm_eval_softverb.data import shots as rows
from lm_eval_softverb.data.verbalization import another, truths
from lm_eval_softverb.metrics.dod import open_with

Line = dict[str, Any]


def gold(bank: Bank, dod: str | None = None) -> list[Line]:
    """The ground truth; see :func:`~lm_eval_softverb.data.verbalization.truths`."""
    return _lines("gold", {name: text for name, (_, text) in truths(bank, dod).items()})


def other(bank: Bank, seed: int = 0, dod: str | None = None) -> list[Line]:
    """The ground truth of another prompt; see :func:`~lm_eval_softverb.data.verbalization.another`."""
    return _lines("other", {name: text for name, (_, text) in another(truths(bank, dod), seed).items()}, seed=seed)


def shots(bank: Bank, k: int, seed: int = 0, dod: str | None = None) -> list[Line]:
    """``k`` training rows as examples; see :func:`~lm_eval_softverb.data.shots.draw`."""
    found = rows.training_rows(bank, dod, open_with).items()
    return _lines("shots", {name: rows.as_text(rows.draw(own, k, seed, name)) for name, own in found}, shots=k, seed=seed)


def majority(bank: Bank, dod: str | None = None) -> list[Line]:
    """The most frequent output of the training rows: an answer, not a prompt."""
    return _lines("majority", {name: rows.majority(own) for name, own in rows.training_rows(bank, dod, open_with).items()})


def _lines(method: str, texts: Mapping[str, str], **settings: Any) -> list[Line]:
    return [{"prompt_id": name, "text": text, "rank": 0, "method": method, **settings} for name, text in texts.items()]
