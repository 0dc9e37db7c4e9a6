"""An encoder that needs no weights: words hashed to random directions, so that texts with common words are alike."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from lm_eval_softverb.metrics import similarity, tasks
from lm_eval_softverb.metrics.similarity import Encoder


def _rows(texts: list[str]) -> np.ndarray:
    rows = []
    for text in texts:
        seeds = [
            int(hashlib.sha256(word.encode()).hexdigest()[:15], 16) for word in ["", *text.lower().replace(",", " ").split()]
        ]
        rows.append(sum(np.random.default_rng(seed).normal(size=16) for seed in seeds))
    return np.array(rows)


@pytest.fixture(scope="session")
def hashed_rows():
    """Texts [N] → rows [N, 16], not of unit length."""
    return _rows


@pytest.fixture
def hashing(monkeypatch, hashed_rows):
    """Stands in for MiniLM; ``.seen`` lists what was really encoded. Texts of more than twenty words are cut."""
    seen: list[list[str]] = []

    def encode(texts):
        seen.append(list(texts))
        return hashed_rows(texts)

    encoder = Encoder(encode, lambda text: len(text.split()) > 20)
    encoder.seen = seen
    monkeypatch.setattr(similarity, "default", lambda: encoder)
    tasks._ranks.cache_clear()
    yield encoder
    tasks._ranks.cache_clear()
