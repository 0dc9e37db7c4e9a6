"""From the strings of a request to token ids with the prompt in its slot: the harness's splitting rules, kept exactly."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

from lm_eval_softverb.batching import Counters
from lm_eval_softverb.errors import DataError
from lm_eval_softverb.frame import Frame, cut_left, virtual_ids
from lm_eval_softverb.models.scoring import Ids
from lm_eval_softverb.prompt import SoftPrompt


class Tokenizes(Protocol):
    """What is needed of the harness's model: its tokenization, with its rules for special tokens."""

    backend: str

    @property
    def window(self) -> int: ...
    @property
    def prefix_token_id(self) -> int: ...
    @property
    def bos_token_id(self) -> int | None: ...
    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]: ...


class Slots:
    """Encodes requests for a set of prompts; ``place`` is the index of a request's prompt, None means no prompt.

    Attributes:
        chat: texts were rendered by a chat template and carry the slot mark where a frame belongs in the user's turn.
    """

    def __init__(self, lm: Tokenizes, prompts: Sequence[SoftPrompt], counters: Counters) -> None:
        self.lm = lm
        self.prompts = prompts
        self.counters = counters
        self.chat = False
        self._virtual: list[list[int]] = []
        for prompt in prompts:
            self._virtual.append(virtual_ids(sum(map(len, self._virtual)), prompt.n))

    def context(self, text: str, place: int | None, continuation: str = "") -> list[int]:
        """Ids of a context with its prompt in place, and of the continuation behind it."""
        if place is None:
            return list(self.lm.tok_encode(text + continuation))
        frame = self.prompts[place].frame

        def tokenize(part: str, first: bool) -> list[int]:
            return list(self.lm.tok_encode(part) if first else self.lm.tok_encode(part, add_special_tokens=False))

        def plain(part: str, _first: bool) -> list[int]:
            return tokenize(part, False)

        rendered = self.chat and frame.in_user_turn
        virtual, bos = self._virtual[place], self.lm.bos_token_id
        if frame.in_user_turn and self.lm.backend == "seq2seq":
            before, after = self._specials  # encoders read an end of sequence, behind the whole turn
            return [*before, *frame.encode(text, virtual, plain, bos, rendered=rendered), *after]
        return frame.encode(text, virtual, tokenize, bos, rendered=rendered, continuation=continuation)

    def whole(self, text: str, place: int | None) -> Ids:
        """Ids of a context to be continued; never empty."""
        return tuple(self.context(text, place)) or (self.lm.prefix_token_id,)

    @cached_property
    def _specials(self) -> tuple[list[int], list[int]]:
        """Ids that the tokenizer puts before and behind every text."""
        inner, whole = list(self.lm.tok_encode("a", add_special_tokens=False)), list(self.lm.tok_encode("a"))
        start = next(i for i in range(len(whole)) if whole[i : i + len(inner)] == inner)
        return whole[:start], whole[start + len(inner) :]

    def request(self, context: str, continuation: str, place: int | None) -> tuple[Ids, Ids]:
        """Ids of context and continuation. As in HFLM, trailing blanks of the context belong to the continuation."""
        if context == "":
            # As HFLM: BOS (or EOS) stands for the empty context, unless the continuation brings it.
            ids = list(self.lm.tok_encode(continuation, add_special_tokens=False))
            bos = self.lm.prefix_token_id
            head, rest = ([bos], ids) if ids[:1] != [bos] else (ids[:1], ids[1:])
            return tuple(self.lead(head, place)), tuple(rest)
        if blanks := len(context) - len(context.rstrip()):
            context, continuation = context[:-blanks], context[-blanks:] + continuation
        if self.lm.backend == "seq2seq":
            return tuple(self.context(context, place)), tuple(self.lm.tok_encode(continuation, add_special_tokens=False))
        head_ids = self.context(context, place)
        return tuple(head_ids), tuple(self.context(context, place, continuation)[len(head_ids) :])

    def lead(self, ids: list[int], place: int | None) -> list[int]:
        """``ids`` with the prompt in front, for text without a user turn (rolling windows, empty contexts)."""
        if place is None:
            return ids
        frame = self.prompts[place].frame
        plain = Frame() if frame.in_user_turn else frame
        return plain.encode("", self._virtual[place], lambda _t, _f: ids, self.lm.bos_token_id)

    def fit(self, context: Ids, room: int) -> Ids:
        """``context`` cut on the left to ``room`` ids and counted; virtual tokens and the BOS beside them stay.

        Raises:
            DataError: no text would be left.
        """
        excess = len(context) - room
        if excess <= 0:
            return context
        cut = cut_left(context, excess, self.lm.bos_token_id)
        if cut is None:
            raise DataError(
                f"A request needs more room than the model's context of {self.lm.window} tokens leaves: {len(context)} "
                f"context tokens, {room} fit. Shorten the continuation or max_gen_toks, or use a longer context."
            )
        self.counters.truncated += 1
        return tuple(cut)
