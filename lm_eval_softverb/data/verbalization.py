"""Soft prompts with known ground truth as documents of the tasks ``verbalize_labels`` and ``verbalize_instructions``.

A line of a bank's ``manifest.jsonl`` may carry ``labels`` (a list of strings), ``instruction`` (a string), ``task`` and
``split``. Only the manifest is read here, no tensor. A line that has ``truth_sha256`` in place of the ground truth, because the
text is someone else's, names its ``dod``: the text is read from there, and must have that hash.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from lm_eval_softverb.bank import Bank, manifest_of
from lm_eval_softverb.data.dod import Dod, DodTask
from lm_eval_softverb.data.dod.opening import open_dod, source_of
from lm_eval_softverb.errors import ConfigError, DataError, did_you_mean
from lm_eval_softverb.storage import read_jsonl, sha256_json

if TYPE_CHECKING:
    from datasets import Dataset

Target = Literal["labels", "instructions"]
FIELDS: dict[Target, str] = {"labels": "labels", "instructions": "instruction"}
"""Target → the manifest's field with the ground truth."""


Open = Callable[[str, Mapping[str, Any]], Dod]


def open_plain(source: str, settings: Mapping[str, Any]) -> Dod:
    """:func:`~lm_eval_softverb.data.dod.opening.open_dod` without a tokenizer, which does not decide what a task is."""
    return open_dod(source, **{key: value for key, value in settings.items() if key not in ("cache", "tokenizer")})


def load(
    target: Target,
    bank: object = None,
    peft: object = None,
    split: object = None,
    dod: object = None,
    open_: Open = open_plain,
    **_: Any,
) -> dict[str, Dataset]:
    """Prompts whose ground truth is known; tasks call it through ``custom_dataset``, which passes the model's arguments.

    Args:
        target: what the texts should say.
        bank: folder of the bank.
        peft: one soft prompt, which has no ground truth; only for the error.
        dod: where the DoD of the bank is on this machine, if its manifest names another place.
        open_: opens a DoD.
        split: the entries to take, or ``all``; by default ``test`` where there is such an entry, else all.

    Returns:
        ``test``, with ``prompt_id``, ``task`` ("" where there is none), ``kind`` (the target), ``target`` (the ground truth as
        text) and ``labels`` (empty for instructions).

    Raises:
        ConfigError: no bank, or an unknown target.
        ArtifactError: the folder is no bank.
        DataError: entries that cannot be used, with ``file:line``, or none that match.
    """
    if target not in get_args(Target):
        raise ConfigError(f"There is no target {target!r}. {did_you_mean(str(target), list(FIELDS))}")
    if not bank:
        got = f"only peft={peft}, one prompt without ground truth" if peft else "no bank"
        raise ConfigError(
            f"The task verbalize_{target} got {got}; it needs a bank of soft prompts whose manifest has "
            f"'{FIELDS[target]}'. Pass --model_args bank=DIR or, where the model takes none, "
            '--metadata \'{"bank": "DIR"}\'.'
        )
    manifest = manifest_of(Path(str(bank)).expanduser())
    docs, splits = _read(manifest, target, _Truth(str(dod) if dod else None, open_))
    wanted = None if split == "all" else str(split) if split is not None else "test" if "test" in splits else None
    chosen = [doc for doc, own in zip(docs, splits, strict=True) if wanted in (None, own)]
    if not chosen:
        counts = {own or "no split": splits.count(own) for own in dict.fromkeys(splits)}
        held = ", ".join(f"{n} in {own}" for own, n in counts.items())
        raise DataError(
            f"{manifest} has no prompts with '{FIELDS[target]}'{f' in split {wanted}' if docs else ''}; it holds "
            + (
                f"{held}. Pass split=… to choose."
                if docs
                else "others only. Pass another bank or run the other verbalize task."
            )
        )
    from datasets import Dataset, Features, Value

    text = Value("string")
    columns = {"prompt_id": text, "task": text, "kind": text, "target": text, "labels": [text]}
    return {"test": Dataset.from_list(chosen, features=Features(columns))}


def with_truth(bank: Bank, dod: str | None = None, open_: Open = open_plain) -> Bank:
    """The bank with the labels and instructions of entries that hold only their hash, read from their DoD.

    Args:
        dod: where the DoD is on this machine, if the manifest names another place.

    Raises:
        DataError: the DoD is not there, or has another text than when the bank was made.
    """
    truth, entries = _Truth(dod, open_), []
    for entry in bank.entries:
        where = f"{bank.source}: {entry['prompt_id']!r}"
        known = {field: truth.of(entry, field, where) for field in FIELDS.values()}
        entries.append({**entry, **{field: value for field, value in known.items() if value}})
    return replace(bank, entries=tuple(entries))


