"""Held-out rows of a DoD as documents of the tasks ``dod_general`` and ``dod_classification``.

Which tasks: those of a bank's prompts, by ``task`` and ``dod`` in the lines of its ``manifest.jsonl``, or, for arms without a
bank, those of a DoD named directly. Only the manifest is read here, no tensor.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lm_eval_softverb.bank import manifest_of
from lm_eval_softverb.data.dod import Dod, DodTask
from lm_eval_softverb.data.dod.opening import source_of
from lm_eval_softverb.data.rows import data_sha256
from lm_eval_softverb.errors import ConfigError, DataError
from lm_eval_softverb.storage import read_jsonl

if TYPE_CHECKING:
    from datasets import Dataset

ROWS = 100
Kind = Literal["general", "classification"]
Open = Callable[[str, Mapping[str, Any]], Dod]
"""Opens a DoD from its source string and its settings."""


@dataclass(frozen=True)
class _Wanted:
    """One prompt to score."""

    where: str
    prompt_id: str
    task: str
    split: str | None
    source: str
    settings: Mapping[str, Any]
    heldout_sha256: str | None = None


def load(
    kind: Kind,
    open_: Open,
    bank: object = None,
    dod: object = None,
    split: object = None,
    rows: object = None,
    tasks_most: object = None,
    **_: Any,
) -> dict[str, Dataset]:
    """Held-out rows, the same for every arm; the first row of every task comes first, then the second of every task.

    Args:
        kind: of the DoD; prompts of the other kind are left to the other task.
        open_: opens a DoD.
        bank: folder of the bank whose prompts are scored.
        dod: without a bank the DoD itself, as for :func:`~lm_eval_softverb.data.dod.opening.open_dod`; with one, where its DoD
            is on this machine.
        split: ``train`` or ``test``; by default ``test`` where there is such a prompt (or task), else all.
        rows: at most this many rows per prompt (100).
        tasks_most: at most this many prompts, evenly from all of them.

    Returns:
        ``test``, with ``prompt_id`` (the task's name where there is no bank), ``task``, ``input``, ``target``,
        ``instruction``, ``choices`` (the label set) and ``label`` (index of the target in it; -1 for instructions).

    Raises:
        ConfigError: neither bank nor DoD, or a number of rows that is none.
        ArtifactError: the folder is no bank.
        DataError: entries that cannot be used, with ``file:line``; none that match; or held-out rows that differ from those of
            the prompt's training.
    """
    if not bank and not dod:
        raise ConfigError(
            f"The task dod_{kind} got neither a bank nor a DoD. Pass --model_args bank=DIR or, where the model takes none, "
            '--metadata \'{"bank": "DIR"}\' (the same documents as for the bank) or \'{"dod": "general:PATH"}\'.'
        )
    most = _number("rows", "held-out rows per task", rows) or ROWS
    opened: dict[str, Dod] = {}

    def dod_of(source: str, settings: Mapping[str, Any]) -> Dod:
        key = json.dumps([source, dict(settings)], sort_keys=True)
        if key not in opened:
            opened[key] = open_(source, settings)
            if opened[key].kind != kind:
                raise ConfigError(f"{source} is a {opened[key].kind} DoD; run the task dod_{opened[key].kind}.")
        return opened[key]

    override = str(dod) if dod else None
    if bank:
        prompts, origin = _from_bank(Path(str(bank)).expanduser(), kind, override)
    else:
        whole, origin = dod_of(str(override), {}), str(override)
        own = {name: each for each in ("train", "test") for name in whole.names(each)}
        prompts = [_Wanted(f"{origin}, {name}", name, name, own[name], origin, {}) for name in whole.names()]
    groups = []
    for prompt in _choose(prompts, split, origin, tasks_most):
        task = _task(prompt, dod_of(prompt.source, prompt.settings))
        groups.append(list(_documents(prompt, task, most)))
    # In turns, so that --limit takes as much of every task.
    documents = [doc for turn in zip_longest(*groups) for doc in turn if doc is not None]
    from datasets import Dataset, Features, Value

    text = Value("string")
    columns = dict.fromkeys(("prompt_id", "task", "input", "target", "instruction"), text)
    features = Features({**columns, "choices": [text], "label": Value("int64")})
    return {"test": Dataset.from_list(documents, features=features)}


def prompts_of(kind: Kind, bank: Path, split: object = None, tasks_most: object = None, dod: str | None = None) -> list[str]:
    """Names of the prompts whose rows :func:`load` gives for the same arguments; no row is read.

    Raises:
        SoftverbError: as :func:`load`.
    """
    prompts, origin = _from_bank(bank.expanduser(), kind, dod)
    return [prompt.prompt_id for prompt in _choose(prompts, split, origin, tasks_most)]


def _number(name: str, what: str, value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not str(value).isdecimal() or not int(str(value)):
        raise ConfigError(f"{name} is {value!r}, expected how many {what} to score, at least 1.")
    return int(str(value))


def _from_bank(folder: Path, kind: Kind, override: str | None) -> tuple[list[_Wanted], str]:
    """The prompts of one kind, and the manifest's name."""
    manifest = manifest_of(folder)
    found: list[_Wanted] = []
    others = Counter[str]()
    names = set[str]()
    for number, entry in read_jsonl(manifest):
        where = f"{manifest}:{number}"
        reference = entry.get("dod")
        if not isinstance(reference, dict) or not isinstance(reference.get("settings", {}), dict):
            others["without 'dod'"] += 1
            continue
        if reference.get("kind") != kind:
            others[f"of kind {reference.get('kind')!r}"] += 1
            continue
        try:
            source = override or source_of(reference)
        except ConfigError as error:
            raise DataError(f"{where}: {error}") from error
        name, task = (_text(entry, key, where) for key in ("prompt_id", "task"))
        if name in names:
            raise DataError(f"{where}: a second prompt is named {name!r}; names must be unique.")
        names.add(name)
        split = entry.get("split")
        settings, heldout = reference.get("settings", {}), entry.get("heldout_sha256")
        found.append(_Wanted(where, name, task, split and str(split), source, settings, heldout and str(heldout)))
    if not found:
        held = ", ".join(f"{n} {what}" for what, n in others.items()) or "nothing"
        raise DataError(
            f"{manifest} has no prompts of a {kind} DoD; it holds {held}. Each line needs task and dod, e.g. "
            f'{{"kind": "{kind}", "source": "PATH"}}; `softverb bank` writes them.'
        )
    return found, str(manifest)


def _text(entry: Mapping[str, Any], key: str, where: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}: '{key}' is {value!r}, expected text.")
    return value


def _choose(prompts: list[_Wanted], split: object, origin: str, tasks_most: object = None) -> list[_Wanted]:
    splits = Counter(prompt.split for prompt in prompts)
    wanted = str(split) if split is not None else "test" if "test" in splits else None
    chosen = [prompt for prompt in prompts if wanted in (None, prompt.split)]
    if not chosen:
        held = ", ".join(f"{n} in {own or 'no split'}" for own, n in splits.items()) or "none"
        raise DataError(f"{origin} has no prompts in split {wanted}; it holds {held}. Pass split=… to choose.")
    most = _number("tasks_most", "prompts", tasks_most)
    if most is None or most >= len(chosen):
        return chosen
    return [chosen[i * len(chosen) // most] for i in range(most)]


def _task(prompt: _Wanted, dod: Dod) -> DodTask:
    try:
        task = dod.task(prompt.task)
    except ConfigError as error:
        raise DataError(f"{prompt.where}: {error}") from error
    found = data_sha256(task.heldout)
    if prompt.heldout_sha256 not in (None, found):
        raise DataError(
            f"{prompt.where}: the rows held out of {prompt.task} are not those of the prompt's training (hash {found[:12]}, "
            f"expected {str(prompt.heldout_sha256)[:12]}), so it may have been trained on them. Use the same data and settings."
        )
    if not task.heldout:
        raise DataError(f"{prompt.where}: {prompt.task} has no held-out rows to score.")
    return task


def _documents(prompt: _Wanted, task: DodTask, most: int) -> Iterable[dict[str, Any]]:
    for row in task.heldout[:most]:
        if task.labels and row.output not in task.labels:
            raise DataError(f"{prompt.where}: a held-out row of {prompt.task} has label {row.output!r}, not among its labels.")
        yield {
            "prompt_id": prompt.prompt_id,
            "task": prompt.task,
            "input": row.input,
            "target": row.output,
            "instruction": task.instruction,
            "choices": list(task.labels),
            "label": task.labels.index(row.output) if task.labels else -1,
        }
