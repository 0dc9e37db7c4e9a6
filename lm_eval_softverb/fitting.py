"""What every training loop on a frozen model shares: the size of a pass, how its attention runs, and the learning rate."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lm_eval_softverb.backbone import Backbone

# Padded tokens of one forward and backward pass; activations for the backward pass grow with them, speed does not beyond.
TOKENS_ON_CPU, TOKENS_ON_GPU = 2048, 1 << 15


def tokens_per_pass(backbone: Backbone) -> int:
    """A default that keeps matrix products large and memory small."""
    return TOKENS_ON_CPU if backbone.device.type == "cpu" else TOKENS_ON_GPU


def attention(backbone: Backbone) -> AbstractContextManager[None]:
    """On a CPU the backward pass of fused attention in bfloat16 outweighs all matrix products; written out it does not.

    Faster products than torch's (keys not repeated for each head) cost held-out accuracy that gradients and losses did not
    show; see benchmarks/LOG.md.
    """
    if backbone.device.type == "cpu" and backbone.dtype == torch.bfloat16:
        return sdpa_kernel(SDPBackend.MATH)  # type: ignore[no-any-return]
    return nullcontext()


def learning_rate(peak: float, schedule: str, warmup: float, step: int, total: int) -> float:
    """Learning rate of the 0-based ``step`` of ``total``: rising over a share ``warmup`` of the steps, then by ``schedule``.

    Args:
        schedule: ``constant``, or ``linear`` or ``cosine`` to zero.
    """
    warm = int(warmup * total)
    if step < warm:
        return peak * (step + 1) / warm
    done = (step - warm) / max(1, total - warm)
    if schedule == "linear":
        return peak * (1 - done)
    if schedule == "cosine":
        return float(peak * 0.5 * (1 + torch.cos(torch.tensor(done * torch.pi))))
    return peak
