"""Attention written out for CPUs, where transformers' own costs more than the rest of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

_GROUPED = "softverb_grouped"


@contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """On a CPU, attention as plain matrix products inside; models that ask for more than a mask keep their own.

    Fused attention has a backward pass there that outweighs all matrix products, and the written-out one of
    torch works in float32 on repeated keys; this one works in float32 on keys as they are.
    """
    sdpa = getattr(model.config, "_attn_implementation", "") == "sdpa"
    if model.device.type != "cpu" or not sdpa or model.config.is_encoder_decoder:
        yield
        return
    AttentionInterface.register(_GROUPED, grouped_attention)
    AttentionMaskInterface.register(_GROUPED, eager_mask)
    model.set_attn_implementation(_GROUPED)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention for transformers' ``AttentionInterface``: heads that share keys are rows of one product.

    Args:
        query: [B, H, T, D]; key, value: [B, K, S, D] with H a multiple of K.
        attention_mask: added to the scores, [B or 1, 1, T, S]; None attends to everything.

    Returns:
        [B, T, H, D], and no weights.
    """
    if any(more.get(name) is not None for name in ("softcap", "position_bias", "s_aux")) or more.get("dropout"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)  # type: ignore[no-any-return]
    (batch, heads, length, width), shared, keys = query.shape, key.shape[1], key.shape[2]
    group = heads // shared
    exact = torch.promote_types(query.dtype, torch.float32)  # scores rounded to bfloat16 cost prompts 9 points of accuracy
    dtype, query, key, value = value.dtype, query.to(exact), key.to(exact), value.to(exact)
    rows = (query * (width**-0.5 if scaling is None else scaling)).reshape(batch * shared, group * length, width)
    scores = torch.bmm(rows, key.reshape(batch * shared, keys, width).transpose(1, 2))
    if attention_mask is not None:
        scores = scores.view(batch, shared, group, length, keys) + attention_mask[:, :, None, :, :keys]
        scores = scores.view(batch * shared, group * length, keys)
    mixed = torch.bmm(scores.softmax(-1), value.reshape(batch * shared, keys, value.shape[-1]))
    mixed = mixed.to(dtype).view(batch, shared, group, length, -1).permute(0, 3, 1, 2, 4)
    return mixed.reshape(batch, length, heads, -1), None
