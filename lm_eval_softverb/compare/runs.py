"""Runs of the harness as they lie on disk: results JSON, and per-document scores from the samples JSONL."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval_softverb import storage
from lm_eval_softverb.errors import ArtifactError, DataError

_STAMP = re.compile(r"_(\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d\.\d+)\.jsonl?$")
MAX_RESULTS_BYTES = 256 << 20
Key = str
"""A document within its task: its hash and its number, since the same text may occur twice."""


@dataclass(frozen=True)
class Task:
    """One task (or one task of a DoD) as one run scored it.

    Attributes:
        scores: metric → document → score.
        unscored: documents without a score, for example because an endpoint gave no usable reply; never counted as wrong.
        texts: document → what the page shows: input, target, answer.
    """

    scores: Mapping[str, Mapping[Key, float]]
    unscored: frozenset[Key] = frozenset()
    texts: Mapping[Key, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One arm of a comparison.

    Attributes:
        name: in tables.
        tasks: by name; a harness task whose documents carry a ``task`` field is one entry per value of it.
        config: the ``config`` block of the results: model, arguments, and what our models add (cost, tokens, prompts).
        higher_is_better: by metric.
    """

    name: str
    tasks: Mapping[str, Task]
    config: Mapping[str, Any]
    higher_is_better: Mapping[str, bool]
    source: str = ""


def read_run(folder: Path | str, name: str = "") -> Run:
    """Reads the newest run below ``folder`` (what ``--output_path`` and ``--log_samples`` wrote).

    Raises:
        ArtifactError: no results there, or no samples beside them.
        DataError: a sample that cannot be read, or a document that was scored twice.
    """
    root = Path(folder).expanduser()
    found = sorted(root.rglob("results_*.json") if root.is_dir() else [root], key=lambda p: _stamp(p.name))
    if not found or not found[-1].is_file():
        raise ArtifactError(f"{root} has no results_*.json. Pass the folder given to lm_eval as --output_path.")
    results = found[-1]
    value = storage.read_json(results, max_bytes=MAX_RESULTS_BYTES)
    if not isinstance(value, dict) or not isinstance(value.get("results"), dict):
        raise ArtifactError(f"{results} is no results file of the harness: it has no object 'results'.")
    stamp = _stamp(results.name)
    files = sorted(p for p in results.parent.glob("samples_*.jsonl") if _stamp(p.name) == stamp)
    if not files:
        raise ArtifactError(f"{results} has no samples beside it. Run lm_eval with --log_samples; comparing needs documents.")
    tasks: dict[str, Task] = {}
    for path in files:
        harness_task = path.name.removeprefix("samples_")[: -len(f"_{stamp}.jsonl")]
        tasks |= _tasks(path, harness_task)
    better: dict[str, bool] = {}
    for metrics in (value.get("higher_is_better") or {}).values():
        better |= {str(m): bool(up) for m, up in (metrics or {}).items() if up is not None}
    return Run(name or root.name, tasks, value.get("config") or {}, better, str(results))


def _stamp(name: str) -> str:
    found = _STAMP.search(name)
    return found.group(1) if found else ""


def _tasks(path: Path, harness_task: str) -> dict[str, Task]:
    scores: dict[str, dict[str, dict[Key, float]]] = {}
    unscored: dict[str, set[Key]] = {}
    texts: dict[str, dict[Key, dict[str, str]]] = {}
    for number, sample in storage.read_jsonl(path):
        where = f"{path}:{number}"
        try:
            doc, metrics = sample["doc"], sample["metrics"]
            key = f"{sample['doc_hash']}/{sample['doc_id']}"
            values = {m: sample[m] for m in metrics}
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{where}: no sample of the harness ({error!r} is missing). Run it again with --log_samples."
            ) from error
        inner = doc.get("task") if isinstance(doc, dict) else None
        task = (
            f"{harness_task}/{inner}" if isinstance(inner, str) and inner and harness_task.startswith("dod_") else harness_task
        )
        if not values:  # the model gave no answer and the task left the document out
            unscored.setdefault(task, set()).add(key)
        for metric, score in values.items():
            if score is not None and not isinstance(score, (bool, int, float)):
                continue  # corpus metrics keep texts until all documents are done
            mine = scores.setdefault(task, {}).setdefault(_named(metric, sample.get("filter")), {})
            if key in mine:
                raise DataError(f"{where}: document {sample['doc_id']} was scored twice; expected one answer per document.")
            if score is None or score != score:
                unscored.setdefault(task, set()).add(key)
            else:
                mine[key] = float(score)
        texts.setdefault(task, {})[key] = {
            "input": _input(sample),
            "target": _shown(sample.get("target")),
            "answer": _shown(sample.get("filtered_resps")),
        }
    found = [task for task in texts if task in scores or task in unscored]
    return {task: Task(scores.get(task, {}), frozenset(unscored.get(task, ())), texts[task]) for task in found}


def _named(metric: str, filter_name: object) -> str:
    return metric if filter_name in (None, "", "none") else f"{metric},{filter_name}"


def _input(sample: Mapping[str, Any]) -> str:
    arguments = sample.get("arguments")
    first = next(iter(arguments.values()), "") if isinstance(arguments, dict) else arguments
    while isinstance(first, Sequence) and not isinstance(first, str) and first:
        first = first[0]
    return _shown(first.get("arg_0") if isinstance(first, dict) else first)


def _shown(value: object) -> str:
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
