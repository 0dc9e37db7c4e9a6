"""How attention runs while prompts and translators are trained."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel


def plain_attention(model: PreTrainedModel) -> AbstractContextManager[None]:
    """On a CPU the backward pass of fused attention in bfloat16 outweighs all matrix products; written out it does not.

    Faster products than torch's (bfloat16 scores, keys not repeated) were tried and cost held-out accuracy that gradients
    and losses did not show; see benchmarks/LOG.md.
    """
    if model.device.type == "cpu" and model.dtype == torch.bfloat16:
        return sdpa_kernel(SDPBackend.MATH)  # type: ignore[no-any-return]
    return nullcontext()
