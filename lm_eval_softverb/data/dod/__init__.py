"""Datasets of datasets (DoDs): many small tasks, each with rows to tune on, rows held out, and a text that says what it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from lm_eval_softverb.data.rows import Row


@dataclass(frozen=True)
class DodTask:
    """One task of a DoD.

    Attributes:
        name: unique within the DoD, a valid file name.
        split: ``train`` or ``test``: whether a translator may learn from this task's prompt.
        train: rows a soft prompt may be tuned on; its own validation rows are taken from them.
        heldout: rows for scoring, never trained on.
        labels: the label set, for classification.
        instruction: the ground-truth hard prompt; empty where ``labels`` are it.
        info: source corpora, domain, hashes, counts; free-form JSON.
    """

    name: str
    split: str
    train: tuple[Row, ...]
    heldout: tuple[Row, ...]
    labels: tuple[str, ...] = ()
    instruction: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)


class Dod(Protocol):
    """A DoD that is open: names at once, rows on demand."""

    @property
    def kind(self) -> str:
        """``general`` (instructions) or ``classification`` (label sets)."""
        ...

    @property
    def sha256(self) -> str:
        """Hash of the files it is read from and of how they are read."""
        ...

    def reference(self) -> dict[str, Any]:
        """What a bank's manifest records as ``dod``: kind, source, settings and hash, enough to open it again."""
        ...

    def names(self, split: str | None = None) -> list[str]:
        """The tasks in a fixed order."""
        ...

    def task(self, name: str) -> DodTask:
        """One task with its rows.

        Raises:
            ConfigError: no task of that name.
            DataError: rows that cannot be used.
        """
        ...
