"""How requests become batches: longest first, by size or token budget, halved when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

# A batch of about this many tokens keeps matrix products large and activations small; used for batch_size=auto.
TOKEN_BUDGET = 4096
MAX_ROWS = 64


@dataclass
class Counters:
    """What happened on the way, reported in the results; nothing is truncated or retried silently."""

    truncated: int = 0
    out_of_memory: int = 0
    prefix_tokens: int = 0
    from_cache: int = 0
    system_folded: int = 0


def leading_virtual(ids: Sequence[int]) -> tuple[int, ...]:
    """Ids up to and including the last virtual one that stands before the text, i.e. what identifies the prompt."""
    end = 0
    for i, token in enumerate(ids):
        if token < 0:
            end = i + 1
        elif i > end + 1:  # one BOS may stand before the prompt
            break
    return tuple(ids[:end])


def shared_length(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest common prefix."""
    ordered = sorted(map(tuple, sequences))
    low, high = ordered[0], ordered[-1]
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))


def batches(items: Sequence[T], length: Callable[[T], int], size: int | None) -> Iterator[list[T]]:
    """Longest first. ``size`` rows each, or, with None, at most :data:`TOKEN_BUDGET` padded tokens."""
    batch: list[T] = []
    limit = 0
    for item in sorted(items, key=length, reverse=True):
        if not batch:
            limit = size or max(1, min(MAX_ROWS, TOKEN_BUDGET // max(1, length(item))))
        batch.append(item)
        if len(batch) == limit:
            yield batch
            batch = []
    if batch:
        yield batch


def halving(run: Callable[[Sequence[T]], list[R]], batch: Sequence[T], counters: Counters) -> list[R]:
    """``run(batch)``; when memory runs out, the two halves one after the other. A single item that fails raises."""
    try:
        return run(batch)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or len(batch) == 1:
            raise
        counters.out_of_memory += 1
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = len(batch) // 2
    return halving(run, batch[:middle], counters) + halving(run, batch[middle:], counters)


def is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "can't allocate memory" in text
