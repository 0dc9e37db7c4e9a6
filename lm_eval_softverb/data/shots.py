"""What the training rows of a prompt's task say without any model: examples to put in front, and the most frequent output."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest

from lm_eval_softverb.bank import Bank
from lm_eval_softverb.data.rows import Row, data_sha256
from lm_eval_softverb.data.verbalization import DodTasks, Open
from lm_eval_softverb.errors import ConfigError, DataError

BREAK = "\n\n"
"""Between examples, and between a hard prompt and its document: the document goes on like one more example."""


def training_rows(bank: Bank, dod: str | None, open_: Open) -> dict[str, tuple[Row, ...]]:
    """Prompt → the rows it could be tuned on; rows that are held out for scoring are not among them.

    Args:
        dod: where the DoD is on this machine, if the manifest names another place.
        open_: opens a DoD, with its tokenizer: which rows are drawn may depend on it.

    Raises:
        DataError: a prompt whose task is not known, or whose rows are split in another way than in its training.
    """
    tasks, found = DodTasks(dod, open_), {}
    for entry in bank.entries:
        where = f"{bank.source}: {entry['prompt_id']!r}"
        task, source = tasks.of(entry, where)
        held = data_sha256(task.heldout)
        if entry.get("heldout_sha256") not in (None, held):
            raise DataError(
                f"{where}: the rows held out of {task.name} in {source} are not those of the prompt's training (hash "
                f"{held[:12]}, expected {str(entry['heldout_sha256'])[:12]}). Use the same data and settings."
            )
        if not task.train:
            raise DataError(f"{where}: {task.name} in {source} has no rows to train on.")
        found[str(entry["prompt_id"])] = task.train
    return found


def draw(rows: Sequence[Row], k: int, seed: int, name: str) -> list[Row]:
    """``k`` rows of different inputs in random order, their outputs as varied as ``k`` allows.

    Args:
        seed: of the draw, which also depends on ``name``.

    Raises:
        ConfigError: ``k`` is not positive.
        DataError: fewer rows of different inputs.
    """
    if k < 1:
        raise ConfigError(f"The number of examples is {k}, expected at least 1.")
    stream = random.Random(f"{seed}/{name}")
    first = {row.input: row for row in stream.sample(rows, len(rows))}
    if len(first) < k:
        raise DataError(f"{name} has {len(first)} training rows of different inputs, too few for {k} examples. Ask for fewer.")
    groups: dict[str, list[Row]] = {}
    for row in first.values():
        groups.setdefault(row.output, []).append(row)
    chosen = [row for turn in zip_longest(*groups.values()) for row in turn if row is not None][:k]
    return stream.sample(chosen, k)


def as_text(rows: Sequence[Row]) -> str:
    """Examples as a hard prompt; the harness writes its few-shot examples in the same way."""
    return BREAK.join(row.input + row.delimiter + row.output for row in rows)


def majority(rows: Sequence[Row]) -> str:
    """The most frequent output; of several the one that comes first."""
    return Counter(row.output for row in rows).most_common(1)[0][0]
