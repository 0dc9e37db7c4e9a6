"""What methods that write answers share: which samples are the same answer, and how sure the model is of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lm_eval_softverb import storage
from lm_eval_softverb.backbone import Backbone

T = TypeVar("T")


def pooled(samples: Sequence[T], text: Callable[[T], str]) -> list[list[T]]:
    """Samples by answer, the most frequent first: texts that differ in case, blanks or outer punctuation only are one."""
    pools: dict[str, list[T]] = {}
    for sample in samples:
        pools.setdefault(normalised(text(sample)), []).append(sample)
    return sorted(pools.values(), key=len, reverse=True)


def normalised(text: str) -> str:
    """What two samples must share to be the same answer."""
    return " ".join(text.casefold().split()).strip(" .,;:!\"'")


def without_order(shares: Mapping[str, float], key: str) -> dict[str, float]:
    """The most frequent answer first, and those of one share in an order that has nothing to do with where they come from."""
    return {text: shares[text] for text in sorted(shares, key=lambda text: (-shares[text], storage.seed_from(key, text)))}


@torch.no_grad()
def confidences(
    backbone: Backbone, rows: Tensor, contexts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[float]:
    """exp(mean log-probability) of the tokens of each answer, by one pass over all of it; 0 for an empty one."""
    ids = backbone.tensor([[*context, *answer[:-1]] for context, answer in zip(contexts, answers, strict=True)])
    keep = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (context, answer) in enumerate(zip(contexts, answers, strict=True)):
        keep[row, len(context) - 1 : len(context) - 1 + len(answer)] = True
    logits = backbone.logits(backbone.embed(ids, rows), keep).split([len(answer) for answer in answers])
    return [
        float(part.float().log_softmax(-1).gather(1, backbone.tensor([answer]).T).mean().exp()) if answer else 0.0
        for part, answer in zip(logits, answers, strict=True)
    ]
