"""The general DoD: tasks of Super-NaturalInstructions with their definitions as ground truth (arXiv 2605.27642).

The paper's filters: English default split, at least 500 instances of at most 400 tokens, alternative outputs unwound into
rows, 500 rows per task, the source's own train/test split. Corrected: at least 100 of the rows are held out, and no input
stands on both sides; see :mod:`lm_eval_softverb.data.dod.draw`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lm_eval_softverb import storage
from lm_eval_softverb.data.dod import DodTask
from lm_eval_softverb.data.dod.draw import Settings, count_short, draw, hold_out, n_inputs
from lm_eval_softverb.data.dod.sources import Source, find
from lm_eval_softverb.data.dod.tokens import TokenCounter
from lm_eval_softverb.data.rows import data_sha256
from lm_eval_softverb.errors import ArtifactError, ConfigError, DataError

VERSION = 1  # of the way rows are drawn and held out
PAPER = {"train": 539, "test": 96}
"""Tasks in the paper's two splits."""

NO_DATA, UNREADABLE, LANGUAGE = "no data", "unreadable", "not English"
TOO_FEW, TOO_LONG, TOO_ALIKE = "too few instances", "too few instances that are short enough", "one input only"
_SAVE_EVERY = 25  # verdicts; a clone takes minutes to read


@dataclass(frozen=True)
class Verdict:
    """Whether a task of the default split is in the DoD.

    Attributes:
        reason: why not; empty where it passes.
        instances: how many the source has.
        short: how many of them are short enough; counting stops at ``min_instances``.
    """

    name: str
    split: str
    reason: str = ""
    instances: int = 0
    short: int = 0


