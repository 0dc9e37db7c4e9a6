"""Loosely related label sets (the paper's preliminary DoD) out of the labels and sentences of another DoD; no model writes.

Each new set has labels of as many different sets of one split of the source. Labels of the test split that training sets have,
too, are left out, so that no label and no sentence is in both.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lm_eval_softverb.data.dod.classification import ClassificationDod, Reading, split_of
from lm_eval_softverb.errors import ConfigError
from lm_eval_softverb.generators.prompts import mentions
from lm_eval_softverb.generators.store import open_store

ATTEMPTS = 200
"""Draws of one set before giving up."""


@dataclass(frozen=True)
class Recombination:
    """What is made.

    Attributes:
        sets: label sets, of both splits together.
        labels: per set, each from another set of the source.
        sentences: per label; those that mention another label of the new set do not count.
        seed: of who comes together, and of the sentences.
    """

    sets: int = 200
    labels: int = 5
    sentences: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("sets", 1), ("labels", 2), ("sentences", Reading.heldout + 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least {least}.")


def recombine(dod: ClassificationDod, out: Path, config: Recombination) -> dict[str, int]:
    """Writes the new DoD; called again it goes on, with the same result.

    Returns:
        Sets in the file by split.

    Raises:
        ConfigError: the source has too few labels with enough sentences.
        ArtifactError, OutputError: as for :func:`~lm_eval_softverb.generators.store.open_store`.
    """
    pools = {split: _labels(dod, split, config.sentences) for split in ("train", "test")}
    trained = {label.casefold() for name in dod.names("train") for label in dod.sets[name]}
    pools["test"] = [(name, label) for name, label in pools["test"] if label.casefold() not in trained]
    used = {split: Counter[tuple[str, str]]() for split in pools}
    counts: Counter[str] = Counter()
    drawn = []
    for number in range(config.sets):  # all of it before the file is touched
        split = split_of(number)
        drawn.append(_draw(dod, pools[split], used[split], config, number))
        used[split].update(list(drawn[-1]))
        counts[split] += 1
    with open_store(out, {"recombined": dod.sha256, **asdict(config)}) as store:
        known = dict(store.label_sets())
        for number, chosen in enumerate(drawn):
            if number not in known:
                found = {label: sentences for (_, label), sentences in chosen.items()}
                store.add(number, [name for name, _ in chosen], found)
    return dict(counts)


def _labels(dod: ClassificationDod, split: str, least: int) -> list[tuple[str, str]]:
    """All ``(set, label)`` of a split with enough sentences."""
    return [
        (name, label)
        for name in dod.names(split)
        for label, (training, heldout) in dod.sets[name].items()
        if len(training) + len(heldout) >= least
    ]


def _draw(
    dod: ClassificationDod,
    pool: Sequence[tuple[str, str]],
    used: Counter[tuple[str, str]],
    config: Recombination,
    number: int,
) -> dict[tuple[str, str], list[str]]:
    """Labels that came least often so far, with their sentences."""
    stream = random.Random(f"{config.seed}/{number}")
    for _ in range(ATTEMPTS):
        order = sorted(stream.sample(pool, len(pool)), key=lambda place: used[place])
        chosen: list[tuple[str, str]] = []
        for name, label in order:
            if all(name != other and not _alike(label, word) for other, word in chosen):
                chosen.append((name, label))
            if len(chosen) == config.labels:
                break
        words = [label for _, label in chosen]
        found = {}
        for name, label in chosen:
            own = [s for part in dod.sets[name][label] for s in part if not any(mentions(s, w) for w in words)]
            found[name, label] = stream.sample(own, min(config.sentences, len(own)))
        if len(found) == config.labels and all(len(s) == config.sentences for s in found.values()):
            return found
    raise ConfigError(
        f"No {config.labels} labels with {config.sentences} sentences each go together in the source (set {number}); ask for "
        "fewer labels or sentences."
    )


def _alike(a: str, b: str) -> bool:
    return a.casefold() == b.casefold() or mentions(a, b) or mentions(b, a)