def truths(bank: Bank, dod: str | None = None, open_: Open = open_plain) -> dict[str, tuple[str, str]]:
    """Prompt → split ("" where there is none) and ground truth: the labels joined by ", ", or the instruction.

    Raises:
        DataError: a prompt whose ground truth is not known; or as :func:`with_truth`.
    """
    found = {}
    for entry in with_truth(bank, dod, open_).entries:
        text = ", ".join(entry.get("labels") or ()) or str(entry.get("instruction") or "")
        if not text:
            raise DataError(f"{bank.source}: of {entry['prompt_id']!r} neither labels nor an instruction are known.")
        found[str(entry["prompt_id"])] = (str(entry.get("split") or ""), text)
    return found


def another(found: Mapping[str, tuple[str, str]], seed: int) -> dict[str, tuple[str, str]]:
    """Each prompt with the text of another one of its split: a control for texts that fit any task.

    Raises:
        DataError: a split in which some prompt gets no text but its own, whatever the order.
    """
    out: dict[str, tuple[str, str]] = {}
    for split in dict.fromkeys(split for split, _ in found.values()):
        groups: dict[str, list[str]] = {}
        for name, (own, text) in found.items():
            if own == split:
                groups.setdefault(text, []).append(name)
        order = list(groups.values())
        random.Random(f"{seed}/{split}").shuffle(order)
        names = [name for group in order for name in group]
        turn = max(map(len, order))  # past all of the same text
        if 2 * turn > len(names):
            raise DataError(f"The {len(names)} prompts of split {split!r} have too few different texts to swap them.")
        for name, theirs in zip(names, names[turn:] + names[:turn], strict=True):
            out[name] = (split, found[theirs][1])
    return {name: out[name] for name in found}


class DodTasks:
    """The DoD tasks that manifest lines name; each DoD is opened once.

    Args:
        override: where the DoD is on this machine, if the manifest names another place.
        open_: opens a DoD.
    """

    def __init__(self, override: str | None, open_: Open) -> None:
        self._override, self._open = override, open_
        self._opened: dict[str, Dod] = {}

    def of(self, entry: Mapping[str, Any], where: str) -> tuple[DodTask, str]:
        """The task of one line, and where it was read.

        Raises:
            DataError: the line names no DoD or task, or they are not there.
        """
        reference = entry.get("dod")
        if not isinstance(reference, dict):
            raise DataError(
                f"{where}: 'dod' is {reference!r}, expected the DoD of the prompt's task, as `softverb bank` writes it."
            )
        try:
            source, settings = self._override or source_of(reference), reference.get("settings") or {}
            key = json.dumps([source, settings], sort_keys=True)
            if key not in self._opened:
                self._opened[key] = self._open(source, settings)
            return self._opened[key].task(_text(entry.get("task"), f"{where}: 'task'")), source
        except ConfigError as error:
            raise DataError(f"{where}: {error} Pass dod=… for another place of the data.") from error


class _Truth:
    """Ground truth of manifest lines, read from their DoD where they hold only its hash."""

    def __init__(self, override: str | None, open_: Open) -> None:
        self._tasks = DodTasks(override, open_)

    def of(self, entry: Mapping[str, Any], field: str, where: str) -> Any:
        wanted = entry.get("truth_sha256")
        if field in entry or wanted is None or not isinstance(entry.get("dod"), dict):
            return entry.get(field)
        task, source = self._tasks.of(entry, where)
        truth = {"labels": list(task.labels), "instruction": task.instruction}
        if sha256_json(truth) != wanted:
            raise DataError(
                f"{where}: the ground truth of {task.name!r} in {source} is another text than when the bank was made."
            )
        return truth[field] or None


def _read(manifest: Path, target: Target, truth: _Truth) -> tuple[list[dict[str, Any]], list[str | None]]:
    """Documents of the entries that have the target, and their splits."""
    docs: list[dict[str, Any]] = []
    splits: list[str | None] = []
    names = set[str]()
    field = FIELDS[target]
    for number, entry in read_jsonl(manifest):
        where = f"{manifest}:{number}"
        name = _text(entry.get("prompt_id"), f"{where}: 'prompt_id'")
        if name in names:
            raise DataError(f"{where}: a second prompt is named {name!r}; names must be unique.")
        names.add(name)
        gold = truth.of(entry, field, where)
        if gold is None:
            continue
        if target == "labels" and (not isinstance(gold, list) or not gold):
            raise DataError(f"{where}: 'labels' is {gold!r}, expected a list of strings; leave the field out where unknown.")
        parts = [_text(part, f"{where}: '{field}'") for part in (gold if target == "labels" else [gold])]
        task = _text(entry["task"], f"{where}: 'task'") if entry.get("task") is not None else ""
        own = _text(entry["split"], f"{where}: 'split'") if entry.get("split") is not None else None
        labels = parts if target == "labels" else []
        docs.append({"prompt_id": name, "task": task, "kind": target, "target": ", ".join(parts), "labels": labels})
        splits.append(own)
    return docs, splits


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where} is {value!r}, expected text.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where} has half a surrogate pair at character {error.start}. Write it again.") from error
    return value
