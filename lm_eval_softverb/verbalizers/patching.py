"""Patching soft prompts into a target prompt, many layer pairs at once and exactly (InSPEcT; Patchscopes).

A **patch** takes the residual stream of a soft prompt after layer ``source`` and puts it in place of the stream at the
target prompt's placeholders after layer ``target``; then the model writes on greedily. The placeholders come last in the
target prompt and a patch after layer t leaves all layers up to t unchanged, so many patches share nearly everything:

1. the keys and values of the words in front of the placeholders are computed once;
2. one pass over the soft prompts gives their stream after every layer;
3. in one pass over the placeholders, rows join the batch half-way: after layer t those of all patches with that target;
4. all patches decode together, one forward pass per token.

:func:`sequential` does the same one patch at a time through transformers' own ``generate``; it is the oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lm_eval_softverb.backbone import Backbone, Prefix
from lm_eval_softverb.batching import Counters, halving
from lm_eval_softverb.decoding import BufferedLayer, decode, eos_ids, generate_stock, kv_bytes
from lm_eval_softverb.errors import ConfigError
from lm_eval_softverb.residual import editing

CHUNK_BUDGET = 1 << 30  # bytes of keys and values of the patches that are worked on together; twice that is no faster


@dataclass(frozen=True)
class Patch:
    """Which soft prompt's stream after which layer replaces the placeholders' after which layer; layers from -1 to L - 2."""

    prompt: int
    source: int
    target: int


@dataclass(frozen=True)
class Continuation:
    """What was written for one patch.

    Attributes:
        ids: new tokens, without the end-of-sequence id.
        log_probability: of these (and the end-of-sequence id where there is one), summed; 0 where not asked for.
        stopped: whether it ended by itself rather than at the limit.
    """

    ids: tuple[int, ...]
    log_probability: float = 0.0
    stopped: bool = False


class _JoiningLayer(BufferedLayer):
    """Keys and values of a batch that grows from layer to layer.

    Row 0 is the target prompt unpatched. A patch that joins after this layer has, here, that row's keys and values.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        here = key_states.shape[0]
        self.part = slice(0, here)
        start = self.length
        out = super().update(key_states, value_states, *args, **kwargs)
        self._k[here:, :, start : self.length] = key_states[:1]
        self._v[here:, :, start : self.length] = value_states[:1]
        return out

    def leave_unpatched(self) -> None:
        """Drops row 0; from here on a layer like any other."""
        self._k, self._v = self._k[1:], self._v[1:]
        self.rows -= 1


def target_prefix(backbone: Backbone, ids: Sequence[int]) -> Prefix:
    """Keys and values of the target prompt's words, whole also where layers attend to a window only.

    Raises:
        ConfigError: the architecture keeps other state than keys and values.
    """
    kinds = {type(layer) for layer in DynamicCache(config=backbone.model.config).layers}
    if not backbone.has_keys or not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        raise ConfigError(f"{backbone.name} ({type(backbone.model).__name__}) keeps no keys and values; patching needs them.")
    cache = DynamicCache(config=backbone.model.config)
    cache.layers = [DynamicLayer() for _ in cache.layers]
    embeds = backbone.embedding(backbone.tensor([list(ids)]))
    with torch.no_grad():
        backbone.logits(embeds, torch.zeros(1, len(ids), dtype=torch.bool), cache=cache)
    layers: list[Any] = cache.layers
    return Prefix(tuple((layer.keys, layer.values) for layer in layers), len(ids))


