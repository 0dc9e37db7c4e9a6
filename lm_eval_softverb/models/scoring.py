"""Log-likelihoods of continuations: each shared piece of text runs through the model once.

Three things are shared, each checked against the plain path in the tests:

* the **prefix** of a group of requests (the prompt's virtual tokens and whatever text follows them in every request): its
  keys and values are computed once;
* the **context** of several continuations (the choices of one document): the continuations stand behind it in one row as
  branches that do not see each other;
* the **LM head** runs only where a continuation is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lm_eval_softverb.backbone import Backbone, Prefix
from lm_eval_softverb.batching import Counters, batches, halving, leading_virtual, shared_length

Ids = tuple[int, ...]


@dataclass
class Row:
    """One sequence to run: a context and the branches behind it.

    Attributes:
        context: ids every branch sees.
        branches: inputs of the branches (a continuation without its last token); empty ones need no room.
        readers: per branch, requests that read it: (request index, continuation).
    """

    context: Ids
    branches: list[Ids] = field(default_factory=list)
    readers: list[list[tuple[int, Ids]]] = field(default_factory=list)

    def add(self, request: int, continuation: Ids) -> None:
        branch = continuation[:-1]
        if branch not in self.branches:
            self.branches.append(branch)
            self.readers.append([])
        self.readers[self.branches.index(branch)].append((request, continuation))

    @property
    def ids(self) -> Ids:
        return self.context + tuple(t for branch in self.branches for t in branch)

    def split(self) -> Iterator[Row]:
        """The same work as one row per branch, for models that cannot run branches side by side."""
        for branch, readers in zip(self.branches, self.readers, strict=True):
            yield Row(self.context, [branch], [readers])


def loglikelihoods(
    backbone: Backbone,
    rows: Tensor,
    requests: Sequence[tuple[Ids, Ids]],
    *,
    batch_size: int | None,
    counters: Counters,
    branching: bool,
    softmax_dtype: torch.dtype | None = None,
    done: Callable[[int, tuple[float, bool]], None] = lambda _i, _r: None,
) -> list[tuple[float, bool]]:
    """Scores ``(context ids, continuation ids)`` pairs of a causal model.

    Args:
        rows: prompt rows [R, d] that negative ids address.
        batch_size: sequences per forward pass; None chooses by a token budget.
        branching: run the continuations of one context in one row (see :func:`supports_branching`).
        softmax_dtype: dtype of the softmax; float32 by default, whatever the model's dtype.
        done: called with (index, answer) as answers arrive.

    Returns:
        Per request the summed log-probability (nats) and whether greedy decoding would produce the continuation.
    """
    by_context: dict[Ids, Row] = {}
    for index, (context, continuation) in enumerate(requests):
        by_context.setdefault(context, Row(context)).add(index, continuation)
    work = [part for row in by_context.values() for part in ([row] if branching else row.split())]
    answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)

    groups: dict[Ids, list[Row]] = {}
    for row in work:
        groups.setdefault(leading_virtual(row.context), []).append(row)
    for group in groups.values():
        # The last token of every context stays out of the prefix: its output is read.
        length = shared_length([row.context[:-1] for row in group])
        prefix = backbone.prefix(group[0].context[:length], rows)
        skip = prefix.length if prefix else 0
        counters.prefix_tokens += skip
        for batch in batches(group, lambda r, skip=skip: len(r.ids) - skip, batch_size):  # type: ignore[misc]

            def run(part: Sequence[Row], prefix: Prefix | None = prefix, skip: int = skip) -> list[tuple[int, float, bool]]:
                return _score(backbone, rows, part, prefix, skip, softmax_dtype)

            for index, value, greedy in halving(run, batch, counters):
                answers[index] = (value, greedy)
                done(index, answers[index])
    return answers


def _score(
    backbone: Backbone, rows: Tensor, batch: Sequence[Row], prefix: Prefix | None, skip: int, dtype: torch.dtype | None
) -> list[tuple[int, float, bool]]:
    ids = backbone.tensor([row.ids[skip:] for row in batch])
    device = ids.device
    keep = torch.zeros(ids.shape, dtype=torch.bool)
    reads: list[tuple[int, Ids, list[tuple[int, int]]]] = []  # request, continuation, (row, column) of each of its tokens
    for r, row in enumerate(batch):
        last, start = len(row.context) - skip - 1, len(row.context) - skip
        for branch, readers in zip(row.branches, row.readers, strict=True):
            cells = [(r, last), *((r, start + i) for i in range(len(branch)))]
            start += len(branch)
            reads += [(request, continuation, cells) for request, continuation in readers]
            for cell in cells:
                keep[cell] = True
    mask, positions = _branch_mask(batch, ids.shape[1], skip, backbone)
    logits = backbone.logits(
        backbone.embed(ids, rows),
        keep,
        cache=prefix.expand(len(batch), backbone.model.config) if prefix else None,
        attention_mask=mask,
        position_ids=positions,
    ).to(dtype or torch.float32)

    place = torch.full(ids.shape, -1, dtype=torch.long)
    place[keep] = torch.arange(int(keep.sum()))
    at = torch.tensor([int(place[cell]) for _, _, cells in reads for cell in cells], device=device)
    tokens = torch.tensor([t for _, continuation, _ in reads for t in continuation], device=device)
    # log softmax at the tokens that are read, without writing out [K, V] once more
    logprobs = (logits[at, tokens] - logits.logsumexp(-1)[at]).float().cpu()
    hits = (logits.argmax(-1)[at] == tokens).cpu()
    out, i = [], 0
    for request, continuation, _ in reads:
        n = len(continuation)
        out.append((request, float(logprobs[i : i + n].sum()), bool(hits[i : i + n].all())))
        i += n
    return out


def _branch_mask(batch: Sequence[Row], width: int, skip: int, backbone: Backbone) -> tuple[Tensor | None, Tensor | None]:
    """Additive mask [B, 1, T, skip + T] and positions [B, T] that keep branches apart; None where no row has two."""
    if all(sum(1 for b in row.branches if b) < 2 for row in batch):
        return None, None
    branch_of = torch.full((len(batch), width), -1)  # -1: padding, 0: context, k: branch k
    positions = torch.zeros(len(batch), width, dtype=torch.long)
    for r, row in enumerate(batch):
        start = end = len(row.context) - skip
        branch_of[r, :start] = 0
        positions[r, :start] = torch.arange(start)
        for k, branch in enumerate(row.branches, start=1):
            branch_of[r, end : end + len(branch)] = k
            positions[r, end : end + len(branch)] = torch.arange(start, start + len(branch))
            end += len(branch)
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    same = (branch_of[:, :, None] == branch_of[:, None, :]) | (branch_of[:, None, :] == 0)
    visible = torch.cat([torch.ones(len(batch), width, skip, dtype=torch.bool), same & causal], dim=-1)
    mask = torch.zeros(visible.shape, dtype=backbone.dtype).masked_fill(~visible, torch.finfo(backbone.dtype).min)
    return mask[:, None].to(backbone.device), (positions + skip).to(backbone.device)


def seq2seq_loglikelihoods(
    backbone: Backbone,
    rows: Tensor,
    requests: Sequence[tuple[Ids, Ids]],
    *,
    batch_size: int | None,
    counters: Counters,
    softmax_dtype: torch.dtype | None = None,
    done: Callable[[int, tuple[float, bool]], None] = lambda _i, _r: None,
) -> list[tuple[float, bool]]:
    """As :func:`loglikelihoods` for encoder-decoders: contexts go to the encoder, continuations to the decoder."""
    answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
    start = backbone.model.config.decoder_start_token_id

    def run(batch: Sequence[int]) -> list[tuple[int, float, bool]]:
        contexts, continuations = zip(*(requests[i] for i in batch), strict=True)
        decoder = backbone.tensor([(start, *c[:-1]) for c in continuations])
        keep = backbone.tensor([[1] * len(c) for c in continuations]).bool()
        logits = backbone.seq2seq_logits(
            backbone.embed(backbone.tensor(contexts), rows),
            backbone.tensor([[1] * len(c) for c in contexts]),
            decoder,
            keep,
        )
        tokens = torch.tensor([t for c in continuations for t in c], device=logits.device)
        logprobs = logits.log_softmax(-1, dtype=softmax_dtype or torch.float32).gather(1, tokens[:, None])[:, 0]
        hits, sizes = logits.argmax(-1) == tokens, [len(c) for c in continuations]
        return [
            (i, float(p.sum()), bool(h.all()))
            for i, p, h in zip(batch, logprobs.float().split(sizes), hits.split(sizes), strict=True)
        ]

    for batch in batches(range(len(requests)), lambda i: len(requests[i][0]), batch_size):
        for index, value, greedy in halving(run, batch, counters):
            answers[index] = (value, greedy)
            done(index, answers[index])
    return answers


@torch.no_grad()
def supports_branching(backbone: Backbone) -> bool:
    """Whether this model, as loaded, gives branches in one row the same numbers as separate rows.

    Asked of the model itself, once: it depends on the architecture, its attention layers and the attention implementation.
    Models with sliding windows are refused, since a short probe would not reach the window.
    """
    if backbone.is_seq2seq or not backbone.sees_all:
        return False
    v = backbone.vocab_size
    context = tuple(i * 7 % v for i in range(3, 9))
    requests = [(context, (1, 2 % v, 5 % v)), (context, (4 % v, 3 % v))]
    empty = torch.zeros(0, backbone.hidden_size, device=backbone.device)
    try:
        one, two = (
            loglikelihoods(backbone, empty, requests, batch_size=2, counters=Counters(), branching=b) for b in (True, False)
        )
    except (TypeError, ValueError, RuntimeError, NotImplementedError):  # the architecture rejects such a mask
        return False
    tolerance = 1e-3 if backbone.dtype == torch.float32 else 0.25
    return all(abs(a - b) < tolerance for (a, _), (b, _) in zip(one, two, strict=True))
