"""Settings of translator training, with the two presets (section 5)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from lm_eval_softverb.errors import ConfigError, did_you_mean
from lm_eval_softverb.verbalizers import KINDS, Kind

Schedule = Literal["constant", "linear"]
LabelOrder = Literal["shuffled", "given", "sorted"]


@dataclass(frozen=True)
class FitConfig:
    """How LoRA weights are fitted, whatever the loss.

    Attributes:
        epochs: most passes over the training examples.
        patience: epochs without an improvement of the validation loss by ``min_delta`` before stopping; 0 never stops.
        min_delta: in nats per target token (per pair, for preferences).
        batch_size: examples per optimiser step, over all processes.
        learning_rate: peak of the schedule.
        schedule: after the warm-up: constant, or to zero over all epochs.
        warmup: share of all steps with a rising rate.
        weight_decay: AdamW's, on the LoRA weights.
        max_grad_norm: clipping of the gradient of all LoRA weights together; 0 does not clip.
        dropout: of what enters a LoRA layer; the frozen model has none.
        validation: share of the training prompts held out to choose the best epoch.
        seed: of initial weights, split, order and dropout.
    """

    epochs: int = 20
    patience: int = 3
    min_delta: float = 1e-3
    batch_size: int = 16
    learning_rate: float = 1e-3
    schedule: Schedule = "linear"
    warmup: float = 0.05
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    dropout: float = 0.1
    validation: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1.")
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate is {self.learning_rate}, expected a positive number.")
        for name in ("warmup", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected a share in [0, 1).")
        if not 0 < self.validation < 1:
            raise ConfigError(f"validation is {self.validation}, expected a share between 0 and 1.")
        _check("schedule", self.schedule, get_args(Schedule))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def rate(self, step: int, total: int) -> float:
        """Learning rate of the 0-based ``step`` of ``total``."""
        from lm_eval_softverb.fitting import learning_rate

        return learning_rate(self.learning_rate, self.schedule, self.warmup, step, total)


@dataclass(frozen=True)
class Between:
    """What stands between a prompt's vectors and its text.

    Attributes:
        bos: BOS, as in the paper.
        words: behind it, such as "Labels:". Near the words that the prompt was tuned to stand before, reading is easier.
        answers: between the two, what the frozen model answers under the prompt to neutral inputs (method ``elicit``), each
            with its share. In training they are drawn again from these shares in each epoch.
    """

    bos: bool = True
    words: str = ""
    answers: bool = False


@dataclass(frozen=True)
class TranslatorConfig(FitConfig):
    """How a translator is trained. The defaults are the preset ``fixed``.

    Attributes:
        kind: what its texts say: ``labels`` joined by ", ", or ``instructions``.
        rank, alpha: of LoRA.
        bos, words, answers: what stands between a prompt's vectors and its text, see :class:`Between`.
        max_tokens: longest text, without the sentence of ``name_answers``; longer ones are cut, and EOS comes behind the cut.
        whole_sentences: cut behind the last sentence that fits, where one does.
        name_answers: behind the text, and not cut, a sentence that names what the prompt answers (``answers`` has to be on);
            the translator learns to write it, too. See :mod:`~lm_eval_softverb.verbalizers.telling`.
        label_order: of the labels in a text: shuffled anew in each epoch (with ``answers``, those among them come first and in
            their order, so that a text never depends on chance that the translator cannot see); given, as in the manifest
            (random in the paper); or sorted, which a translator knows by heart sooner and reads new prompts worse with.
        noise: added to a prompt's vectors, anew in each epoch, in shares of their root mean square. A few hundred prompts are
            soon known by heart; noise keeps a translator from telling them apart by details that mean nothing.
        originals: where a prompt has paraphrases, train on its own text, too.
        share: of the prompts left after validation to learn from; a smaller share is part of every larger one.
    """

    kind: Kind = "labels"
    rank: int = 4
    alpha: int = 8
    bos: bool = True
    words: str = ""
    answers: bool = False
    max_tokens: int = 300
    whole_sentences: bool = False
    name_answers: bool = False
    label_order: LabelOrder = "shuffled"
    noise: float = 0.0
    originals: bool = True
    share: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.noise < math.inf:
            raise ConfigError(f"noise is {self.noise}, expected at least 0.")
        if not 0 < self.share <= 1:
            raise ConfigError(f"share is {self.share}, expected more than 0 and at most 1.")
        for name in ("rank", "alpha", "max_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1.")
        if self.name_answers and (not self.answers or self.kind == "labels"):
            raise ConfigError(
                f"name_answers=true got answers={self.answers} and kind {self.kind!r}, expected answers=true and kind "
                "'instructions' (a label set is nothing but answers). Pass answers, too, or leave out name_answers."
            )
        _check("kind", self.kind, KINDS)
        _check("label_order", self.label_order, get_args(LabelOrder))

    @property
    def between(self) -> Between:
        return Between(self.bos, self.words, self.answers)


@dataclass(frozen=True)
class PreferenceConfig(FitConfig):
    """How preferences are trained (DPO, Rafailov et al. 2023). ``validation`` counts prompts; dropout is off, as usual.

    Attributes:
        beta: how far the translator may move from the one it starts from; smaller is farther.
        candidates: texts to draw for each training prompt; the best and the worst of them are its pair.
        temperature: of these draws.
        max_tokens: longest candidate.
        answer_tokens: of each behaviour compared; see :mod:`lm_eval_softverb.verbalizers.rerank`.
    """

    epochs: int = 1
    learning_rate: float = 1e-6
    schedule: Schedule = "constant"
    warmup: float = 0.0
    weight_decay: float = 0.0
    dropout: float = 0.0
    beta: float = 0.1
    candidates: int = 8
    temperature: float = 1.0
    max_tokens: int = 300
    answer_tokens: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0 or not self.temperature > 0:
            raise ConfigError(f"beta is {self.beta}, temperature {self.temperature}; expected positive numbers.")
        for name, least in (("candidates", 2), ("max_tokens", 1), ("answer_tokens", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least {least}.")


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "fixed": {},
    "paper": {
        "epochs": 5,
        "patience": 0,
        "min_delta": 0.0,
        "learning_rate": 1e-4,
        "schedule": "constant",
        "warmup": 0.0,
        "max_grad_norm": 0.0,
        "label_order": "given",
        "originals": False,
    },
}


def config(preset: str = "fixed", **overrides: Any) -> TranslatorConfig:
    """A preset with single settings replaced; None leaves the preset's value.

    Raises:
        ConfigError: an unknown preset or setting, or a value out of range.
    """
    _check("preset", preset, PRESETS)
    known = [f.name for f in fields(TranslatorConfig)]
    for name in overrides:
        _check("setting", name, known)
    return TranslatorConfig(**{**PRESETS[preset], **{k: v for k, v in overrides.items() if v is not None}})


def _check(what: str, value: str, options: Any) -> None:
    if value not in options:
        raise ConfigError(f"Unknown {what} {value!r}. {did_you_mean(str(value), list(options))}")