def together(
    backbone: Backbone,
    streams: Tensor,
    patches: Sequence[Patch],
    prefix: Prefix,
    placeholders: Tensor,
    *,
    max_new_tokens: int,
    rows: int | None = None,
    score: bool = False,
    counters: Counters | None = None,
    done: Callable[[int], None] = lambda _count: None,
) -> list[Continuation]:
    """The continuation of every patch by the fast algorithm.

    Args:
        streams: of the soft prompts, [L, prompts, n, d]; index 0 is the stream after layer -1.
        prefix: see :func:`target_prefix`.
        placeholders: their input embeddings [n, d].
        rows: patches to work on together; by default as many as :data:`CHUNK_BUDGET` holds. Halved when memory runs out.
        score: also report log-probabilities.
        done: told the number of patches each time some are finished.
    """
    length = prefix.length + placeholders.shape[0] + max_new_tokens
    size = rows or max(1, CHUNK_BUDGET // kv_bytes(backbone, length))
    # By target: a chunk then runs the lower layers, which its patches share, for one row.
    order = sorted(range(len(patches)), key=lambda i: (patches[i].target, patches[i].source, patches[i].prompt))
    out: dict[int, Continuation] = {}

    def run(chunk: Sequence[int]) -> list[tuple[int, Continuation]]:
        found = _chunk(backbone, streams, [patches[i] for i in chunk], prefix, placeholders, max_new_tokens, score)
        return list(zip(chunk, found, strict=True))

    for start in range(0, len(order), size):
        chunk = order[start : start + size]
        out.update(halving(run, chunk, counters or Counters()))
        done(len(chunk))
    return [out[i] for i in range(len(patches))]


@torch.no_grad()
def _chunk(
    backbone: Backbone,
    streams: Tensor,
    patches: Sequence[Patch],
    prefix: Prefix,
    placeholders: Tensor,
    max_new_tokens: int,
    score: bool,
) -> list[Continuation]:
    """Patches in the order of their targets: one staggered pass over the placeholders, then one pass per new token."""
    n, rows = placeholders.shape[0], len(patches) + 1
    cache = DynamicCache(config=backbone.model.config)
    layers = [_JoiningLayer(rows, prefix.length + n + max_new_tokens) for _ in cache.layers]
    cache.layers = list(layers)
    for index, (keys, values) in enumerate(prefix.layers):
        cache.update(keys, values, index)  # one row; the layer gives it to all

    def join(layer: int, stream: Tensor) -> Tensor:
        joining = [p for p in patches if p.target == layer]
        if not joining:
            return stream
        index = torch.tensor([(p.source + 1, p.prompt) for p in joining], device=streams.device)
        return torch.cat([stream, streams[index[:, 0], index[:, 1]].to(stream)])

    keep = torch.zeros(rows, n, dtype=torch.bool)
    keep[1:, -1] = True
    positions = torch.arange(prefix.length, prefix.length + n, device=backbone.device)[None]
    with editing(backbone, join):
        logits = backbone.logits(placeholders[None].to(backbone.dtype), keep, cache=cache, position_ids=positions)
    for layer in layers:
        layer.leave_unpatched()
        layer.begin(slice(0, len(patches)), prefix.length + n)
    last = positions[:, -1:].expand(len(patches), 1)
    none = streams.new_zeros(0, streams.shape[-1])
    answers, sums = decode(backbone, none, cache, logits, last, max_new_tokens=max_new_tokens, score=score)
    return [Continuation(tuple(a), s, len(a) < max_new_tokens) for a, s in zip(answers, sums, strict=True)]


@torch.no_grad()
def sequential(
    backbone: Backbone,
    streams: Tensor,
    patches: Sequence[Patch],
    words: Sequence[int],
    placeholders: Tensor,
    *,
    max_new_tokens: int,
    done: Callable[[int], None] = lambda _count: None,
) -> list[Continuation]:
    """One patch at a time: the whole target prompt ``words`` + placeholders, overwritten after one layer, then ``generate``."""
    n, eos = placeholders.shape[0], eos_ids(backbone)
    ids = [*words, *(-1 - i for i in range(n))]
    out = []
    for patch in patches:
        overwrite = partial(_overwrite, patch=patch, stream=streams[patch.source + 1, patch.prompt], length=len(ids))
        with editing(backbone, overwrite):
            new = generate_stock(backbone, placeholders, [ids], max_new_tokens=max_new_tokens, do_sample=False)[0]
        end = next((i for i, token in enumerate(new) if token in eos), len(new))
        out.append(Continuation(tuple(new[:end]), stopped=end < max_new_tokens))
        done(1)
    return out


def _overwrite(layer: int, hidden: Tensor, *, patch: Patch, stream: Tensor, length: int) -> Tensor:
    if layer != patch.target or hidden.shape[1] != length:  # a later token passes by
        return hidden
    return torch.cat([hidden[:, : -stream.shape[0]], stream[None].to(hidden)], dim=1)
