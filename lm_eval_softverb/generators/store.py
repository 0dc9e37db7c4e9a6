"""The classification DoD's file while it is being written: one transaction per label set, one writer at a time."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lm_eval_softverb import storage
from lm_eval_softverb.data.dod.classification import FORMAT, SCHEMA
from lm_eval_softverb.errors import ArtifactError, OutputError


class Store:
    """An open file; use :func:`open_store`."""

    def __init__(self, path: Path, db: sqlite3.Connection) -> None:
        self.path = path
        self._db = db

    def get(self, key: str, default: Any = None) -> Any:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return json.loads(row[0]) if row else default

    def put(self, **values: Any) -> None:
        """Sets values of ``meta`` in one transaction."""
        with self._transaction():
            self._put(values)

    def label_sets(self) -> Iterator[tuple[int, list[str]]]:
        """``(dataset id, labels)`` in the order of generation."""
        rows = self._db.execute("SELECT dataset_id, keyword FROM keywords ORDER BY id").fetchall()
        sets: dict[int, list[str]] = {}
        for dataset, keyword in rows:
            sets.setdefault(dataset, []).append(keyword)
        yield from sets.items()

    def sentences(self) -> Iterator[str]:
        for (text,) in self._db.execute("SELECT sentence FROM sentences"):
            yield text

    def add(self, dataset: int, seed_words: Sequence[str], found: Mapping[str, Sequence[str]], **meta: Any) -> None:
        """One label set with its sentences, and values of ``meta``: all of it or nothing."""
        with self._transaction():
            if found:
                self._db.execute("INSERT INTO datasets VALUES (?, ?)", (dataset, " ".join(seed_words)))
            for label, sentences in found.items():
                keyword = self._db.execute(
                    "INSERT INTO keywords (dataset_id, keyword) VALUES (?, ?)", (dataset, label)
                ).lastrowid
                self._db.executemany(
                    "INSERT INTO sentences (keyword_id, sentence) VALUES (?, ?)", [(keyword, s) for s in sentences]
                )
            self._put(meta)

    def _put(self, values: Mapping[str, Any]) -> None:
        rows = [(key, json.dumps(value, sort_keys=True)) for key, value in values.items()]
        self._db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", rows)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            with self._db:
                yield
        except sqlite3.Error as error:
            raise OutputError(
                f"Could not write to {self.path}: {error}. Label sets written before are kept; free some space and run the "
                "same command again."
            ) from error


@contextmanager
def open_store(path: Path, config: Mapping[str, Any]) -> Iterator[Store]:
    """Opens ``path`` for going on, or makes it.

    Raises:
        ArtifactError: it holds another config's label sets or is no such file; it is left as it is.
        OutputError: not writable, or another process is writing it.
    """
    from filelock import FileLock, Timeout

    storage.require_writable(path.parent)
    digest = storage.sha256_json(config)
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputError(f"Another process is writing {path}; wait for it or choose another --out.") from error
    try:
        fresh = not path.exists() or path.stat().st_size == 0
        db = sqlite3.connect(path)
        try:
            store = Store(path, db)
            if fresh:
                with store._transaction():
                    db.executescript(f"BEGIN; {SCHEMA}")
                    store._put({"format": FORMAT, "config": dict(config), "config_sha256": digest})
            found = store.get("config_sha256")
            if found != digest or store.get("format") != FORMAT:
                raise ArtifactError(
                    f"{path} was made with other settings, words, prompts or another model (config {str(found)[:12]}, this one "
                    f"{digest[:12]}). Choose another --out, or repeat the first run's settings to go on."
                )
            yield store
        except sqlite3.Error as error:
            raise ArtifactError(f"{path} is not a file of `softverb dod generate` ({error}). Choose another --out.") from error
        finally:
            db.close()
    finally:
        lock.release()
