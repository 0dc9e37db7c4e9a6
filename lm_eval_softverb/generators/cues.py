"""Label sets that somebody wrote, with cues: phrases that say what sentences of a label are to be about.

A small model that is asked for sentences on a label wanders off, or names the label. Asked to put a given phrase into a
sentence it does neither, since it never sees the label.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lm_eval_softverb.errors import DataError
from lm_eval_softverb.generators.prompts import mentions, normalised, stem


@dataclass(frozen=True)
class CuedSet:
    """One label set.

    Attributes:
        topic: what its labels have in common.
        cues: of each label, in the order of the labels.
    """

    topic: str
    cues: Mapping[str, tuple[str, ...]]


def read_cues(path: Path) -> tuple[CuedSet, ...]:
    """Reads blocks of ``# topic`` and lines ``label: cue; cue; …``.

    Raises:
        DataError: naming ``file:line``: another form, a label twice in a set, or a cue that names a label of its set.
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read the cues {path}: {error}. Expected UTF-8 text.") from error
    sets: list[tuple[str, dict[str, tuple[str, ...]]]] = []
    for number, line in enumerate(lines, start=1):
        where, text = f"{path}:{number}", line.strip()
        if text.startswith("#"):
            sets.append((text.lstrip("# "), {}))
        elif text:
            label, colon, rest = (part.strip() for part in text.partition(":"))
            cues = tuple(dict.fromkeys(cue.strip() for cue in rest.split(";") if cue.strip()))
            if not sets or not colon or not re.fullmatch(r"[a-z]+", label) or not cues:
                raise DataError(f"{where}: {text[:60]!r}; expected '# topic', or 'label: cue; cue; …' below one.")
            if stem(label) in map(stem, sets[-1][1]):
                raise DataError(f"{where}: {label!r} stands twice in the set {sets[-1][0]!r}. Remove one.")
            sets[-1][1][label] = cues
    for topic, labels in sets:
        for label, cues in labels.items():
            if named := [(cue, other) for cue in cues for other in labels if mentions(cue, other)]:
                cue, other = named[0]
                raise DataError(f"{path}: in {topic!r} the cue {cue!r} of {label!r} names {other!r}. Write another one.")
    if not sets:
        raise DataError(f"{path} has no label sets; expected '# topic' and lines 'label: cue; cue; …' below it.")
    return tuple(CuedSet(topic, labels) for topic, labels in sets)


_SMALL = frozenset(
    {
        "a",
        "an",
        "the",
        "and",
        "or",
        "of",
        "to",
        "in",
        "on",
        "at",
        "by",
        "for",
        "with",
        "from",
        "into",
        "onto",
        "over",
        "under",
        "about",
        "up",
        "down",
        "out",
        "off",
        "its",
        "it",
        "his",
        "her",
        "their",
        "your",
        "my",
        "no",
        "not",
        "is",
        "are",
        "was",
        "be",
        "as",
        "than",
        "that",
        "this",
        "too",
        "very",
        "so",
    }
)


def echoes(sentence: str, cue: str) -> bool:
    """Whether the sentence has at least half of the cue's words, small ones aside, in any form."""
    wanted = {stem(w) for w in normalised(cue).split() if w not in _SMALL}
    said = {stem(w) for w in normalised(sentence).split()}
    return 2 * len(wanted & said) >= max(1, len(wanted))