@dataclass
class GeneralDod:
    """See :class:`lm_eval_softverb.data.dod.Dod`; opened by :meth:`open`.

    Args:
        source: where tasks are read.
        path: as it was given; empty for the default place.
        settings: how rows are chosen.
        counter: counts tokens; None takes the counts that come with the source, else rough ones.
        tasks: only these; None takes every task that passes.
        cache: folder for verdicts, which take minutes for a clone.
    """

    source: Source
    path: str = ""
    settings: Settings = field(default_factory=Settings)
    counter: TokenCounter | None = None
    tasks: tuple[str, ...] | None = None
    cache: Path | None = None
    kind: str = "general"

    def __post_init__(self) -> None:
        self._splits = self.source.splits()
        self._verdicts: dict[str, Verdict] = {}
        self._names: list[str] | None = None
        for name in self.tasks or ():
            if name not in self._splits:
                raise ConfigError(f"The default split has no task {name!r}. {_hint(name, self._splits)}")

    @classmethod
    def open(
        cls,
        path: str | None = None,
        *,
        tokenizer: str | TokenCounter | None = None,
        tasks: Iterable[str] | None = None,
        cache: Path | None = None,
        **settings: Any,
    ) -> GeneralDod:
        """Opens a clone, the rebuilt copies, or a hub dataset; see :func:`lm_eval_softverb.data.dod.sources.find`.

        Raises:
            ConfigError: settings out of range, or a task that does not exist.
            DataError: a folder of another layout.
            ModelUnavailable: the dataset or the tokenizer is not reachable.
        """
        try:
            chosen = Settings(**settings)
        except TypeError as error:
            names = list(Settings.__dataclass_fields__)
            raise ConfigError(f"The general DoD has no such setting: {error}. Settings: {', '.join(names)}.") from error
        counter = TokenCounter.load(tokenizer) if isinstance(tokenizer, str) else tokenizer
        wanted = None if tasks is None else tuple(dict.fromkeys(tasks))
        return cls(find(path), path or "", chosen, counter, wanted, cache)

    # --- identity ----------------------------------------------------------------------------------------------------

    def reference(self) -> dict[str, Any]:
        """What a bank's manifest records as ``dod``: enough to open it again and to notice other data."""
        stock = asdict(Settings())
        changed = {key: value for key, value in asdict(self.settings).items() if value != stock[key]}
        tokenizer = {"tokenizer": self.counter.name} if self.counter else {}
        return {"kind": self.kind, "source": self.path, "settings": {**changed, **tokenizer}, "sha256": self.sha256}

    @property
    def sha256(self) -> str:
        """Of the source and of how rows are chosen, whichever tasks were asked for."""
        return storage.sha256_json([VERSION, self.source.sha256, asdict(self.settings), self.counter and self.counter.name])

    # --- which tasks -------------------------------------------------------------------------------------------------

    def names(self, split: str | None = None) -> list[str]:
        """Tasks that pass, in the order of the source.

        Raises:
            ConfigError: a task was asked for that does not pass.
        """
        if self._names is None:
            verdicts = self.verdicts()
            failed = [v for v in verdicts if v.reason] if self.tasks is not None else []
            if failed:
                reasons = "; ".join(f"{v.name}: {v.reason}" for v in failed[:5])
                raise ConfigError(
                    f"{len(failed)} of the {len(verdicts)} tasks asked for do not pass ({reasons}). Ask for others; "
                    "`softverb dod list` shows which pass."
                )
            self._names = [v.name for v in verdicts if not v.reason]
        return [name for name in self._names if split in (None, self._splits[name])]

    def verdicts(self) -> list[Verdict]:
        """All tasks of the default split (those asked for, where they were named), in the order of the source."""
        wanted = list(self._splits if self.tasks is None else self.tasks)
        if missing := [name for name in wanted if name not in self._verdicts]:
            self._judge(missing)
        return [self._verdicts[name] for name in wanted]

    def _judge(self, names: Sequence[str]) -> None:
        s, counter = self.settings, self.counter.name if self.counter else ""
        # What a verdict depends on; the draw does not change it.
        key = storage.sha256_json([VERSION, counter, s.min_instances, s.limit_tokens, s.max_tokens, s.heldout, s.seed])
        path = self.cache / f"verdicts-{key[:16]}.json" if self.cache else None
        kept = _read_cache(path)
        fresh = 0
        for name in names:
            stamp = self.source.stamp(name)
            entry = kept.get(name)
            if not (
                isinstance(entry, dict) and stamp and entry.get("stamp") == stamp and entry.get("split") == self._splits[name]
            ):
                entry = {**asdict(self._verdict(name, bool(stamp))), "stamp": stamp}
                kept[name] = entry
                fresh += 1
                if path and fresh % _SAVE_EVERY == 0:
                    storage.write_json(path, kept)
            self._verdicts[name] = Verdict(**{k: v for k, v in entry.items() if k != "stamp"})
        if path and fresh:
            storage.write_json(path, kept)

    def _verdict(self, name: str, has_data: bool) -> Verdict:
        s, split = self.settings, self._splits[name]
        known = self.source.known(name)
        if not has_data:
            return Verdict(name, split, NO_DATA)
        if known and min(known.instances, known.short) < s.min_instances:
            return Verdict(
                name, split, TOO_FEW if known.instances < s.min_instances else TOO_LONG, known.instances, known.short
            )
        if known and self.settings.max_tokens is None:
            return Verdict(name, split, "", known.instances, known.short)
        try:
            raw = self.source.read(name)
        except DataError:
            return Verdict(name, split, UNREADABLE)
        n = len(raw.instances)
        if raw.english is False:
            return Verdict(name, split, LANGUAGE, n)
        if n < s.min_instances:
            return Verdict(name, split, TOO_FEW, n)
        # A capped source keeps 500 instances; a small version needs rows to tune on and as many to hold out.
        needed = s.min_instances if s.max_tokens is None else min(s.min_instances, 2 * s.heldout)
        short = count_short(raw, needed, s, self.counter)
        if short < needed:
            return Verdict(name, split, TOO_LONG, n, short)
        alike = n_inputs(raw) < 2
        return Verdict(
            name, split, TOO_ALIKE if alike else "", known.instances if known else n, known.short if known else short
        )

    # --- one task ----------------------------------------------------------------------------------------------------

    def task(self, name: str) -> DodTask:
        """One task with its rows.

        Raises:
            ConfigError: no task of that name, or it does not pass.
            DataError: rows that cannot be used.
        """
        if name not in self.names():
            verdict = self._verdicts.get(name)
            why = f"does not pass: {verdict.reason}" if verdict else "is not in this DoD"
            raise ConfigError(f"Task {name!r} {why}. {_hint(name, self.names())}")
        raw = self.source.read(name)
        drawn, counts = draw(raw, self.settings, self.counter)
        train, heldout = hold_out(drawn, self.settings.heldout, self.settings.seed)
        if not train or not heldout:
            raise DataError(
                f"{name} has {len(drawn)} rows of too few different inputs to hold any out. Leave it out by tasks=…."
            )
        capped = train[: self.settings.max_rows]
        info = {
            **raw.info,
            **counts,
            "n_train": len(capped),
            "n_train_over_max_rows": len(train) - len(capped),
            "n_heldout": len(heldout),
            "tokens_counted_by": self.counter.name if self.counter else "source, or pieces",
            "train_sha256": data_sha256(capped),
            "heldout_sha256": data_sha256(heldout),
        }
        return DodTask(name, self._splits[name], tuple(capped), tuple(heldout), (), raw.definition, info)


def _hint(name: str, known: Iterable[str]) -> str:
    """Close names; the hundreds of others are not listed."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(map(repr, close))}?" if close else "`softverb dod list` shows all names."


def _read_cache(path: Path | None) -> dict[str, Any]:
    """Verdicts of an earlier opening; a cache that cannot be read is made anew."""
    try:
        kept = storage.read_json(path, 1 << 24) if path and path.is_file() else {}
    except ArtifactError:
        return {}
    return kept if isinstance(kept, dict) else {}
