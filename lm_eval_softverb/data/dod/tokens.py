"""How many tokens a text has, for the length filter of a DoD: by a tokenizer, or by a rule that needs none."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lm_eval_softverb.errors import ModelUnavailable

_PIECES = re.compile(r"[^\W\d_]+|\d|[^\w\s]|_")


@dataclass(frozen=True)
class TokenCounter:
    """Counts tokens of many texts at once, special tokens left out.

    Attributes:
        name: of the tokenizer; counts under one name are taken to be equal.
        count: texts [N] → lengths [N].
    """

    name: str
    count: Callable[[Sequence[str]], list[int]]

    @classmethod
    def load(cls, name: str, folder: str | None = None) -> TokenCounter:
        """The tokenizer of a model.

        Args:
            name: what to record, and the hub id or folder to load where ``folder`` does not say.
            folder: where it is, e.g. ``pretrained.locate(name)``.

        Raises:
            ModelUnavailable: it is neither on disk nor reachable.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder or name)
        except (OSError, ValueError) as error:
            raise ModelUnavailable(
                f"The tokenizer {name} is neither on disk nor reachable ({error}). Pass the folder of a model, or a hub id."
            ) from error

        def count(texts: Sequence[str]) -> list[int]:
            return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]

        return cls(name, count)


def _pieces(texts: Sequence[str]) -> list[int]:
    return [len(_PIECES.findall(text)) for text in texts]


PIECES = TokenCounter("pieces", _pieces)
"""Runs of letters, single digits and single signs: about .9 tokens of a 49k vocabulary (correlation .99 on 20,000 rows)."""
