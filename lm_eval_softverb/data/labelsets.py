"""The label sets shipped with the package: twelve small classification tasks, described in ``labelsets.md``."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_softverb.errors import ConfigError, did_you_mean
from lm_eval_softverb.storage import read_jsonl

if TYPE_CHECKING:
    from datasets import Dataset

FILE = Path(__file__).with_name("labelsets.jsonl")
SPLITS = {"train": "train", "heldout": "test"}
"""Split in the file → split on offer."""


@functools.cache
def _rows() -> dict[str, list[dict[str, str]]]:
    """Label set → its rows, both in the order of the file."""
    grouped: dict[str, list[dict[str, str]]] = {}
    for _, row in read_jsonl(FILE):
        grouped.setdefault(row["labelset"], []).append(row)
    return grouped


def names() -> list[str]:
    """The label sets in the order of the file."""
    return list(_rows())


def label_words(labelset: str) -> list[str]:
    """The five labels of a label set, in the order in which its rows first show them.

    Raises:
        ConfigError: no label set of that name.
    """
    if labelset not in _rows():
        raise ConfigError(f"There is no label set {labelset!r}. {did_you_mean(labelset, names())}")
    return list(dict.fromkeys(row["label"] for row in _rows()[labelset]))


def load(labelset: str, **_: Any) -> dict[str, Dataset]:
    """Reads one label set; tasks call it through ``custom_dataset``, which also passes all of lm_eval's metadata.

    Returns:
        ``train`` and ``test`` (the held-out rows) with the columns of :func:`lm_eval_softverb.data.benchmarks.load`:
        ``text``, ``label`` (index into the label words) and ``choices`` (the label words).

    Raises:
        ConfigError: no label set of that name.
    """
    words = label_words(labelset)
    from datasets import Dataset

    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS.values()}
    for row in _rows()[labelset]:
        uniform = {"text": row["text"], "label": words.index(row["label"]), "choices": words}
        splits[SPLITS[row["split"]]].append(uniform)
    return {split: Dataset.from_list(rows) for split, rows in splits.items()}
