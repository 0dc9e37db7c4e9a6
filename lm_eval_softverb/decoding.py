"""Generation from rows of real and virtual tokens: one prefix for all rows, finished rows leave the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList
from transformers.cache_utils import DynamicLayer

from lm_eval_softverb.backbone import Backbone, Prefix

MAX_ROWS = 64
KV_BUDGET = 128 << 20  # bytes
# Finished rows leave the cache when this share is left: leaving copies the keys and values of all others.
KEEP = 0.75


@dataclass(frozen=True)
class Sampling:
    """Decoding settings with the names and meanings of transformers' ``GenerationConfig``; the default is greedy."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0

    @classmethod
    def known(cls) -> frozenset[str]:
        return frozenset(f.name for f in fields(cls))

    @classmethod
    def of(cls, model_config: Any, settings: Mapping[str, Any]) -> Sampling:
        """``settings`` over the model's own generation defaults, as ``model.generate`` would combine them."""
        values = {name: getattr(model_config, name, None) for name in cls.known()} | dict(settings)
        given = {name: value for name, value in values.items() if value is not None}
        if "do_sample" not in settings:
            given["do_sample"] = bool(settings.get("temperature"))
        return cls(**given)

    def processors(self) -> LogitsProcessorList:
        from transformers.generation import logits_process as lp

        out = LogitsProcessorList()
        if self.repetition_penalty != 1.0:
            out.append(lp.RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.no_repeat_ngram_size > 0:
            out.append(lp.NoRepeatNGramLogitsProcessor(self.no_repeat_ngram_size))
        if self.do_sample:
            if self.temperature != 1.0:
                out.append(lp.TemperatureLogitsWarper(self.temperature))
            if self.top_k > 0:
                out.append(lp.TopKLogitsWarper(self.top_k))
            if self.top_p < 1.0:
                out.append(lp.TopPLogitsWarper(self.top_p))
            if self.min_p > 0.0:
                out.append(lp.MinPLogitsWarper(self.min_p))
            if self.typical_p < 1.0:
                out.append(lp.TypicalLogitsWarper(self.typical_p))
        return out

    @property
    def reads_text(self) -> bool:
        return self.repetition_penalty != 1.0 or self.no_repeat_ngram_size > 0


class BufferedLayer(DynamicLayer):
    """A cache layer with room for the whole generation: appending a token copies that token, not everything before it.

    Its rows can be filled a few at a time (:meth:`begin`), so that many rows decode together after prefilling in parts.
    """

    def __init__(self, rows: int, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.rows = rows
        self.length = 0
        self.part = slice(0, rows)

    def begin(self, part: slice, length: int = 0) -> None:
        """From now on only the rows of ``part`` are seen, which hold ``length`` tokens."""
        self.part, self.length = part, length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            _, heads, _, size = key_states.shape
            self._k = key_states.new_empty(self.rows, heads, self.capacity, size)
            self._v = value_states.new_empty(self.rows, heads, self.capacity, value_states.shape[-1])
        start, self.length = self.length, self.length + key_states.shape[-2]
        self._k[self.part, :, start : self.length] = key_states
        self._v[self.part, :, start : self.length] = value_states
        self.keys, self.values = self._k[self.part, :, : self.length], self._v[self.part, :, : self.length]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length

    def batch_select_indices(self, indices: Tensor) -> None:
        self._k, self._v = self._k[indices], self._v[indices]
        self.rows = len(indices)
        self.part = slice(0, self.rows)


def decode_rows(backbone: Backbone, rows: int, length: int) -> int:
    """How many rows of ``length`` tokens to decode together when ``rows`` are prefilled at a time.

    One decoding step reads all weights whatever the number of rows, so more rows cost little; what they need is room for
    keys and values, of which at most :data:`KV_BUDGET` bytes are taken beyond what ``rows`` need anyway.
    """
    if not backbone.gaps_are_harmless:  # layers that forget cannot be filled in parts
        return rows
    return max(rows, min(4 * rows, MAX_ROWS, KV_BUDGET // kv_bytes(backbone, length)))


def kv_bytes(backbone: Backbone, length: int) -> int:
    """Bytes that the keys and values of one row of ``length`` tokens take."""
    config = backbone.text_config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size * length * backbone.embedding.weight.element_size())


@torch.no_grad()
def generate(
    backbone: Backbone,
    rows: Tensor,
    contexts: Sequence[Sequence[int]],
    *,
    prefix: Prefix | None = None,
    prefill_rows: int | None = None,
    max_new_tokens: int,
    finished: Callable[[list[int]], bool],
    sampling: Sampling = Sampling(),
    seeds: Sequence[int] | None = None,
) -> list[list[int]]:
    """Continues each context (ids, virtual ones included) of a causal model.

    Every row gets the answer it would get alone: padding is masked and positions count real tokens only; with sampling
    each row has its own random stream, ``seeds[i]``.

    Args:
        prefix: keys and values of the first ``prefix.length`` ids, which all contexts share.
        prefill_rows: contexts to read at a time (see :func:`decode_rows`); None reads all at once.
        finished: told the new ids of a row after each step; true ends the row (its last id included in the answer).

    Returns:
        New ids per row; an end-of-sequence id ends a row and is not included.
    """
    if not backbone.gaps_are_harmless and len({len(c) for c in contexts}) > 1:
        prefix = None
    skip = prefix.length if prefix else 0
    places: dict[tuple[int, ...], int] = {}  # contexts that several rows share are read once
    shared = [places.setdefault(tuple(c), len(places)) for c in contexts]
    suffixes = [list(c[skip:]) for c in places]
    ids = backbone.tensor(suffixes, left=True)
    batch = len(suffixes)
    real = backbone.tensor([[1] * len(s) for s in suffixes], left=True)
    mask = torch.cat([real.new_ones(batch, skip), real], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, skip:]
    cache, logits = _prefill(backbone, rows, prefix, ids, mask, positions, prefill_rows or batch, max_new_tokens)
    if batch < len(contexts):
        select = torch.tensor(shared, device=logits.device)
        cache.batch_select_indices(select)
        logits, mask, positions = logits[select], mask[select], positions[select]
    return decode(  # type: ignore[no-any-return]
        backbone,
        rows,
        cache,
        logits,
        positions[:, -1:],
        mask=mask,
        max_new_tokens=max_new_tokens,
        finished=finished,
        sampling=sampling,
        seeds=seeds,
        contexts=contexts,
    )[0]


@torch.no_grad()
def decode(
    backbone: Backbone,
    rows: Tensor,
    cache: DynamicCache,
    logits: Tensor,
    positions: Tensor,
    *,
    mask: Tensor | None = None,
    max_new_tokens: int,
    finished: Callable[[list[int]], bool] = lambda _ids: False,
    sampling: Sampling = Sampling(),
    seeds: Sequence[int] | None = None,
    contexts: Sequence[Sequence[int]] = (),
    score: bool = False,
) -> tuple[list[list[int]], list[float]]:
    """Writes on from contexts that are already read into ``cache``; one forward pass per token for all rows.

    Args:
        logits: of the first new token, [B, V].
        positions: of the last token read, [B, 1].
        mask: 1 for every real token in the cache [B, T]; None where all are.
        contexts: ids read, for settings that look at the text (repetition penalties).
        score: also sum the log-probabilities of the chosen tokens, the end-of-sequence id included.

    Returns:
        New ids per row, and the summed log-probability of each (0 without ``score``).
    """
    processors, eos = sampling.processors(), eos_ids(backbone)
    batch = logits.shape[0]
    streams = [torch.Generator().manual_seed(s) for s in seeds or range(batch)] if sampling.do_sample else []
    answers: list[list[int]] = [[] for _ in range(batch)]
    sums = torch.zeros(batch, dtype=torch.float64, device=logits.device)
    held = list(range(batch))  # the row at each place of the cache, finished ones included until they leave
    open_rows = set(held)
    few = bool(streams) and sampling.top_k > 0 and not sampling.reads_text and not score
    for step in range(max_new_tokens):
        if few:  # nothing is sorted or summed over the vocabulary
            ids = logits.topk(min(sampling.top_k, logits.shape[-1])).indices.sort().values  # as equals may change places
            logits = logits.float().gather(1, ids)
        if processors:
            logits = logits.float()
        if sampling.reads_text:
            seen = (_real_ids(contexts[i], answers[i], backbone) for i in held)
            logits = torch.cat([processors(s, row) for s, row in zip(seen, logits.split(1), strict=True)])
        elif processors:
            logits = processors(positions, logits)
        chosen = _pick(logits, [streams[i] for i in held] if streams else [])
        if few:
            chosen = ids.gather(1, chosen[:, None])[:, 0]
        if score:
            _add_scores(sums, logits, chosen, [(p, i) for p, i in enumerate(held) if i in open_rows])
        tokens = chosen.tolist()
        for row, token in zip(held, tokens, strict=True):
            if row not in open_rows:
                continue
            if token in eos:
                open_rows.discard(row)
                continue
            answers[row].append(token)
            if finished(answers[row]):
                open_rows.discard(row)
        if not open_rows:
            break
        if len(open_rows) <= KEEP * len(held):
            going = [place for place, row in enumerate(held) if row in open_rows]
            select = torch.tensor(going, device=chosen.device)
            cache.batch_select_indices(select)
            positions, chosen = positions[select], chosen[select]
            mask = None if mask is None else mask[select]
            held = [held[place] for place in going]
        if step + 1 < max_new_tokens:
            mask = None if mask is None else torch.cat([mask, mask.new_ones(len(held), 1)], dim=1)
            positions = positions + 1
            keep = torch.ones(len(held), 1, dtype=torch.bool)
            embeds = backbone.embed(chosen[:, None], rows)
            logits = backbone.logits(embeds, keep, cache=cache, attention_mask=mask, position_ids=positions)
    return answers, sums.tolist()


def _add_scores(sums: Tensor, logits: Tensor, chosen: Tensor, going: list[tuple[int, int]]) -> None:
    places, rows = (torch.tensor(x, device=logits.device) for x in zip(*going, strict=True))
    picked = logits[places].float()
    sums[rows] += (picked.gather(1, chosen[places][:, None])[:, 0] - picked.logsumexp(-1)).double()


def _prefill(
    backbone: Backbone,
    rows: Tensor,
    prefix: Prefix | None,
    ids: Tensor,
    mask: Tensor,
    positions: Tensor,
    at_a_time: int,
    max_new_tokens: int,
) -> tuple[DynamicCache, Tensor]:
    """Reads the contexts; returns the cache of all rows and the logits [B, V] behind each."""
    (batch, width), length = ids.shape, mask.shape[1]
    cache = DynamicCache(config=backbone.model.config)
    cache.layers = [BufferedLayer(batch, length + max_new_tokens) if type(x) is DynamicLayer else x for x in cache.layers]
    buffered = [layer for layer in cache.layers if isinstance(layer, BufferedLayer)]
    logits = []
    for start in range(0, batch, at_a_time):
        part = slice(start, min(start + at_a_time, batch))
        count = part.stop - start
        for layer in buffered:
            layer.begin(part)
        for index, (keys, values) in enumerate(prefix.layers if prefix else ()):
            cache.update(keys.expand(count, -1, -1, -1), values.expand(count, -1, -1, -1), index)
        keep = torch.zeros(count, width, dtype=torch.bool)
        keep[:, -1] = True
        embeds = backbone.embed(ids[part], rows)
        logits.append(backbone.logits(embeds, keep, cache=cache, attention_mask=mask[part], position_ids=positions[part]))
    for layer in buffered:
        layer.begin(slice(0, batch), length)
    return cache, torch.cat(logits)


def _pick(logits: Tensor, streams: list[torch.Generator]) -> Tensor:
    """One id per row [B]."""
    if not streams:
        return _argmax(logits)
    probabilities = logits.float().softmax(-1).cpu()
    drawn = [torch.multinomial(p, 1, generator=g) for p, g in zip(probabilities, streams, strict=True)]
    return torch.cat(drawn).to(logits.device)


def _argmax(logits: Tensor, block: int = 128) -> Tensor:
    """``logits.argmax(-1)`` by way of the maxima of blocks, which CPUs find seven times faster; the first of equals wins."""
    if logits.shape[-1] % block:
        return logits.argmax(-1)
    blocks = logits.unflatten(-1, (-1, block))
    best = blocks.amax(-1).argmax(-1)
    return best * block + blocks[torch.arange(len(best), device=best.device), best].argmax(-1)


def _real_ids(context: Sequence[int], answer: Sequence[int], backbone: Backbone) -> Tensor:
    """Text of one row read and written so far [1, T], for processors that look at it: a soft prompt has no ids to penalise."""
    return torch.tensor([[t for t in context if t >= 0] + list(answer)], dtype=torch.long, device=backbone.device)


def eos_ids(backbone: Backbone) -> frozenset[int]:
    """All ids that end a generation: the model's own and the tokenizer's."""
    own = getattr(backbone.model.generation_config, "eos_token_id", None)
    ids = set(own if isinstance(own, list) else [own]) | {backbone.tokenizer.eos_token_id}
    return frozenset(int(i) for i in ids if i is not None)


def generate_stock(
    backbone: Backbone, rows: Tensor, contexts: Sequence[Sequence[int]], *, max_new_tokens: int, **settings: Any
) -> list[list[int]]:
    """``model.generate`` on the embedded contexts, without a shared prefix: beams, encoder-decoders, anything exotic."""
    ids = backbone.tensor(contexts, left=not backbone.is_seq2seq)
    mask = backbone.tensor([[1] * len(c) for c in contexts], left=not backbone.is_seq2seq)
    with torch.no_grad():
        out = backbone.model.generate(
            inputs_embeds=backbone.embed(ids, rows),
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=backbone.tokenizer.pad_token_id,
            **settings,
        )
    return [[int(t) for t in row] for row in out]
