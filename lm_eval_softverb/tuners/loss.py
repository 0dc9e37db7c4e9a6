"""The loss of many soft prompts in one forward pass.

The model is frozen, so prompts do not see each other: every row of a batch belongs to one prompt, and one backward pass gives
each prompt the gradient it would get alone. A prompt's virtual tokens (with the text that all rows share behind them) run once
per pass, not once per row, and only target positions go through the LM head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.batching import shared_length
from lm_eval_softverb.fitting import attention
from lm_eval_softverb.tuners.encoding import Example

Part = tuple[int, Sequence[Example]]
"""Index of a prompt, and the rows of it that are in one pass."""


def passes(batches: Sequence[Sequence[Example]], max_tokens: int) -> Iterator[list[Part]]:
    """Groups the rows of all prompts into passes of at most ``max_tokens`` padded tokens (a single row may have more).

    Prompts whose rows are about equally long go together; a prompt's rows are split only where they do not fit one pass.
    """
    lengths = [max(len(e.ids) for e in batch) for batch in batches]
    now: list[Part] = []
    rows = width = 0
    for prompt in sorted(range(len(batches)), key=lambda i: -lengths[i]):
        batch = batches[prompt]
        if now and (rows + len(batch)) * width > max_tokens:
            yield now
            now, rows, width = [], 0, 0
        width = max(width, lengths[prompt])
        size = max(1, max_tokens // width)
        for start in range(0, len(batch), size):
            if now and start:
                yield now
                now, rows = [], 0
            part = batch[start : start + size]
            now.append((prompt, part))
            rows += len(part)
    if now:
        yield now


def loss_sums(backbone: Backbone, prompts: Sequence[Tensor], parts: Sequence[Part]) -> Tensor:
    """Summed cross-entropy (nats) of the target tokens of each part [len(parts)], differentiable in its prompt.

    Args:
        prompts: each [n, d]; their numbers of virtual tokens may differ.
        parts: rows of the prompts they name; each prompt at most once.
    """
    used = [prompts[i] for i, _ in parts]
    firsts = [sum(p.shape[0] for p in used[:place]) for place in range(len(used))]
    rows, groups = torch.cat(list(used)), [batch for _, batch in parts]
    flat = [(place, e) for place, group in enumerate(groups) for e in group]
    owner = torch.tensor([place for place, _ in flat], device=backbone.device)
    targets = torch.tensor([t for _, e in flat for t in e.target], device=backbone.device)
    owner_of_target = owner.repeat_interleave(torch.tensor([len(e.target) for _, e in flat], device=backbone.device))

    def moved(place: int, ids: Sequence[int]) -> list[int]:
        """Virtual ids counted from the first row of their prompt in ``rows``."""
        return [t - firsts[place] if t < 0 else t for t in ids]

    if backbone.is_seq2seq:
        start = backbone.model.config.decoder_start_token_id
        logits = backbone.seq2seq_logits(
            backbone.embed(backbone.tensor([moved(p, e.context) for p, e in flat]), rows),
            backbone.tensor([[1] * len(e.context) for _, e in flat]),
            backbone.tensor([(start, *e.target[:-1]) for _, e in flat]),
            backbone.tensor([[1] * len(e.target) for _, e in flat]).bool(),
        )
    else:
        shared = min(shared_length([e.context[:-1] for e in group]) for group in groups)
        prefix = backbone.prefixes([moved(p, g[0].context[:shared]) for p, g in enumerate(groups)], rows)
        skip = prefix.length if prefix else 0
        logits = backbone.logits(
            backbone.embed(backbone.tensor([moved(p, e.ids[skip:]) for p, e in flat]), rows),
            backbone.tensor([[0] * (len(e.context) - skip - 1) + [1] * len(e.target) for _, e in flat]).bool(),
            cache=prefix.repeat([len(group) for group in groups], backbone.model.config) if prefix else None,
        )
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = cross_entropy(exact, targets, reduction="none")
    return torch.zeros(len(parts), dtype=losses.dtype, device=losses.device).index_add(0, owner_of_target, losses)


def backward(
    backbone: Backbone, prompts: Sequence[Tensor], batches: Sequence[Sequence[Example]], max_tokens: int
) -> list[float]:
    """Adds to each prompt's gradient that of its own mean loss per target token; returns these means."""
    tokens = torch.tensor([float(sum(len(e.target) for e in batch)) for batch in batches], device=backbone.device)
    means = torch.zeros(len(batches), device=backbone.device, dtype=torch.float64)
    for parts in passes(batches, max_tokens):
        index = torch.tensor([i for i, _ in parts], device=backbone.device)
        with attention(backbone):
            found = loss_sums(backbone, prompts, parts) / tokens[index]
            found.sum().backward()
        means[index] += found.detach().double()
    return [float(x) for x in means.tolist()]


@torch.no_grad()
def mean_losses(
    backbone: Backbone, prompts: Sequence[Tensor], batches: Sequence[Sequence[Example]], max_tokens: int
) -> list[float]:
    """Mean cross-entropy per target token of each prompt on its own rows."""
    ordered = [sorted(batch, key=lambda e: len(e.ids)) for batch in batches]
    sums = [0.0] * len(batches)
    for parts in passes(ordered, max_tokens):
        for (i, _), value in zip(parts, loss_sums(backbone, prompts, parts).tolist(), strict=True):
            sums[i] += value
    return [total / sum(len(e.target) for e in batch) for total, batch in zip(sums, batches, strict=True)]
