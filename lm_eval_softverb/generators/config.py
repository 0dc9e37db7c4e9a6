"""Settings of the classification generator, the words that prime label sets, and the labels that are kept for evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

from lm_eval_softverb.data import labelsets
from lm_eval_softverb.data.benchmarks import BENCHMARKS
from lm_eval_softverb.errors import ConfigError, DataError
from lm_eval_softverb.generators.prompts import stem


@dataclass(frozen=True)
class ClassificationConfig:
    """All settings of section 3; the defaults are the paper's where it gives them.

    Attributes:
        sets: label sets to make; a file grows when this is raised.
        labels: per set.
        sentences: per label; a set that misses one is dropped and counted.
        variant: ``tight`` (labels of one kind) or ``preliminary`` (labels that need not be related).
        style: ``list`` asks for sentences of one label outright; ``passages`` asks small models for facts and scenes, which
            they write better, and cuts them into sentences; ``cues`` asks for one sentence on each cue of label sets
            that somebody wrote (:mod:`lm_eval_softverb.generators.cues`).
        temperature: of sentences; ``label_temperature``: of labels, higher since each set is asked for few times.
        top_p, label_top_p: likewise; small models invent words out of the tail.
        words: that prime a label set.
        per_request: sentences asked for at a time in style ``list``; in both, what a request is expected to bring before
            the first ones have shown what it really does.
        max_tokens: of one answer with sentences.
        label_attempts: times a label set is asked for, each with words of its own, before its number is given up.
        attempts: rounds of requests for the sentences that are still missing; a label that has none after two ends them.
        requests: most requests per label and round.
        batch: requests handed to the backend at a time.
        min_words, max_words: of a sentence.
        avoid: refuse labels of benchmarks and of the shipped label sets, which translators are tested on.
        give_up: label sets that may fail one after the other.
    """

    sets: int = 5500
    labels: int = 5
    sentences: int = 100
    variant: Literal["tight", "preliminary"] = "tight"
    style: Literal["list", "passages", "cues"] = "list"
    temperature: float = 0.4
    label_temperature: float = 0.7
    top_p: float = 0.95
    label_top_p: float = 0.8
    words: int = 3
    per_request: int = 10
    max_tokens: int = 320
    label_attempts: int = 6
    attempts: int = 6
    requests: int = 16
    batch: int = 128
    min_words: int = 5
    max_words: int = 30
    avoid: bool = True
    seed: int = 0
    give_up: int = 50

    def __post_init__(self) -> None:
        if self.variant not in ("tight", "preliminary") or self.style not in ("list", "passages", "cues"):
            raise ConfigError(
                f"variant is {self.variant!r} and style {self.style!r}; expected tight or preliminary; list, passages or cues."
            )
        whole = ("sets", "sentences", "words", "per_request", "max_tokens", "label_attempts", "attempts", "requests", "batch")
        low = [name for name in (*whole, "min_words", "give_up") if getattr(self, name) < 1]
        if low or self.labels < 2 or self.max_words < self.min_words:
            raise ConfigError(
                f"Settings out of range: {', '.join(low) or f'labels {self.labels}, words of a sentence {self.min_words} to '}"
                f"{'' if low else self.max_words}. Expected positive numbers, at least 2 labels, min_words up to max_words."
            )
        if (
            self.temperature < 0
            or self.label_temperature < 0
            or not 0 < min(self.top_p, self.label_top_p) <= max(self.top_p, self.label_top_p) <= 1
        ):
            raise ConfigError(
                f"temperature is {self.temperature}, label_temperature {self.label_temperature}, top_p {self.top_p}, "
                f"label_top_p {self.label_top_p}; expected temperatures of 0 or more, and a top_p above 0 up to 1."
            )

    @property
    def expected(self) -> float:
        """Usable sentences that a request brings, as long as nothing is known about a label."""
        return 0.75 if self.style == "cues" else self.per_request


def read_words(path: Path | None = None) -> tuple[str, ...]:
    """Nouns and adjectives that prime label sets: the shipped list, or a text file with one word per line.

    The paper draws them from the Brown corpus. Copies of it without its part-of-speech tags cannot be used for that; with
    them, write the nouns and adjectives among its 15,000 most frequent words of more than three letters into such a file.

    Raises:
        DataError: naming ``file:line``; or fewer than ten words.
    """
    where = path or files("lm_eval_softverb.generators") / "words.txt"
    try:
        lines = where.read_bytes().decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read the words {where}: {error}. Expected UTF-8 text, one word per line.") from error
    for number, line in enumerate(lines, start=1):
        if line and not (line.isalpha() and len(line) > 3):
            raise DataError(f"{where}:{number}: {line[:40]!r} is not one word of more than three letters.")
    words = tuple(dict.fromkeys(line.lower() for line in lines if line))
    if len(words) < 10:
        raise DataError(f"{where} has {len(words)} words, expected at least 10 to draw from.")
    return words


def evaluation_labels() -> frozenset[str]:
    """Stems of the labels of all benchmarks and shipped label sets."""
    words = [w for b in BENCHMARKS.values() for w in b.label_words]
    words += [w for name in labelsets.names() for w in labelsets.label_words(name)]
    return frozenset(map(stem, words))
