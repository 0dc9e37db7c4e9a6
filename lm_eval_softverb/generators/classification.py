"""The classification DoD (section 3): label sets primed by three words, then sentences for each label, into one SQLite file.

Label set ``i`` depends on the seed, on ``i`` and on the sets before it (nothing is written twice), and on nothing else that
is random: a run that was killed and goes on ends in the same tables as one that was not.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lm_eval_softverb import storage
from lm_eval_softverb.endpoints.backends import FREE, ChatBackend, ChatRequest, Metered, Plan, Price, Usage
from lm_eval_softverb.errors import BackendError
from lm_eval_softverb.generators import prompts
from lm_eval_softverb.generators.config import ClassificationConfig, evaluation_labels, read_words
from lm_eval_softverb.generators.judging import Judge
from lm_eval_softverb.generators.store import Store, open_store


def plan(
    config: ClassificationConfig, backend: ChatBackend, price: Price = FREE, words: Sequence[str] = ()
) -> tuple[Plan, Plan]:
    """What ``config.sets`` label sets take if every answer is used, and if every attempt is needed; nothing is sent.

    Sets that are given up come on top of the second; only a budget bounds those.
    """
    words = words or read_words()
    label = _label_requests(config, words, 0)[0]
    names = [f"example{'e' * i}" for i in range(config.labels)]
    numbers = (_needed(config, config.sentences, config.per_request), config.requests)
    least, most = ([r for _, r in _sentence_requests(config, words, 0, 0, dict.fromkeys(names, n), names)] for n in numbers)
    per_set = [(1, least), (config.label_attempts, least + most * (config.attempts - 1))]
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
    judge: Judge | None = None,
    progress: Callable[[int, int, dict[str, int]], None] | None = None,
) -> dict[str, int]:
    """Writes ``config.sets`` label sets to ``out``, or goes on behind those it already has.

    Args:
        meter: the model and what it may cost; gets the usage of earlier runs of the file added.
        progress: told after each set: sets there, sets wanted, counts.

    Returns:
        Counts of the file: what was asked, kept, and refused by reason.

    Raises:
        ArtifactError: ``out`` was made with other settings.
        BackendError: the model cannot be used, or ``give_up`` sets in a row came to nothing.
        BudgetExceeded: before the call that might cost too much.
    """
    words = tuple(words) or read_words()
    identity = {**asdict(config), "backend": meter.backend.identity(), "judge": judge.identity() if judge else None}
    identity |= {"words": storage.sha256_json(words), "prompts": prompts.identity()}
    del identity["sets"]  # a longer run begins like a shorter one
    with open_store(out, identity) as store:
        meter.usage = Usage(**store.get("usage", {}))
        run = _Run(config, meter, judge, words, store)
        while run.counts["sets"] < config.sets:
            index = int(store.get("next", 0))
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
        self, config: ClassificationConfig, meter: Metered, judge: Judge | None, words: Sequence[str], store: Store
    ) -> None:
        self.config, self.meter, self.judge, self.words, self.store = config, meter, judge, words, store
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
        primed, labels = self._labels(index)
        return primed, self._fill(index, labels) if labels else {}

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
        requests = _label_requests(self.config, self.words, index)
        for attempt, request in enumerate(requests):
            self.counts["label_requests"] += 1
            [(text, _)] = self._ask([request])
            known = self.judge.knows if self.judge else bool
            chosen, refused = prompts.choose_labels(prompts.parse_labels(text), self.config.labels, self.avoided, known)
            self.counts.update(refused)
            if len(chosen) < self.config.labels:
                self.counts["set_too_few_labels"] += 1
            elif reason := self._known(chosen):
                self.counts[reason] += 1
            else:
                return _primers(self.config, self.words, index, attempt), chosen
        return [], []

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
        for turn in range(config.attempts):
            missing = {label: config.sentences - len(s) for label, s in found.items() if len(s) < config.sentences}
            if not missing or (turn == 2 and not all(found.values())):  # nothing in two rounds: the rest would be wasted
                break
            rates = {label: len(found[label]) / sent[label] if sent[label] else config.per_request for label in missing}
            numbers = {label: _needed(config, need, rates[label]) for label, need in missing.items()}
            asked = _sentence_requests(config, self.words, index, turn, numbers, labels)
            for label, number in numbers.items():
                sent[label] += number
            self.counts["sentence_requests"] += len(asked)
            fresh: dict[str, list[str]] = {label: [] for label in labels}
            for (label, _), (text, cut) in zip(asked, self._ask([r for _, r in asked]), strict=True):
                fresh[label] += self._usable(text, cut, label, labels, seen, [*found[label], *fresh[label]])
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
        self, text: str, cut: bool, label: str, labels: Sequence[str], seen: set[str], before: Sequence[str]
    ) -> list[str]:
        """Sentences of one answer; ``before`` are those that the label has already."""
        usable: list[str] = []
        sentences, lost = prompts.split_sentences(text, cut)
        self.counts["sentence_cut_off"] += lost
        for written in sentences:
            self.counts["sentences_read"] += 1
            sentence = prompts.without_subject(written, label)
            self.counts["subject_replaced"] += sentence != written
            fault = prompts.sentence_fault(sentence, label, labels, (self.config.min_words, self.config.max_words))
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


def _seed(*parts: Any) -> int:
    return int(storage.sha256_json(list(parts))[:15], 16)


def _primers(config: ClassificationConfig, words: Sequence[str], index: int, attempt: int) -> list[str]:
    return random.Random(_seed(config.seed, index, "words", attempt)).sample(list(words), config.words)


def _label_requests(config: ClassificationConfig, words: Sequence[str], index: int) -> list[ChatRequest]:
    sampling = {"temperature": config.label_temperature, "top_p": config.label_top_p}
    return [
        prompts.label_request(
            config.variant,
            _primers(config, words, index, attempt),
            config.labels,
            seed=_seed(config.seed, index, "labels", attempt),
            **sampling,
        )
        for attempt in range(config.label_attempts)
    ]


def _sentence_requests(
    config: ClassificationConfig, words: Sequence[str], index: int, turn: int, numbers: Mapping[str, int], labels: Sequence[str]
) -> list[tuple[str, ChatRequest]]:
    """``numbers[label]`` requests for each label, as (label, request)."""
    asked = []
    for label, number in numbers.items():
        others = [other for other in labels if other != label]
        for k in range(number):
            seed = _seed(config.seed, index, label, turn, k)
            hint = random.Random(seed).choice(list(words))
            form = turn * config.requests + k
            question = prompts.sentence_question(config.style, label, others, hint, config.per_request, form)
            sampling = {"temperature": config.temperature, "top_p": config.top_p, "seed": seed}
            asked.append((label, ChatRequest.of(question, max_tokens=config.max_tokens, **sampling)))
    return asked


def _needed(config: ClassificationConfig, missing: int, per_request: float) -> int:
    """Requests that should bring ``missing`` sentences, with a quarter to spare, when each brings ``per_request``."""
    return min(config.requests, math.ceil(1.25 * missing / max(per_request, 1 / 8)))
