"""Elicitation: a soft prompt says what it is for by what it answers, whatever it is asked.

A prompt that was tuned to choose among labels answers with its labels also where the input decides nothing. So neutral
inputs are put to the frozen model under the prompt, many answers are drawn, and those that come often enough are the text;
for an instruction they stand in sentences that hold for any task. Nothing is trained and no input of the prompt's task is
needed. It is the baseline for every reading; what a prompt does with its inputs it cannot say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from lm_eval_softverb import storage
from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.batching import Counters, batches, halving
from lm_eval_softverb.decoding import Sampling, generate
from lm_eval_softverb.errors import ConfigError
from lm_eval_softverb.frame import virtual_ids
from lm_eval_softverb.prompt import SoftPrompt
from lm_eval_softverb.verbalizers import Kind
from lm_eval_softverb.verbalizers.answers import pooled, without_order
from lm_eval_softverb.verbalizers.base import Verbalization
from lm_eval_softverb.verbalizers.rerank import inputs_of, read_inputs, with_slot
from lm_eval_softverb.verbalizers.telling import RULE, instruction, named

FORMS: Mapping[Kind, str] = {"labels": "Sentence: {} Label:", "instructions": "Input: {}\nOutput:"}
"""How the DoDs write their inputs."""
NEUTRAL = (
    "N/A",
    "Something happened today.",
    "They talked about it for a while.",
    "Nothing was left on the table.",
    "She looked up and waited.",
    "It took longer than anyone had expected.",
    "We never found out who it was.",
    "The letter arrived on a Tuesday.",
    "He put everything back where it belonged.",
    "Someone had moved the chairs.",
    "That is all there is to say about it.",
    "There were more of them than last time.",
)


@dataclass(frozen=True)
class Elicit:
    """The answers of the frozen model under the prompt to neutral inputs, the most frequent first: labels joined by ", ", or an
    instruction that names them (see :mod:`~lm_eval_softverb.verbalizers.telling`).

    Answers that differ in case, blanks or outer punctuation only are one. The confidence is the share of all samples that
    are in the text; ``details["answers"]`` has each with its share.

    Attributes:
        inputs: JSONL file of unlabelled inputs by prompt, as they are put to the model (``softverb translate inputs`` writes
            one); empty: a dozen sentences that belong to no task.
        samples: answers to draw for each input.
        answer_tokens: longest answer.
        temperature, top_k: of the samples; top_k 0 draws from all tokens.
        min_share: rarer answers are left out of labels; free ones seldom come twice, and an instruction names the first few.
        seed: of the samples; each also depends on the prompt's id, its input and its number, and on nothing else.
    """

    method: ClassVar[str] = "elicit"

    inputs: str = ""
    samples: int = 12
    answer_tokens: int = 8
    temperature: float = 1.0
    top_k: int = 50
    min_share: float = 0.03
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "answer_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1.")
        if not 0 < self.temperature < math.inf or self.top_k < 0:
            raise ConfigError(f"temperature is {self.temperature}, top_k {self.top_k}; expected more than 0, at least 0.")
        if not 0 <= self.min_share <= 1:
            raise ConfigError(f"min_share is {self.min_share}, expected a share in [0, 1].")
        _ = self.files  # what cannot be read is refused before a base model is loaded

    @property
    def files(self) -> dict[str, str]:
        """Hashes of how an instruction names answers, and of what ``inputs`` stands for: another file, other texts."""
        own = {"telling_sha256": storage.sha256_json(RULE)}
        if self.inputs:
            read_inputs(Path(self.inputs))
            own["inputs_sha256"] = storage.sha256_file(Path(self.inputs).expanduser())
        return own

    def verbalize(
        self, backbone: Backbone, prompts: Sequence[SoftPrompt], *, kind: Kind, max_new_tokens: int
    ) -> list[list[Verbalization]]:
        """One text per prompt, of as many whole answers as ``max_new_tokens`` has room for.

        Raises:
            ConfigError: the model is no decoder-only one, or inputs and answers do not fit its context.
            DataError: a prompt for which ``inputs`` has none.
        """

        def fits(text: str) -> bool:
            return len(backbone.tokenizer.encode(text, add_special_tokens=False)) <= max_new_tokens

        out = []
        for found in self.answers(backbone, prompts, kind):
            often = {text: share for text, share in found.items() if share >= self.min_share}
            kept = named(found) if kind == "instructions" else list(often)
            write = partial(instruction, found) if kind == "instructions" else ", ".join
            while kept and not fits(write(kept)):
                kept.pop()
            text, shown = write(kept), often | {text: found[text] for text in kept}
            details = {"answers": {text: round(share, 4) for text, share in shown.items()}, "kept": len(kept)}
            out.append([Verbalization(text if fits(text) else "", sum(found[text] for text in kept), details)])
        return out

    def answers(self, backbone: Backbone, prompts: Sequence[SoftPrompt], kind: Kind) -> list[dict[str, float]]:
        """Each prompt's different answers with their shares of its samples, the most frequent first; empty ones are left out.

        Raises:
            As for :meth:`verbalize`.
        """
        if backbone.is_seq2seq or not backbone.has_keys:
            raise ConfigError(f"Method {self.method!r} needs a decoder-only model, which {backbone.name} is not.")
        given = read_inputs(Path(self.inputs)) if self.inputs else None
        asked: list[Asked] = []
        first_row = 0
        for index, prompt in enumerate(prompts):
            slot = virtual_ids(first_row, prompt.n)
            first_row += prompt.n
            inputs = inputs_of(prompt, given) if given else [FORMS[kind].format(text) for text in NEUTRAL]
            for text in inputs:
                context = tuple(with_slot(backbone, prompt, slot, text))
                for sample in range(self.samples):
                    stream = storage.seed_from(self.seed, prompt.id, text, sample)
                    asked.append(Asked(index, context, stream))
        longest = max((len(a.context) for a in asked), default=0) + self.answer_tokens
        backbone.check_room(longest, "Leave out the longest inputs.")
        run = partial(self._draw, backbone, backbone.stack(prompts), asked)
        texts: dict[int, str] = {}
        for batch in batches(range(len(asked)), lambda i: len(asked[i].context) + self.answer_tokens, None):
            texts.update(zip(batch, halving(run, batch, Counters()), strict=True))
        found: list[list[str]] = [[] for _ in prompts]
        for i, a in enumerate(asked):
            found[a.prompt].append(texts[i])
        shares = [{pool[0]: len(pool) / len(own) for pool in pooled(own, lambda text: text) if pool[0]} for own in found]
        if kind == "labels":
            return shares
        return [without_order(own, prompt.id) for own, prompt in zip(shares, prompts, strict=True)]

    @torch.no_grad()
    def _draw(self, backbone: Backbone, rows: Tensor, asked: Sequence[Asked], batch: Sequence[int]) -> list[str]:
        """The first line of one answer to each request of ``batch``."""
        new = generate(
            backbone,
            rows,
            [asked[i].context for i in batch],
            max_new_tokens=self.answer_tokens,
            finished=lambda ids: "\n" in str(backbone.tokenizer.decode(ids)).lstrip(),
            sampling=Sampling(do_sample=True, temperature=self.temperature, top_k=self.top_k),
            seeds=[asked[i].seed for i in batch],
        )
        texts = (backbone.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) for ids in new)
        return [str(text).strip().partition("\n")[0].strip(" ,.") for text in texts]


@dataclass(frozen=True)
class Asked:
    """One answer to draw: the index of its prompt, the ids before it, the seed of its random stream."""

    prompt: int
    context: tuple[int, ...]
    seed: int
