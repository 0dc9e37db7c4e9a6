"""Self-verbalization: the frozen model says in a chat turn what a command with the soft prompt in it means (section 8)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from lm_eval_softverb import storage
from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.batching import Counters, batches, halving
from lm_eval_softverb.chat import render_chat
from lm_eval_softverb.decoding import Sampling, generate
from lm_eval_softverb.errors import ConfigError, FrameError
from lm_eval_softverb.frame import SLOT, Frame, mark_slots, splice, virtual_ids
from lm_eval_softverb.prompt import SoftPrompt
from lm_eval_softverb.verbalizers import Kind
from lm_eval_softverb.verbalizers.answers import confidences, pooled
from lm_eval_softverb.verbalizers.base import Verbalization
from lm_eval_softverb.verbalizers.nearest import special_ids

COMMANDS = "{commands}"
QUESTIONS: Mapping[str, str] = {
    "labels": (
        f"The command {COMMANDS} tells you to answer with one label out of a fixed set. "
        "Which labels are in that set? Write only the labels, separated by commas."
    ),
    "instructions": f"In one or two sentences, explain what the command {COMMANDS} asks you to do.",
}


@dataclass(frozen=True)
class SelfVerb:
    """The model's own answer to what a command means; the virtual tokens stand inside the quoted command.

    Greedy answers come surest first; the confidence is exp(mean log-probability of the answer's tokens), 0 for an empty
    answer. Samples come as their distribution: texts that differ in case, blanks or outer punctuation only are one, with
    the spelling that came first; the confidence is its share. An answer ends with the turn. Without a chat template the
    question is plain text, "Question: … Answer:", and the answer is one line; ``details["chat"]`` says which it was, and
    ``details["cut"]`` whether ``max_new_tokens`` ended it.

    Attributes:
        frames: what to ask about, separated by "|", e.g. ``"Please §.|Be §."``. Empty: the prompt's own frame where it has
            words, else ``§``.
        per_frame: one question per frame instead of one over all.
        question: with ``{commands}`` where the quoted frames go. Empty: :data:`QUESTIONS`, by kind.
        samples: 0 is greedy; otherwise how many to draw per question, from all tokens.
        temperature: of the samples.
        seed: of the samples; each also depends on the prompt's id and its number, and on nothing else.
        words_only: the control without the soft prompt: the same question with nothing in the slots.
        prefill: beginning of the answer, put in the model's mouth and not part of the text.
    """

    method: ClassVar[str] = "selfverb"

    frames: str = ""
    per_frame: bool = False
    question: str = ""
    samples: int = 0
    temperature: float = 1.0
    seed: int = 0
    words_only: bool = False
    prefill: str = ""

    def __post_init__(self) -> None:
        for text in self._own_frames():
            Frame("user_start", text)  # raises unless it has exactly one slot
        if self.question and (self.question.count(COMMANDS) != 1 or SLOT in self.question):
            raise ConfigError(
                f"A question has {COMMANDS} exactly once and no slot '{SLOT}' of its own, got {self.question!r}. "
                f"Example: 'What does {COMMANDS} mean?'"
            )
        if self.samples < 0:
            raise ConfigError(f"samples is {self.samples}, expected 0 (greedy) or the number of samples to draw.")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature is {self.temperature}, expected more than 0. Greedy answers: samples=0.")

    def verbalize(
        self, backbone: Backbone, prompts: Sequence[SoftPrompt], *, kind: Kind, max_new_tokens: int
    ) -> list[list[Verbalization]]:
        """One text per prompt and question, or the distribution of its samples; an answer does not depend on its batch.

        Raises:
            ConfigError: the model is no decoder-only one, or a question and its answer do not fit its context.
        """
        if backbone.is_seq2seq or not backbone.has_keys:
            raise ConfigError(
                f"Method {self.method!r} asks a decoder-only model with a cache of keys and values, which {backbone.name} "
                "is not. Use the model's chat version, or method 'nearest'."
            )
        questions = self._questions(backbone, prompts, kind)
        longest = max((len(q.ids) for q in questions), default=0) + max_new_tokens
        backbone.check_room(longest, "Ask about fewer frames at a time (per_frame=true), or lower max_new_tokens.")
        rows, ends = backbone.stack(prompts), end_of_turn_ids(backbone)
        run = partial(_answer, backbone, rows, questions, max_new_tokens, self._sampling(), ends)
        answers: dict[int, Answer] = {}
        for batch in batches(range(len(questions)), lambda i: len(questions[i].ids) + max_new_tokens, None):
            answers.update(zip(batch, halving(run, batch, Counters()), strict=True))
        found: list[list[Answer]] = [[] for _ in prompts]
        for i, question in enumerate(questions):
            found[question.prompt].append(answers[i])
        return [_distribution(a) if self.samples else _surest_first(a) for a in found]

    def _own_frames(self) -> list[str]:
        return [part.strip() for part in self.frames.split("|")] if self.frames else []

    def _sampling(self) -> Sampling:
        return Sampling(do_sample=True, temperature=self.temperature, top_k=0) if self.samples else Sampling()

    def _questions(self, backbone: Backbone, prompts: Sequence[SoftPrompt], kind: Kind) -> list[Question]:
        asked, first_row = [], 0
        for index, prompt in enumerate(prompts):
            virtual = [] if self.words_only else virtual_ids(first_row, prompt.n)
            first_row += prompt.n
            frames = tuple(self._own_frames()) or (prompt.frame.text,)  # a frame without words is a bare slot
            for group in [(frame,) for frame in frames] if self.per_frame else [frames]:
                ids = self._encode(backbone, group, virtual, kind)
                for sample in range(max(1, self.samples)):
                    stream = storage.seed_from(self.seed, prompt.id, sample)
                    asked.append(Question(index, group, ids, stream, bool(backbone.tokenizer.chat_template)))
        return asked

    def _encode(self, backbone: Backbone, frames: Sequence[str], virtual: Sequence[int], kind: Kind) -> tuple[int, ...]:
        """Ids of the question about ``frames``, rendered for the model to answer."""
        tokenizer = backbone.tokenizer

        commands = " or ".join(f'"{frame}"' for frame in frames)
        text = mark_slots((self.question or QUESTIONS[kind]).replace(COMMANDS, commands))
        prefill = self.prefill
        if tokenizer.chat_template:
            text, _ = render_chat(tokenizer, [{"role": "user", "content": text}], True, {})
        else:
            text, prefill = f"Question: {text}\nAnswer:", prefill and f" {prefill}"
        return tuple(splice(text, [virtual] * len(frames), backbone.tokenize, prefill))


@dataclass(frozen=True)
class Question:
    """One row to generate: whose it is, what it asks about, its ids, the seed of its random stream, a chat turn or text."""

    prompt: int
    frames: tuple[str, ...]
    ids: tuple[int, ...]
    seed: int
    chat: bool


@dataclass(frozen=True)
class Answer:
    """What came back; ``cut``: it was not over after ``max_new_tokens``."""

    question: Question
    text: str
    confidence: float | None
    cut: bool

    def details(self) -> dict[str, Any]:
        return {"frames": list(self.question.frames), "chat": self.question.chat, "cut": self.cut}


def _surest_first(answers: Sequence[Answer]) -> list[Verbalization]:
    ordered = sorted(answers, key=lambda a: a.confidence or 0.0, reverse=True)
    return [Verbalization(a.text, a.confidence, a.details()) for a in ordered]


def _distribution(answers: Sequence[Answer]) -> list[Verbalization]:
    """The different texts among samples, the most frequent first; the shares of a prompt sum to 1."""
    out = []
    for pool in pooled(answers, lambda answer: answer.text):
        share = len(pool) / len(answers)
        frames = list(dict.fromkeys(frame for a in pool for frame in a.question.frames))
        counts = {"count": len(pool), "share": share, "frames": frames, "cut": any(a.cut for a in pool)}
        out.append(Verbalization(pool[0].text, share, pool[0].details() | counts))
    return out


@torch.no_grad()
def _answer(
    backbone: Backbone,
    rows: Tensor,
    questions: Sequence[Question],
    max_new_tokens: int,
    sampling: Sampling,
    ends: frozenset[int],
    batch: Sequence[int],
) -> list[Answer]:
    """Answers to the questions of one batch, given by index; ``ends`` are ids that end a turn."""
    asked = [questions[i] for i in batch]
    contexts = [q.ids for q in asked]
    finished = _stopper(backbone, ends)
    new = generate(
        backbone,
        rows,
        contexts,
        max_new_tokens=max_new_tokens,
        finished=finished,
        sampling=sampling,
        seeds=[q.seed for q in asked],
    )
    cut = [len(ids) == max_new_tokens and not finished(ids) for ids in new]
    new = [ids[:-1] if ids and ids[-1] in ends else ids for ids in new]
    sure: Sequence[float | None] = [None] * len(new)
    if not sampling.do_sample:
        sure = confidences(backbone, rows, contexts, new)
    return [Answer(q, _text(backbone, ids), confidence, c) for q, ids, confidence, c in zip(asked, new, sure, cut, strict=True)]


def _stopper(backbone: Backbone, ends: frozenset[int]) -> Callable[[list[int]], bool]:
    """Whether an answer is over; end-of-sequence ids end it anyway. Text without turns goes on for ever: one line counts."""
    if backbone.tokenizer.chat_template:
        return lambda ids: bool(ids) and ids[-1] in ends
    return lambda ids: "\n" in str(backbone.tokenizer.decode(ids)).lstrip()


def _text(backbone: Backbone, ids: Sequence[int]) -> str:
    text = str(backbone.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip()
    return text if backbone.tokenizer.chat_template else text.partition("\n")[0].rstrip()


def end_of_turn_ids(backbone: Backbone) -> frozenset[int]:
    """The special token with which the chat template closes the assistant's turn; not every model names it as its EOS."""
    if not backbone.tokenizer.chat_template:
        return frozenset()
    probe = "end-of-turn-probe"
    turns = [{"role": r, "content": c} for r, c in (("user", "?"), ("assistant", probe), ("user", "?"))]
    try:
        rendered, _ = render_chat(backbone.tokenizer, turns, True, {})
    except FrameError:  # a template for one question and its answer only; what EOS ids the model has must do
        return frozenset()
    after = rendered.partition(probe)[2].lstrip()
    return frozenset(backbone.tokenizer.encode(after, add_special_tokens=False)[:1]) & special_ids(backbone)
