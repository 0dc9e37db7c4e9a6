"""Paraphrase augmentation (section 3): 1, 10 or 100 condensed paraphrases of each training definition.

``1x`` is one paraphrase instead of the definition, not the definition itself. Tasks of the test split are never asked about.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lm_eval_softverb import storage
from lm_eval_softverb.data.dod import Dod
from lm_eval_softverb.endpoints.backends import FREE, ChatBackend, ChatRequest, Metered, Plan, Price, Reply
from lm_eval_softverb.errors import ArtifactError, BudgetExceeded, ConfigError, DataError, OutputError
from lm_eval_softverb.generators.prompts import normalised

SHORT = 25
"""Words; a definition of at most these is short already, and its paraphrase may be longer than it."""

TOGETHER = 64
"""Requests, of one task or of several."""

QUESTION = (
    "Rewrite the task description below {manner}. Keep everything that decides what the answer must be, in particular the "
    "possible answers and their format. Leave out examples and repetition. Write only the new description.\n\n"
    "Task description:\n{definition}"
)
MANNERS = (
    "in fewer words",
    "as one sentence",
    "as a short command",
    "in plain everyday words",
    "in other words, as briefly as you can",
    "for an expert who needs no explanations",
    "beginning with what the answer should look like",
    "beginning with what is given",
    "as two short sentences",
    "as a question that the answer answers",
)
_EXAMPLE = (
    "You are given a sentence from a letter. In this task, you need to find out whether the writer of the letter is asking for "
    'something or is not asking for anything. If the writer asks for something, your answer must be "request". If the writer '
    'does not ask for anything, your answer must be "none". For example, "Please send me the keys." would be "request".',
    'Decide whether a sentence from a letter asks for something; answer "request" or "none".',
)


@dataclass(frozen=True)
class ParaphraseConfig:
    """Settings of the augmentation.

    Attributes:
        copies: paraphrases per definition.
        max_tokens: of a paraphrase; one that needs more is refused, not cut.
        attempts: requests per paraphrase that is still missing.
    """

    copies: int = 1
    max_tokens: int = 300
    temperature: float = 0.7
    top_p: float = 0.95
    attempts: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.copies, self.max_tokens, self.attempts) < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(f"Settings out of range: {asdict(self)}. Expected positive numbers, and a top_p of at most 1.")


def plan(
    config: ParaphraseConfig, dod: Dod, backend: ChatBackend, price: Price = FREE, only: Set[str] | None = None
) -> tuple[Plan, Plan]:
    """What it takes if every answer is used, and if every attempt is needed; nothing is sent."""
    requests = [_request(config, n, d, k, 0) for n, d in _definitions(dod, only).items() for k in range(config.copies)]
    prompt, completion = sum(map(backend.count, requests)), config.max_tokens * len(requests)
    of = [(t * len(requests), t * prompt, t * completion) for t in (1, config.attempts)]
    least, most = (Plan(n, p, c, price.of(p, c)) for n, p, c in of)
    return least, most


def paraphrase(
    dod: Dod,
    config: ParaphraseConfig,
    meter: Metered,
    out: Path,
    *,
    only: Set[str] | None = None,
    progress: Callable[[int, int, dict[str, int]], None] | None = None,
) -> dict[str, int]:
    """One line per training task in ``out``: ``task``, ``paraphrases``, ``counts``, ``usage``, ``source_sha256``, ``run``.

    Requests go out together, up to about TOGETHER; then the lines of their tasks are written and synced. A run that was killed
    goes on behind the last whole line.

    Args:
        only: training tasks to paraphrase; None for all. The same file takes more later.

    Returns:
        Counts over the whole file: kept, missing, and refused by reason.

    Raises:
        ArtifactError: ``out`` holds paraphrases of another run.
        DataError: a task of ``only`` that is no training task, or no task at all.
        BackendError, BudgetExceeded: as the meter says; what is written stays.
    """
    storage.require_writable(out.parent)
    definitions = _definitions(dod, only)
    run = storage.sha256_json([asdict(config), meter.backend.identity(), QUESTION, MANNERS, _EXAMPLE])[:16]
    done = _resume(out, run, dod, definitions)
    counts: Counter[str] = Counter()
    for line in done.values():
        counts.update(line["counts"])
        meter.add_earlier(**line["usage"])
    left = [_Task(name, definition) for name, definition in definitions.items() if name not in done]
    size, number = max(1, TOGETHER // config.copies), len(definitions) - len(left)
    for first in range(0, len(left), size):
        group, told = left[first : first + size], number + first
        try:
            for attempt in range(config.attempts):
                if asked := [task for task in group if len(task.found) < config.copies]:
                    _ask(config, meter, asked, attempt)
        except BaseException:
            group = [task for task in group if len(task.found) == config.copies]  # paid for and whole
            raise
        finally:
            for more, task in enumerate(group, start=1):
                task.counts.update(kept=len(task.found), missing=config.copies - len(task.found))
                own = {"task": task.name, "paraphrases": task.found, "counts": dict(task.counts), "usage": dict(task.usage)}
                _append(out, {**own, "source_sha256": _sha(task.definition), "run": run, "model": meter.backend.name})
                counts.update(task.counts)
                if progress:
                    progress(told + more, len(definitions), dict(counts))
    return dict(counts)


def read_paraphrases(path: Path) -> dict[str, list[str]]:
    """Task → its paraphrases, from a file of :func:`paraphrase`.

    Raises:
        DataError: naming ``file:line``.
    """
    found: dict[str, list[str]] = {}
    for number, line in storage.read_jsonl(path):
        name, texts = line.get("task"), line.get("paraphrases")
        if not isinstance(name, str) or not isinstance(texts, list) or not all(isinstance(t, str) and t for t in texts):
            raise DataError(f"{path}:{number}: expected task (text) and paraphrases (list of texts), got {sorted(line)}.")
        if name in found:
            raise DataError(f"{path}:{number}: task {name!r} was there before; each has one line.")
        found[name] = texts
    return found


def _definitions(dod: Dod, only: Set[str] | None) -> dict[str, str]:
    """Training task → definition."""
    names = [name for name in dod.names("train") if only is None or name in only]
    if only is not None and (unknown := sorted(only - set(names))):
        raise DataError(
            f"{len(unknown)} of {len(only)} tasks are none of the DoD's training tasks, the first {unknown[0]!r}. Open the DoD "
            "that the bank was made from, and leave out test tasks."
        )
    if not names:
        raise DataError("There are no tasks to paraphrase: the bank names none, or the DoD has no training tasks.")
    found = {}
    for name in names:
        task = dod.task(name)
        if task.split != "train":  # a DoD that contradicts itself must not leak test tasks
            raise DataError(f"Task {name!r} is listed for training but belongs to split {task.split!r}.")
        if not task.instruction.strip():
            raise DataError(f"Task {name!r} has no definition to paraphrase; a classification DoD has labels instead.")
        found[name] = task.instruction
    return found


@dataclass
class _Task:
    """A definition and what was written about it so far."""

    name: str
    definition: str
    found: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    usage: Counter[str] = field(default_factory=lambda: Counter(requests=0, prompt_tokens=0, completion_tokens=0))

    def requests(self, config: ParaphraseConfig, attempt: int) -> list[ChatRequest]:
        """One for each paraphrase that is still missing."""
        copies = range(len(self.found), config.copies)
        return [_request(config, self.name, self.definition, copy, attempt) for copy in copies]

    def take(self, replies: Sequence[Reply]) -> None:
        """Keeps what is a paraphrase, and counts the rest by reason."""
        seen = {normalised(text) for text in (self.definition, *self.found)}
        for reply in replies:
            self.usage.update(requests=1, prompt_tokens=reply.prompt_tokens, completion_tokens=reply.completion_tokens)
            self.counts["asked"] += 1
            text = " ".join((reply.text or "").split())
            reason = ""
            if reply.text is None:
                reason = f"reply_{reply.refusal}"
            elif reply.finish == "length":
                reason = "too_many_tokens"
            elif not normalised(text):
                reason = "no_words"
            elif normalised(text) in seen:
                reason = "twice_or_unchanged"
            elif len(text.split()) > max(SHORT, len(self.definition.split())):
                reason = "not_condensed"
            if reason:
                self.counts[reason] += 1
            else:
                seen.add(normalised(text))
                self.found.append(text)


def _ask(config: ParaphraseConfig, meter: Metered, tasks: Sequence[_Task], attempt: int) -> None:
    """Asks for what is missing of several tasks at once, as far as the budget is wide enough for all of them."""
    requests = [task.requests(config, attempt) for task in tasks]
    try:
        replies = meter.complete([request for own in requests for request in own])
    except BudgetExceeded:
        if len(tasks) == 1:
            raise
        for task in tasks:
            _ask(config, meter, [task], attempt)
        return
    for task, own in zip(tasks, requests, strict=True):
        task.take(replies[: len(own)])
        replies = replies[len(own) :]


def _request(config: ParaphraseConfig, name: str, definition: str, copy: int, attempt: int) -> ChatRequest:
    seed = storage.seed_from(config.seed, name, copy, attempt)
    manner = MANNERS[(copy + attempt) % len(MANNERS)]
    return ChatRequest.of(
        QUESTION.format(manner=MANNERS[0], definition=_EXAMPLE[0]),
        _EXAMPLE[1],
        QUESTION.format(manner=manner, definition=definition),
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=seed,
    )


def _sha(definition: str) -> str:
    return storage.sha256_bytes(definition.encode())


def _resume(out: Path, run: str, dod: Dod, definitions: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Whole lines of ``out`` by task; what a kill left behind the last of them is cut off. Earlier runs may have asked for
    other training tasks than ``definitions`` has.
    """
    if not out.exists():
        return {}
    raw = out.read_bytes()
    whole = raw.rfind(b"\n") + 1
    if whole < len(raw):
        storage.write_bytes(out, raw[:whole])
    done, known = {}, set(dod.names("train"))
    for number, line in storage.read_jsonl(out):
        name = str(line.get("task"))
        source = definitions.get(name) or (dod.task(name).instruction if name in known else None)
        if (
            {type(line.get(key)) for key in ("counts", "usage")} != {dict}
            or line.get("run") != run
            or source is None
            or _sha(source) != line.get("source_sha256")
        ):
            raise ArtifactError(
                f"{out}:{number} holds paraphrases of another run (other definitions, settings, prompts or model). Choose "
                "another --out."
            )
        done[name] = line
    return done


def _append(out: Path, line: Mapping[str, Any]) -> None:
    try:
        with out.open("ab") as f:
            f.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
            f.flush()
            os.fsync(f.fileno())
    except OSError as error:
        raise OutputError(
            f"Could not write to {out}: {error.strerror or error}. Lines written before are kept; free some space and run "
            "the same command again."
        ) from error
