"""Opens a DoD by one string, or by what a bank's manifest says about it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_eval_softverb.data.dod import Dod
from lm_eval_softverb.errors import ConfigError

KINDS = ("general", "classification")
_DATABASES = (".sqlite", ".sqlite3", ".db")


def parse(source: str) -> tuple[str, str]:
    """Kind and path (empty for the default place) of what :func:`open_dod` takes.

    Raises:
        ConfigError: nothing named.
    """
    kind, colon, path = source.partition(":")
    if kind not in KINDS or not (colon or kind == source):
        kind, path = "classification" if _is_database(source) else "general", source
    if not source:
        raise ConfigError(
            f"The DoD is {source!r}; expected general, general:PATH, classification:tight, classification:FILE.sqlite, "
            "classification, or a path. general alone is the folder natural_instructions in SOFTVERB_DATA_DIR, else the hub "
            "dataset; classification:tight is the shipped DoD, classification alone the twelve label sets."
        )
    return kind, path


def open_dod(source: str, **settings: Any) -> Dod:
    """Opens ``general``, ``general:PATH``, ``classification:tight`` (shipped), ``classification:FILE``, or a path.

    ``classification`` alone is the twelve shipped label sets, whose sentences were written by hand.

    A bare path to a SQLite file (also compressed: ``….sqlite.gz``) is a classification DoD, any other a general one.

    Args:
        source: what and where.
        settings: of the DoD's own ``open``.

    Raises:
        ConfigError: nothing named, or settings that do not exist.
        DataError: the files cannot be used.
        ModelUnavailable: a hub dataset is not reachable.
    """
    kind, path = parse(source)
    if kind == "general":
        from lm_eval_softverb.data.dod.general import GeneralDod

        return GeneralDod.open(path or None, **settings)
    from lm_eval_softverb.data.dod.classification import ClassificationDod, Reading

    try:
        reading = Reading(**settings)
    except TypeError as error:
        raise ConfigError(f"The classification DoD has no such setting: {error}.") from error
    return ClassificationDod.open(path, reading) if path else ClassificationDod.from_labelsets(reading)


def source_of(reference: Mapping[str, Any]) -> str:
    """The string for :func:`open_dod` of a manifest's ``dod`` entry ``{"kind": …, "source": …}``.

    Raises:
        ConfigError: another shape.
    """
    kind, source = reference.get("kind"), reference.get("source") or ""
    if kind not in KINDS or not isinstance(source, str):
        raise ConfigError(f"'dod' is {dict(reference)}, expected kind ({' or '.join(KINDS)}) and source (text).")
    return f"{kind}:{source}" if source else str(kind)


def _is_database(source: str) -> bool:
    return bool(set(Path(source).suffixes) & set(_DATABASES))
