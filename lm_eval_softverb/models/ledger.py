"""The request cache of our models: what ``--use_cache`` must guarantee and the harness does not.

The harness keys answers by the request's text alone, so two prompts, or two models, on one file serve each other's answers;
it also stores pickles, which run code when read. Our models keep their answers in the same file, in a table of their own,
as JSON, under keys that include the model, the prompt of that very request, and everything else that decides the answer.
A file that is damaged is set aside and counted, never half-read.
"""

from __future__ import annotations

import itertools
import json
import logging
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from lm_eval.api.model import LM, CachingLM

from lm_eval_softverb import storage
from lm_eval_softverb.errors import OutputError

log = logging.getLogger(__name__)
A = TypeVar("A")
Q = TypeVar("Q")
_TABLE = "softverb_answers_v1"


class Ledger:
    """Answers by key in one SQLite file; each is committed as it arrives, so a kill loses at most the one being written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.quarantined: str | None = None
        self.unreadable = 0
        try:
            storage.require_writable(path.parent)
            self._db = self._open()
        except sqlite3.OperationalError as error:
            raise OutputError(f"Could not open the cache {path}: {error}. Choose another --use_cache path.") from error
        except sqlite3.DatabaseError:
            names = (f"{path.name}.corrupt-{n}" for n in itertools.count(time.time_ns()))
            self.quarantined = next(name for name in names if not path.with_name(name).exists())
            path.rename(path.with_name(self.quarantined))
            log.warning("%s is damaged or no SQLite file; it is kept as %s and a new one begun.", path, self.quarantined)
            self._db = self._open()

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=NORMAL")  # safe against a killed process
            if db.execute("PRAGMA quick_check").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("quick_check failed")
            db.execute(f"CREATE TABLE IF NOT EXISTS {_TABLE} (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")
            if [column[1] for column in db.execute(f"PRAGMA table_info({_TABLE})")] != ["key", "answer"]:
                raise sqlite3.DatabaseError(f"table {_TABLE} has other columns")
        except sqlite3.DatabaseError:
            db.close()
            raise
        return db

    def get(self, key: str) -> Any:
        """The stored answer, or None; one that is no JSON is counted and as good as none."""
        found = self._db.execute(f"SELECT answer FROM {_TABLE} WHERE key = ?", (key,)).fetchone()
        try:
            return json.loads(found[0]) if found else None
        except (ValueError, TypeError, RecursionError):
            self.unreadable += 1
            return None

    def put(self, key: str, answer: Any) -> None:
        try:
            self._db.execute(f"INSERT OR REPLACE INTO {_TABLE} VALUES (?, ?)", (key, json.dumps(answer)))
        except sqlite3.OperationalError as error:
            raise OutputError(
                f"Could not add an answer to the cache {self.path}: {error}. Answers so far are kept; "
                "free some space and run the same command again."
            ) from error

    def close(self) -> None:
        self._db.close()


@runtime_checkable
class KeepsLedger(Protocol):
    """A model that caches its own requests."""

    ledger: Ledger | None


class _NoCache(dict[str, Any]):
    """Stands where the harness's own cache was: always empty, forgets what it is told, so every request reaches the model."""

    def __setitem__(self, key: str, value: Any) -> None:
        pass

    def commit(self) -> None:
        pass


def install() -> None:
    """Makes ``--use_cache`` hand its file to models that keep a ledger; other models keep the harness's own cache."""
    if getattr(CachingLM, "_softverb", False):
        return
    stock = CachingLM.__init__

    def __init__(self: CachingLM, lm: LM, cache_db: str) -> None:
        if not isinstance(lm, KeepsLedger):
            stock(self, lm, cache_db)
            return
        self.lm, self.cache_db, self.dbdict = lm, cache_db, _NoCache()
        lm.ledger = Ledger(Path(cache_db))
        self.lm.set_cache_hook(self.get_cache_hook())

    CachingLM.__init__ = __init__
    CachingLM._softverb = True


def answered(
    ledger: Ledger | None,
    requests: Sequence[Q],
    key: Callable[[Q, int], str | None],
    compute: Callable[[list[Q], Callable[[int, A], None]], list[A]],
    restore: Callable[[Any], A] = lambda value: value,
    store: Callable[[A], Any] = lambda answer: answer,
) -> tuple[list[A], int]:
    """Answers from the ledger where it has them, from ``compute`` otherwise.

    Args:
        key: key of a request given how often the same one came before; None means never cached.
        compute: answers the missing requests in order and reports each ``(index, answer)`` as soon as it is known.
        restore: turns the JSON value back into an answer.
        store: turns an answer into a JSON value.

    Returns:
        All answers in order, and how many came from the ledger.
    """
    if ledger is None:
        return compute(list(requests), lambda _i, _a: None), 0
    keys: list[str | None] = []
    seen: dict[str, int] = {}
    for request in requests:
        first = key(request, 0)
        if first is None:
            keys.append(None)
            continue
        repeat = seen[first] = seen.get(first, -1) + 1
        keys.append(key(request, repeat))
    answers: list[Any] = [ledger.get(k) if k is not None else None for k in keys]
    missing = [i for i, a in enumerate(answers) if a is None]
    answers = [None if a is None else restore(a) for a in answers]

    def done(index: int, answer: A) -> None:
        k = keys[missing[index]]
        if k is not None:
            ledger.put(k, store(answer))

    if missing:
        for i, answer in zip(missing, compute([requests[i] for i in missing], done), strict=True):
            answers[i] = answer
    return answers, len(requests) - len(missing)
