"""The residual stream between decoder layers: read it, change it, or let rows join the batch half-way.

Layers are numbered as in InSPEcT and Patchscopes: the stream *after layer* -1 is what enters the first decoder layer (the
embedding output: position embeddings and scaling included, where an architecture has them), after layer k what leaves
decoder layer k. The last one offered is L - 2, for a model of L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.errors import ConfigError

Edit = Callable[[int, Tensor], Tensor]
"""``(layer, stream after it [B, T, d]) -> stream that the next layer reads``, which may have more rows."""


def decoder_layers(backbone: Backbone) -> nn.ModuleList:
    """The L decoder layers of a causal model.

    Raises:
        ConfigError: an encoder-decoder, or an architecture whose layers are not in one list.
    """
    count = int(backbone.text_config.num_hidden_layers)
    if not backbone.is_seq2seq:
        for module in (backbone.model.get_decoder() or backbone.model).modules():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return module
    raise ConfigError(
        f"{backbone.name} ({type(backbone.model).__name__}) does not show its residual stream: expected a causal model with "
        f"its {count} decoder layers in one list, as Llama, Gemma, Qwen2 and GPT-2 have them."
    )


@contextmanager
def editing(backbone: Backbone, edit: Edit) -> Iterator[None]:
    """Inside, every forward pass hands its residual stream to ``edit`` in front of each decoder layer."""
    handles = []
    for index, layer in enumerate(decoder_layers(backbone)):

        def hook(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], after: int = index - 1
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return (edit(after, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": edit(after, kwargs["hidden_states"])}

        handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def states(backbone: Backbone, embeds: Tensor, edit: Edit = lambda _layer, stream: stream) -> Tensor:
    """Residual stream of ``embeds`` [B, T, d] after layers -1 … L - 2: [L, B, T, d], after what ``edit`` made of it."""
    seen: list[Tensor] = []

    def record(layer: int, stream: Tensor) -> Tensor:
        seen.append(edit(layer, stream))
        return seen[-1]

    with editing(backbone, record):
        backbone.logits(embeds, torch.zeros(embeds.shape[:2], dtype=torch.bool))
    return torch.stack(seen)
