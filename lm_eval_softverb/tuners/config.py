"""Settings of soft prompt training, with the two presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from lm_eval_softverb.errors import ConfigError, did_you_mean
from lm_eval_softverb.frame import Frame

Init = Literal["vocab", "normal", "text"]
Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class SoftConfig:
    """How one soft prompt is trained. The defaults are the preset ``fixed``.

    Attributes:
        tokens: n, number of virtual tokens.
        frame: where they stand.
        chat: render each row as a chat turn (needs a tokenizer with a chat template).
        init: rows of E for random vocabulary ids; N(0, init_scale^2); or the ids of ``init_text`` tiled to n.
        init_text: text for ``init="text"``.
        init_scale: standard deviation for ``init="normal"``.
        epochs: most passes over the training rows.
        patience: epochs without an improvement of the validation loss by ``min_delta`` before stopping; 0 never stops.
        min_delta: in nats per target token.
        batch_size: rows per optimiser step.
        learning_rate: peak of the schedule.
        schedule: after the warm-up: constant, or to zero over all epochs.
        warmup: share of all steps with a rising rate.
        weight_decay: AdamW's, on the prompt's rows.
        max_grad_norm: clipping of the prompt's gradient; 0 does not clip.
        validation: share of the rows held out to choose the best epoch.
        eos: end every target with EOS, so that the prompt learns to stop.
        max_length: longest row in tokens, virtual tokens included; longer inputs lose their left end, targets never.
        seed: of initial rows, split and order.
    """

    tokens: int = 20
    frame: Frame = Frame()  # noqa: RUF009  (frozen)
    chat: bool = False
    init: Init = "vocab"
    init_text: str = ""
    init_scale: float = 1.0
    epochs: int = 20
    patience: int = 3
    min_delta: float = 1e-3
    batch_size: int = 16
    learning_rate: float = 1e-2
    schedule: Schedule = "linear"
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    validation: float = 0.2
    eos: bool = True
    max_length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        positive = {"tokens", "epochs", "batch_size", "max_length"}
        for name in sorted(positive):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1.")
        if self.learning_rate <= 0:
            raise ConfigError(f"learning_rate is {self.learning_rate}, expected a positive number.")
        if not 0 < self.validation < 1:
            raise ConfigError(f"validation is {self.validation}, expected a share between 0 and 1.")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup is {self.warmup}, expected a share of the steps in [0, 1).")
        for name, kind in (("init", Init), ("schedule", Schedule)):
            value, options = getattr(self, name), list(get_args(kind))
            if value not in options:
                raise ConfigError(f"Unknown {name} {value!r}. {did_you_mean(str(value), options)}")
        if self.init == "text" and not self.init_text:
            raise ConfigError("init 'text' needs init_text, the text whose embeddings the prompt starts from.")

    def rate(self, step: int, total: int) -> float:
        """Learning rate of the 0-based ``step`` of ``total``."""
        from lm_eval_softverb.fitting import learning_rate

        return learning_rate(self.learning_rate, self.schedule, self.warmup, step, total)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "frame": self.frame.to_json()}


# The paper's public settings, flaws included: no EOS on targets, no warm-up, no clipping.
_PAPER: Mapping[str, Any] = {
    "eos": False,
    "schedule": "constant",
    "warmup": 0.0,
    "max_grad_norm": 0.0,
    "epochs": 20,
}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "fixed": {},
    "paper": {
        **_PAPER,
        "batch_size": 32,
        "learning_rate": 1e-4,
        "patience": 5,
        "weight_decay": 0.01,
        "validation": 0.2,
    },
    "paper-general": {
        **_PAPER,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "patience": 3,
        "weight_decay": 0.05,
        "validation": 0.1,
    },
}


def config(preset: str = "fixed", **overrides: Any) -> SoftConfig:
    """A preset with single settings replaced; None leaves the preset's value.

    Raises:
        ConfigError: an unknown preset or setting, or a value out of range.
    """
    if preset not in PRESETS:
        raise ConfigError(f"Unknown preset {preset!r}. {did_you_mean(preset, list(PRESETS))}")
    known = [f.name for f in fields(SoftConfig)]
    unknown = [name for name in overrides if name not in known]
    if unknown:
        raise ConfigError(f"Unknown setting {unknown[0]!r}. {did_you_mean(unknown[0], known)}")
    return SoftConfig(**{**PRESETS[preset], **{k: v for k, v in overrides.items() if v is not None}})
