"""The one slot every prompt fills: where virtual tokens stand in the text, and how that becomes token ids.

A **virtual token** is a negative token id: ``-1 - r`` stands for row ``r`` of a matrix of prompt rows. Prefixes, frames
inside a chat turn, and banks of prompts are then all plain id sequences: lengths, truncation, sorting and grouping need no
special case, and only :meth:`Backbone.embed` knows that some rows come from a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from lm_eval_softverb.errors import ArtifactError, FrameError, did_you_mean

Placement = Literal["prefix", "after_bos", "user_start", "user_end"]
PLACEMENTS: tuple[str, ...] = get_args(Placement)
SLOT = "§"

# In a chat the slot has to travel through the harness inside a string. It is a private-use character followed by "§"; the
# same character inside a document becomes character + "0" first and is restored at tokenization, so no text can forge it.
_ESCAPE = "\ue5f7"
_LITERAL = _ESCAPE + "0"
_MARK = _ESCAPE + SLOT


@dataclass(frozen=True)
class Frame:
    """Where the n virtual tokens of a prompt stand.

    Attributes:
        placement: ``prefix`` before everything, BOS included (Lester et al. 2021; what PEFT does); ``after_bos`` between
            BOS and the text; ``user_start`` / ``user_end``: ``text`` with its slot opens or closes the user's turn.
        text: exactly one ``§``; only the user placements may have words around it, e.g. ``"Please §."``.
    """

    placement: Placement = "prefix"
    text: str = SLOT

    def __post_init__(self) -> None:
        if self.placement not in PLACEMENTS:
            raise FrameError(f"Unknown placement {self.placement!r}. {did_you_mean(self.placement, list(PLACEMENTS))}")
        if self.text.count(SLOT) != 1:
            raise FrameError(
                f"A frame needs exactly one slot '{SLOT}', got {self.text.count(SLOT)} in {self.text!r}. "
                f"Example: 'Please {SLOT}.'"
            )
        if not self.in_user_turn and self.text != SLOT:
            raise FrameError(
                f"Placement '{self.placement}' takes no words around the slot, got {self.text!r}. "
                "Use placement 'user_start' or 'user_end' for a frame."
            )

    @property
    def in_user_turn(self) -> bool:
        return self.placement in ("user_start", "user_end")

    def to_json(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Frame:
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            raise ArtifactError(f"A frame is an object with 'placement' and 'text', got {value!r}.")
        try:
            return cls(placement=value.get("placement", "prefix"), text=value.get("text", SLOT))
        except FrameError as error:
            raise ArtifactError(str(error)) from error

    def wrap(self, content: str) -> str:
        """The user's ``content`` with the frame and its slot mark inside; other placements return it unchanged."""
        if not self.in_user_turn:
            return content
        frame, content = mark_slots(self.text), escape(content)
        return f"{frame} {content}" if self.placement == "user_start" else f"{content} {frame}"

    def wrap_chat(self, messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
        """``messages`` with the frame in the last user turn and every other content escaped.

        Raises:
            FrameError: there is no user turn to put the frame in.
        """
        users = [i for i, m in enumerate(messages) if m["role"] == "user"]
        if self.in_user_turn and not users:
            raise FrameError(f"Frame {self.text!r} belongs in a user turn, but the chat has none: {list(messages)[:3]!r}.")
        if not self.in_user_turn:
            return [dict(m) for m in messages]
        return [
            {**m, "content": self.wrap(m["content"]) if i == users[-1] else escape(m["content"])}
            for i, m in enumerate(messages)
        ]

    def encode(
        self,
        text: str,
        virtual: Sequence[int],
        tokenize: Callable[[str, bool], list[int]],
        bos: int | None = None,
        *,
        rendered: bool = False,
        continuation: str = "",
    ) -> list[int]:
        """Token ids of ``text`` with the prompt's virtual ids in their place.

        Args:
            text: what the model reads. With ``rendered`` it went through :meth:`wrap_chat` and carries the slot mark;
                otherwise a user-turn frame is put around the whole of it.
            virtual: negative ids of this prompt, n of them; empty means no prompt at all.
            tokenize: ``(text, first) -> ids``; special tokens may be added only where ``first`` is true.
            bos: beginning-of-sequence id, needed by ``after_bos``.
            rendered: see ``text``.
            continuation: an answer to ``text``; it follows the frame, whatever it contains.

        Raises:
            FrameError: not one slot in a rendered text, or no BOS token where one is needed.
        """
        if self.in_user_turn:
            return splice(text if rendered else self.wrap(text), [virtual], tokenize, continuation)
        text += continuation
        if self.placement == "prefix":
            return [*virtual, *tokenize(text, True)]
        if bos is None:
            raise FrameError("Placement 'after_bos' needs a tokenizer with a BOS token. Use placement 'prefix'.")
        ids = tokenize(text, True)
        return [bos, *virtual, *(ids[1:] if ids[:1] == [bos] else ids)]


def escape(text: str) -> str:
    """Makes ``text`` safe to stand beside a slot mark; :func:`unescape` restores it exactly."""
    return text.replace(_ESCAPE, _LITERAL)


def unescape(text: str) -> str:
    return text.replace(_LITERAL, _ESCAPE)


def mark_slots(text: str) -> str:
    """``text`` with a slot mark for every ``§`` and all else escaped, so that it can be rendered and then spliced."""
    return _MARK.join(escape(part) for part in text.split(SLOT))


def split_slots(marked: str, n: int) -> list[str]:
    """The ``n + 1`` texts around the slot marks, as they were before escaping.

    Raises:
        FrameError: another number of marks than ``n``.
    """
    parts = marked.split(_MARK)
    if len(parts) != n + 1:
        raise FrameError(
            f"The chat template dropped the frame or repeats it: {len(parts) - 1} slots, expected {n}, in "
            f"{marked[:200]!r}. Use a template that shows the last user message once."
        )
    return [unescape(part) for part in parts]


def splice(
    marked: str,
    virtual: Sequence[Sequence[int]],
    tokenize: Callable[[str, bool], list[int]],
    continuation: str = "",
) -> list[int]:
    """Token ids of a text with slot marks, with ``virtual[i]`` in place of its i-th mark; an empty one is no prompt.

    Args:
        tokenize, continuation: as for :meth:`Frame.encode`.

    Raises:
        FrameError: another number of marks than of ``virtual``.
    """
    *parts, last = split_slots(marked, len(virtual))
    texts = [*parts, last + continuation]
    ids: list[int] = []
    first = True
    for text, slot in zip(texts, [*virtual, ()], strict=True):
        if text:
            ids, first = ids + tokenize(text, first), False
        ids += slot
    return ids


def virtual_ids(first_row: int, n: int) -> list[int]:
    """Ids of ``n`` rows starting at ``first_row`` of the prompt matrix."""
    return [-1 - r for r in range(first_row, first_row + n)]


def cut_left(ids: Sequence[int], excess: int, bos: int | None) -> list[int] | None:
    """``ids`` without the first ``excess`` tokens of their text; None if no text would be left.

    Virtual tokens stay, and so does a BOS in front where there are any: the prompt was trained beside it.
    """
    prompted = any(t < 0 for t in ids)
    cuttable = [i for i, t in enumerate(ids) if t >= 0 and not (prompted and i == 0 and t == bos)]
    if len(cuttable) <= excess:
        return None
    gone = set(cuttable[:excess])
    return [t for i, t in enumerate(ids) if i not in gone]
