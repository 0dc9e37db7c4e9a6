"""Rows from the harness: the training split of any task, rendered exactly as the task renders what it scores."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

from lm_eval_softverb.data.rows import Row, read_rows
from lm_eval_softverb.errors import ConfigError, DataError, did_you_mean
from lm_eval_softverb.plugin import task_dir

_PREFIXES = ("", "softverb_", "softverb_labels_")


def find_rows(source: str, *, max_rows: int | None = None, seed: int = 0) -> tuple[list[Row], dict[str, Any]]:
    """Rows named on a command line, and where they came from.

    Args:
        source: a ``.jsonl`` or ``.csv`` file with columns input and output; the name of a dataset (``sst2``, ``weather``);
            or any task of the harness, whose training split is used.
        max_rows: at most this many rows, drawn at random by ``seed``.

    Raises:
        ConfigError: no such file, dataset or task.
        DataError: rows that cannot be used.
    """
    path = Path(source)
    if path.suffix.lower() in (".jsonl", ".csv"):
        if not path.exists():
            raise ConfigError(f"There is no file {path}.")
        rows, info = read_rows(path), {"file": path.name}
    else:
        rows, task = _task_rows(source)
        info = {"task": task}
    total = len(rows)
    if max_rows is not None and max_rows < total:
        rows = random.Random(seed).sample(rows, max_rows)
    return rows, {"source": {**info, "rows_available": total, "rows_used": len(rows)}}


def _task_rows(name: str) -> tuple[list[Row], str]:
    from lm_eval.tasks import TaskManager

    ours = TaskManager(include_path=str(task_dir()), include_defaults=False)
    known = next((p + name for p in _PREFIXES if p + name in ours.all_subtasks), None)
    manager = ours
    if known is None:
        logging.getLogger(__name__).info("%s is not one of our tasks; reading the harness's own", name)
        manager = TaskManager()
        if name not in manager.all_subtasks:
            short = [t.removeprefix("softverb_").removeprefix("labels_") for t in ours.all_subtasks]
            raise ConfigError(f"Unknown dataset or task {name!r}. {did_you_mean(name, [*short, *manager.all_subtasks])}")
        known = name
    task = manager.load([known])["tasks"][known]
    if not task.has_training_docs():
        raise DataError(f"Task {known} has no training split; train on a task that has one, or on a .jsonl file.")
    return [_row(task, doc, known) for doc in task.training_docs()], known


def _row(task: Any, doc: dict[str, Any], name: str) -> Row:
    text, target = task.doc_to_text(doc), task.doc_to_target(doc)
    if isinstance(target, int) and task.config.doc_to_choice is not None:
        target = task.doc_to_choice(doc)[target]
    if isinstance(target, list) and target:
        target = target[0]
    if not isinstance(text, str) or not isinstance(target, str):
        raise DataError(
            f"Task {name} gives input {type(text).__name__} and target {type(target).__name__}; both must be text. "
            "Write its rows to a .jsonl file with columns input and output."
        )
    return Row(text, target, task.config.target_delimiter)
