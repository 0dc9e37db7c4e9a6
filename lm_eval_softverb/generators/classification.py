"""The classification DoD (section 3): label sets primed by three words, then sentences for each label, into one SQLite file.

Label set ``i`` depends on the seed, on ``i`` and on the sets before it (nothing is written twice), and on nothing else that
is random: a run that was killed and goes on ends in the same tables as one that was not.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lm_eval_softverb import storage
from lm_eval_softverb.endpoints.backends import FREE, ChatBackend, ChatRequest, Metered, Plan, Price, Usage
from lm_eval_softverb.errors import ArtifactError, BackendError, ConfigError
from lm_eval_softverb.generators import prompts
from lm_eval_softverb.generators.config import ClassificationConfig, evaluation_labels, read_words
from lm_eval_softverb.generators.cues import CuedSet, echoes
from lm_eval_softverb.generators.judging import Judge
from lm_eval_softverb.generators.store import Store, open_store


def plan(
    config: ClassificationConfig,
    backend: ChatBackend,
    price: Price = FREE,
    words: Sequence[str] = (),
    cued: Sequence[CuedSet] = (),
) -> tuple[Plan, Plan]:
    """What ``config.sets`` label sets take if every answer is used, and if every attempt is needed; nothing is sent.

    Sets that are given up come on top of the second; only a budget bounds those.
    """
    words = words or read_words()
    _check(config, cued)
    label = _label_requests(config, words, 0)[0]
    names = list(cued[0].cues) if cued else [f"example{'e' * i}" for i in range(config.labels)]
    cues = cued[0].cues if cued else {}
    numbers = (_needed(config, config.sentences, config.expected), config.requests)
    least, most = (
        [a.request for a in _sentence_requests(config, words, 0, 0, dict.fromkeys(names, n), names, cues)] for n in numbers
    )
    per_set = [(0 if cued else 1, least), (0 if cued else config.label_attempts, least + most * (config.attempts - 1))]
    plans = []
    for labels, requests in per_set:
        prompt = labels * backend.count(label) + sum(map(backend.count, requests))
        completion = labels * label.max_tokens + sum(r.max_tokens for r in requests)
        tokens = config.sets * prompt, config.sets * completion
        plans.append(Plan(config.sets * (labels + len(requests)), *tokens, price.of(*tokens)))
    return plans[0], plans[1]


def generate(
    config: ClassificationConfig,
    meter: Metered,
    out: Path,
    *,
    words: Sequence[str] = (),
    cued: Sequence[CuedSet] = (),
    judge: Judge | None = None,
    progress: Callable[[int, int, dict[str, int]], None] | None = None,
) -> dict[str, int]:
    """Writes ``config.sets`` label sets to ``out``, or goes on behind those it already has.

    Args:
        meter: the model and what it may cost; gets the usage of earlier runs of the file added.
        cued: label sets with cues, for the style ``cues``; no labels are asked for then.
        progress: told after each set: sets there, sets wanted, counts.

    Returns:
        Counts of the file: what was asked, kept, and refused by reason.

    Raises:
        ArtifactError: ``out`` was made with other settings.
        ConfigError: cues without their style or the other way round, of other numbers of labels, or too few label sets.
        BackendError: the model cannot be used, or ``give_up`` sets in a row came to nothing.
        BudgetExceeded: before the call that might cost too much.
    """
    words = tuple(words) or read_words()
    _check(config, cued)
    identity = {**asdict(config), "backend": meter.backend.identity(), "judge": judge.identity() if judge else None}
    identity |= {"words": storage.sha256_json(words), "prompts": prompts.identity()}
    del identity["sets"]  # a longer run begins like a shorter one
    with open_store(out, identity) as store:
        meter.usage = Usage(**store.get("usage", {}))
        written = [storage.sha256_json([s.topic, list(s.cues.items())]) for s in cued]
        before = store.get("cues", [])
        if written[: len(before)] != before:
            raise ArtifactError(
                f"{out} was begun with other cues. Label sets may be added behind those it has; for changed ones, write "
                "another file."
            )
        store.put(cues=written)
        run = _Run(config, meter, judge, words, cued, store)
        while run.counts["sets"] < config.sets:
            index = int(store.get("next", 0))
            if cued and index == len(cued):
                break
            failed = int(store.get("failed_in_a_row", 0))
            if failed >= config.give_up:
                store.put(failed_in_a_row=0)  # the same command tries again further on
                raise BackendError(
                    f"{failed} label sets in a row came to nothing with {meter.backend.name}; counts: {dict(run.counts)}. "
                    "Use a better model, a filter that is off, fewer sentences, or more attempts."
                )
            primed, found = run.one(index)
            run.counts["sets" if found else "sets_given_up"] += 1
            run.counts["kept"] += sum(map(len, found.values()))
            then = {"next": index + 1, "counts": dict(run.counts), "failed_in_a_row": 0 if found else failed + 1}
            store.add(index, primed, found, **then)
            if found:
                run.remember(list(found), [s for sentences in found.values() for s in sentences])
            if progress:
                progress(run.counts["sets"], config.sets, dict(run.counts))
        return dict(run.counts)


class _Run:
    """What must be remembered between label sets."""

    def __init__(
        self,
        config: ClassificationConfig,
        meter: Metered,
        judge: Judge | None,
        words: Sequence[str],
        cued: Sequence[CuedSet],
        store: Store,
    ) -> None:
        self.config, self.meter, self.judge, self.words, self.cued, self.store = config, meter, judge, words, cued, store
        self.counts: Counter[str] = Counter(store.get("counts", {}))
        self.avoided = evaluation_labels() if config.avoid else frozenset[str]()
        self._with: dict[str, list[int]] = {}  # stem of a label → numbers of the sets that have it
        self._sets: list[frozenset[str]] = []
        self._sentences: set[str] = set()
        for _, labels in store.label_sets():
            self.remember(labels, ())
        self.remember((), store.sentences())

    def remember(self, labels: Sequence[str], sentences: Any) -> None:
        if labels:
            stems = frozenset(map(prompts.stem, labels))
            for s in stems:
                self._with.setdefault(s, []).append(len(self._sets))
            self._sets.append(stems)
        self._sentences.update(map(_digest, sentences))

    def one(self, index: int) -> tuple[list[str], dict[str, list[str]]]:
        """The words that primed set ``index``, and its sentences by label; empty when it came to nothing."""
        primed, labels = self._written(index) if self.cued else self._labels(index)
        return primed, self._fill(index, labels) if labels else {}

    def _written(self, index: int) -> tuple[list[str], list[str]]:
        """Topic and labels of a set with cues; no labels where they cannot be used."""
        cued = self.cued[index]
        labels = self._accepted(list(cued.cues))
        return (cued.topic.split(), labels) if labels else ([], [])

    def _ask(self, requests: Sequence[ChatRequest]) -> list[tuple[str, bool]]:
        """Text and whether it was cut off, per request; no text where the request was refused."""
        out: list[tuple[str, bool]] = []
        for start in range(0, len(requests), self.config.batch):
            try:
                replies = self.meter.complete(requests[start : start + self.config.batch])
            finally:  # what was spent is known even if the label set is not finished
                self.store.put(usage=self.meter.usage.to_json())
            for reply in replies:
                if reply.text is None:
                    self.counts[f"reply_{reply.refusal}"] += 1
                out.append((reply.text or "", reply.finish == "length"))
        return out

    def _labels(self, index: int) -> tuple[list[str], list[str]]:
        """The words that primed a label set, and its labels; none after the last attempt."""
        requests = _label_requests(self.config, self.words, index)
        for attempt, request in enumerate(requests):
            self.counts["label_requests"] += 1
            [(text, _)] = self._ask([request])
            if labels := self._accepted(prompts.parse_labels(text)):
                return _primers(self.config, self.words, index, attempt), labels
        return [], []

    def _accepted(self, offered: Sequence[str]) -> list[str]:
        """The first usable labels; none where they are too few or the file has them already."""
        known = self.judge.knows if self.judge else bool
        chosen, refused = prompts.choose_labels(offered, self.config.labels, self.avoided, known)
        self.counts.update(refused)
        reason = "set_too_few_labels" if len(chosen) < self.config.labels else self._known(chosen)
        if reason:
            self.counts[reason] += 1
        return [] if reason else chosen

    def _known(self, labels: Sequence[str]) -> str:
        """Whether the file has this label set, or one that differs in a single label."""
        stems = frozenset(map(prompts.stem, labels))
        if any(len(stems & {prompts.stem(w) for w in shown}) >= len(stems) - 1 for shown in prompts.EXAMPLE_SETS):
            return "set_copied_from_prompt"
        near = {i for s in stems for i in self._with.get(s, ())}
        shared = max((len(stems & self._sets[i]) for i in near), default=0)
        return "set_twice" if shared == len(stems) else "set_nearly_twice" if shared >= max(2, len(stems) - 1) else ""

    def _fill(self, index: int, labels: Sequence[str]) -> dict[str, list[str]]:
        config = self.config
        found: dict[str, list[str]] = {label: [] for label in labels}
        seen: set[str] = set()
        sent = dict.fromkeys(labels, 0)
        keep = self.judge.start(labels) if self.judge else None
        cues = self.cued[index].cues if self.cued else {}
        for turn in range(config.attempts):
            missing = {label: config.sentences - len(s) for label, s in found.items() if len(s) < config.sentences}
            if not missing or (turn == 2 and not all(found.values())):  # nothing in two rounds: the rest would be wasted
                break
            rates = {label: len(found[label]) / sent[label] if sent[label] else config.expected for label in missing}
            numbers = {label: _needed(config, need, rates[label]) for label, need in missing.items()}
            asked = _sentence_requests(config, self.words, index, turn, numbers, labels, cues)
            for label, number in numbers.items():
                sent[label] += number
            self.counts["sentence_requests"] += len(asked)
            fresh: dict[str, list[str]] = {label: [] for label in labels}
            for a, (text, cut) in zip(asked, self._ask([a.request for a in asked]), strict=True):
                fresh[a.label] += self._usable(text, cut, a, labels, seen, [*found[a.label], *fresh[a.label]])
            if keep:
                for label, verdict in keep(fresh).items():
                    self.counts["sentence_fits_another_label"] += verdict.count(False)
                    fresh[label] = [s for s, good in zip(fresh[label], verdict, strict=True) if good]
            for label in labels:
                room = config.sentences - len(found[label])
                found[label] += fresh[label][:room]
                self.counts["sentence_not_needed"] += len(fresh[label][room:])
        short = [label for label, sentences in found.items() if len(sentences) < config.sentences]
        if short:
            self.counts["set_too_few_sentences"] += 1
            self.counts["sentence_of_dropped_set"] += sum(map(len, found.values()))
            return {}
        return found

    def _usable(
        self, text: str, cut: bool, asked: _Asked, labels: Sequence[str], seen: set[str], before: Sequence[str]
    ) -> list[str]:
        """Sentences of one answer; ``before`` are those that the label has already."""
        usable: list[str] = []
        sentences, lost = prompts.split_sentences(text, cut)
        self.counts["sentence_cut_off"] += lost
        for written in sentences:
            self.counts["sentences_read"] += 1
            sentence = prompts.without_subject(written, asked.label)
            self.counts["subject_replaced"] += sentence != written
            fault = prompts.sentence_fault(sentence, asked.label, labels, (self.config.min_words, self.config.max_words))
            if not fault and asked.cue and not echoes(sentence, asked.cue):
                fault = "sentence_misses_cue"
            digest = _digest(sentence)
            if not fault and (digest in seen or digest in self._sentences):
                fault = "sentence_twice"
            elif not fault and any(prompts.nearly_same(sentence, other) for other in [*before, *usable]):
                fault = "sentence_nearly_twice"
            if fault:
                self.counts[fault] += 1
            else:
                seen.add(digest)
                usable.append(sentence)
        return usable


def _digest(sentence: str) -> str:
    return storage.sha256_bytes(prompts.normalised(sentence).encode())[:16]


def _primers(config: ClassificationConfig, words: Sequence[str], index: int, attempt: int) -> list[str]:
    return random.Random(storage.seed_from(config.seed, index, "words", attempt)).sample(list(words), config.words)


def _label_requests(config: ClassificationConfig, words: Sequence[str], index: int) -> list[ChatRequest]:
    sampling = {"temperature": config.label_temperature, "top_p": config.label_top_p}
    return [
        prompts.label_request(
            config.variant,
            _primers(config, words, index, attempt),
            config.labels,
            seed=storage.seed_from(config.seed, index, "labels", attempt),
            **sampling,
        )
        for attempt in range(config.label_attempts)
    ]


@dataclass(frozen=True)
class _Asked:
    """A request for sentences of one label, and the cue they are to be about."""

    label: str
    request: ChatRequest
    cue: str = ""


def _sentence_requests(
    config: ClassificationConfig,
    words: Sequence[str],
    index: int,
    turn: int,
    numbers: Mapping[str, int],
    labels: Sequence[str],
    cues: Mapping[str, Sequence[str]],
) -> list[_Asked]:
    """``numbers[label]`` requests for each label."""
    asked = []
    for label, number in numbers.items():
        others = [other for other in labels if other != label]
        for k in range(number):
            seed, form = storage.seed_from(config.seed, index, label, turn, k), turn * config.requests + k
            cue = cues[label][form % len(cues[label])] if cues else ""
            if cue:
                turns = prompts.cue_turns(cue, storage.seed_from(config.seed, index, turn))
            else:
                hint = random.Random(seed).choice(list(words))
                turns = [prompts.sentence_question(config.style, label, others, hint, config.per_request, form)]
            sampling = {"temperature": config.temperature, "top_p": config.top_p, "seed": seed}
            asked.append(_Asked(label, ChatRequest.of(*turns, max_tokens=config.max_tokens, **sampling), cue))
    return asked


def _check(config: ClassificationConfig, cued: Sequence[CuedSet]) -> None:
    if bool(cued) != (config.style == "cues"):
        raise ConfigError(
            f"The style is {config.style} and there are {len(cued)} label sets with cues; the style 'cues' needs them "
            "(--cues FILE), the others take none."
        )
    if few := [s.topic for s in cued if len(s.cues) < config.labels]:
        raise ConfigError(f"The label set {few[0]!r} has fewer than {config.labels} labels. Add some, or ask for fewer.")


def _needed(config: ClassificationConfig, missing: int, per_request: float) -> int:
    """Requests that should bring ``missing`` sentences, with a quarter to spare, when each brings ``per_request``."""
    return min(config.requests, math.ceil(1.25 * missing / max(per_request, 1 / 8)))
