"""LoRA layers for a frozen model, made by PEFT, that stand in it only while they are wanted.

Outside :meth:`LoraLayers.on` the model consists of its own modules, so its outputs and its fingerprint are what they were.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.errors import ArtifactError, ConfigError
from lm_eval_softverb.residual import decoder_layers
from lm_eval_softverb.verbalizers.translator_adapter import TranslatorAdapter, transposed

TARGETS = (
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ("c_attn", "c_proj", "c_fc"),  # GPT-2
)
_PREFIX = "base_model.model."  # of parameters in PEFT's files


class LoraShape(Protocol):
    """What decides the layers, beside the model: a training config's or a stored adapter's."""

    @property
    def rank(self) -> int: ...

    @property
    def alpha(self) -> int: ...


class LoraLayers:
    """LoRA layers for one backbone, made by PEFT; the model has them only inside :meth:`on`.

    Args:
        seed: of the initial weights (PEFT's: A uniform, B zero), the same on every device.

    Raises:
        ConfigError: an architecture whose projections are not known.
    """

    def __init__(self, backbone: Backbone, shape: LoraShape, *, dropout: float = 0.0, seed: int = 0) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        model = backbone.model
        self.targets = target_modules(backbone)
        settings = {"r": shape.rank, "lora_alpha": shape.alpha, "lora_dropout": dropout, "bias": "none"}
        config = LoraConfig(
            **settings, target_modules=list(self.targets), fan_in_fan_out=transposed(self.targets), task_type="CAUSAL_LM"
        )
        with torch.random.fork_rng(devices=[]):
            inject_adapter_in_model(config, model, "default")
        layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
        self._places = [
            (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], x) for name, x in layers.items()
        ]
        self._swap(False)
        del model.peft_config
        self.parameters: dict[str, nn.Parameter] = {}
        generator = torch.Generator().manual_seed(seed)
        for name, layer in sorted(layers.items()):
            for side in ("lora_A", "lora_B"):
                module = getattr(layer, side)["default"].float()  # whatever the model's dtype
                self.parameters[f"{_PREFIX}{name}.{side}.weight"] = module.weight
            initial = torch.empty(layer.lora_A["default"].weight.shape)
            nn.init.kaiming_uniform_(initial, a=math.sqrt(5), generator=generator)
            with torch.no_grad():
                layer.lora_A["default"].weight.copy_(initial)
        self._train(False)

    @contextmanager
    def on(self, *, training: bool = False) -> Iterator[None]:
        """Inside, the model has these layers; ``training`` turns their dropout on."""
        self._swap(True)
        self._train(training)
        try:
            yield
        finally:
            self._train(False)
            self._swap(False)

    def state(self) -> dict[str, Tensor]:
        """A copy of the weights, by PEFT's names."""
        return {name: p.detach().float().cpu().clone() for name, p in self.parameters.items()}

    def load(self, tensors: Mapping[str, Tensor], source: str = "") -> None:
        """Takes over weights.

        Raises:
            ArtifactError: other names or shapes than this model's.
        """
        if alone := sorted(self.parameters.keys() ^ tensors.keys()):
            raise ArtifactError(
                f"{source or 'The translator'}: {len(alone)} LoRA matrices are missing or do not belong to this model, first "
                f"'{alone[0]}'. Use it with the base model it was trained on."
            )
        for name, parameter in self.parameters.items():
            if parameter.shape != tensors[name].shape:
                raise ArtifactError(
                    f"{source or 'The translator'}: '{name}' is {list(tensors[name].shape)}, expected {list(parameter.shape)}."
                )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])

    def _swap(self, inside: bool) -> None:
        for parent, name, layer in self._places:
            setattr(parent, name, layer if inside else layer.base_layer)

    def _train(self, training: bool) -> None:
        for _, _, layer in self._places:
            layer.lora_dropout.train(training)


def target_modules(backbone: Backbone) -> tuple[str, ...]:
    """What LoRA adapts: ends of names, or whole names where other parts of the model (such as eyes) use the same ends.

    Raises:
        ConfigError: an encoder-decoder, or projections of other names.
    """
    layers = decoder_layers(backbone)
    has = {name.rpartition(".")[2] for name, _ in layers[0].named_modules()}
    ends = next((t for t in TARGETS if set(t) <= has), None)
    if ends is None:
        raise ConfigError(
            f"LoRA has no place in {backbone.name} ({type(backbone.model).__name__}): expected layers with "
            f"{' or '.join(', '.join(t) for t in TARGETS)}, found {', '.join(sorted(n for n in has if n))}."
        )
    inside = {id(module) for module in layers.modules()}
    named = [(n, id(m) in inside) for n, m in backbone.model.named_modules() if n.rpartition(".")[2] in ends]
    return tuple(sorted(ends if all(own for _, own in named) else (n for n, own in named if own)))


_LAYERS: WeakKeyDictionary[Backbone, dict[str, LoraLayers]] = WeakKeyDictionary()


def layers_of(backbone: Backbone, adapter: TranslatorAdapter) -> LoraLayers:
    """The adapter's layers for this backbone, made once.

    Raises:
        ArtifactError: it adapts other modules than this model has.
    """
    known = _LAYERS.setdefault(backbone, {})
    if adapter.id not in known:
        if set(adapter.targets) != set(expected := target_modules(backbone)):
            raise ArtifactError(
                f"{adapter.source}: target_modules {', '.join(adapter.targets[:8])}, expected {', '.join(expected[:8])} for "
                f"{backbone.name}. Use it with the base model it was trained on."
            )
        layers = LoraLayers(backbone, adapter)
        layers.load(adapter.tensors, adapter.source)
        known[adapter.id] = layers
    return known[adapter.id]
