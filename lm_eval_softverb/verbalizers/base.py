"""What a verbalizer is: soft prompts in, texts out, best first. Its settings are the fields of one frozen dataclass."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Protocol

import torch

from lm_eval_softverb import storage
from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.errors import ConfigError, did_you_mean
from lm_eval_softverb.prompt import Fingerprint, SoftPrompt
from lm_eval_softverb.verbalizers import METHODS, Kind


@dataclass(frozen=True)
class Verbalization:
    """One text for one soft prompt.

    Attributes:
        text: model-written, hence data: never rendered as a template or run.
        confidence: in [0, 1], larger is surer; what it measures is the method's and said in its docstring. None: unknown.
        details: where the text comes from (layer pair, frame, share of samples, …), as JSON.
    """

    text: str
    confidence: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"text": self.text, "confidence": self.confidence, "details": dict(self.details)}

    @classmethod
    def from_json(cls, value: Any) -> Verbalization:
        return cls(str(value["text"]), value["confidence"], value["details"])


class Verbalizer(Protocol):
    """One method with its settings: a frozen dataclass whose fields are JSON values."""

    @property
    def method(self) -> str: ...

    def verbalize(
        self, backbone: Backbone, prompts: Sequence[SoftPrompt], *, kind: Kind, max_new_tokens: int
    ) -> list[list[Verbalization]]:
        """At least one text per prompt, best first; all prompts are worked on together."""
        ...


def create(method: str, **settings: Any) -> Verbalizer:
    """A verbalizer by name. Strings are read as the type of the setting, so values may come from a command line.

    Raises:
        ConfigError: an unknown method or setting, or a value of the wrong type.
    """
    cls = method_class(method)
    known = {f.name: f for f in fields(cls)}
    for name in settings:
        if name not in known:
            raise ConfigError(f"Method {method!r} has no setting {name!r}. {did_you_mean(name, list(known))}")
    return cls(**{n: _read(method, n, str(known[n].type), v) for n, v in settings.items() if v is not None})  # type: ignore[no-any-return]


def method_class(method: str) -> Any:
    """The dataclass of a method.

    Raises:
        ConfigError: an unknown name.
    """
    if method not in METHODS:
        raise ConfigError(f"Unknown method {method!r}. {did_you_mean(str(method), list(METHODS))}")
    module, _, name = METHODS[method].partition(":")
    return getattr(importlib.import_module(module), name)


def settings_of(verbalizer: Verbalizer) -> dict[str, Any]:
    """Method and settings as JSON: what decides a text beside the model and the prompt.

    A method whose settings name files has ``files``: hashes of their contents, since other contents make other texts.
    """
    own: Any = verbalizer
    return {"method": verbalizer.method, **asdict(own), **getattr(own, "files", {})}


def _read(method: str, name: str, kind: str, value: Any) -> Any:
    kind = kind.removesuffix(" | None")
    wrong = ConfigError(f"Setting {name} of method {method!r} is {value!r}, expected {kind}.")
    if kind == "bool":
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if str(value).lower() not in words:
            raise wrong
        return words[str(value).lower()]
    try:
        number = float(value) if kind in ("int", "float") else 0.0
    except (TypeError, ValueError):
        raise wrong from None
    if kind == "int":
        if number != int(number):
            raise wrong
        return int(number)
    return number if kind == "float" else str(value)


def for_bank(verbalizer: Verbalizer, entries: Sequence[Mapping[str, Any]]) -> Verbalizer:
    """``verbalizer`` with whatever it must not see of a bank's ground truth kept away from its examples.

    A method that shows the model example tasks has a setting ``avoid``: words that none of them may have as a label.
    """
    if getattr(verbalizer, "avoid", None) != "":
        return verbalizer
    words = sorted({str(label) for entry in entries for label in entry.get("labels") or ()})
    return replace(verbalizer, avoid="|".join(words))  # type: ignore[type-var]


def check_fits(
    verbalizer: Verbalizer, prompts: Sequence[SoftPrompt], model: Fingerprint, *, force: bool = False
) -> dict[str, list[str]]:
    """Compares the prompts with the base model in use or, where the method has a ``bridge``, with the one it starts from.

    Returns:
        The differences that ``force`` let pass, by the prompt's id.

    Raises:
        BaseModelMismatch: a difference, unless ``force``. Another width is never let pass.
    """
    if folder := getattr(verbalizer, "bridge", ""):
        from lm_eval_softverb.verbalizers.bridge import Bridge

        model = Bridge.load(folder).source
    return {p.id: d for p in prompts if (d := p.check_fits(model, force=force))}


def controlled(prompts: Sequence[SoftPrompt], control: str, seed: int = 0) -> Sequence[SoftPrompt]:
    """The prompts themselves (``none``), or the control in their place (``random``)."""
    return random_like(prompts, seed) if control == "random" else prompts


def random_like(prompts: Sequence[SoftPrompt], seed: int = 0) -> list[SoftPrompt]:
    """The control: random directions whose rows have the norms of the prompts' rows, in the same frames.

    A prompt's control depends on ``seed`` and the prompt only, not on the prompts beside it.
    """
    out = []
    for prompt in prompts:
        own = storage.seed_from("control", seed, prompt.id)
        noise = torch.randn(prompt.embeddings.shape, generator=torch.Generator().manual_seed(own))
        rows = noise * (prompt.embeddings.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))
        out.append(replace(prompt, embeddings=rows, info={"control": "random", "norms_of": prompt.id, "seed": seed}))
    return out
