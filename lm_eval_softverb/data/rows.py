"""Rows of (input, output), the one shape every tuner reads, and the files they come from."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from lm_eval_softverb import storage
from lm_eval_softverb.errors import DataError


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
        input: all the model reads before it answers, e.g. ``"Sentence: … Label:"``.
        output: the answer, without a leading blank.
        delimiter: what stands between them; a chat turn replaces it.
    """

    input: str
    output: str
    delimiter: str = " "


def read_rows(path: Path | str) -> list[Row]:
    """Rows of a ``.jsonl`` or ``.csv`` file with the columns ``input`` and ``output`` (``delimiter`` is optional).

    Raises:
        DataError: naming ``file:line`` for a row that cannot be used; or the file is empty or of another kind.
    """
    path = Path(path)
    source = {".jsonl": storage.read_jsonl, ".csv": storage.read_csv}.get(path.suffix.lower())
    if source is None:
        raise DataError(f"{path}: expected a .jsonl or .csv file with columns input and output, got '{path.suffix}'.")
    rows = [_row(path, number, value) for number, value in source(path)]
    if not rows:
        raise DataError(f"{path} holds no rows; expected at least one with columns input and output.")
    return rows


def _row(path: Path, number: int, value: dict[str, Any]) -> Row:
    for key in ("input", "output"):
        if not isinstance(value.get(key), str):
            raise DataError(
                f"{path}:{number}: column '{key}' is {type(value.get(key)).__name__}, expected text; "
                f"columns here: {', '.join(map(str, value))}."
            )
    if not value["output"].strip():
        raise DataError(f"{path}:{number}: the output is empty; there is nothing to learn from this row.")
    delimiter = value.get("delimiter", " ")
    if not isinstance(delimiter, str):
        raise DataError(f"{path}:{number}: column 'delimiter' is {type(delimiter).__name__}, expected text.")
    return Row(value["input"], value["output"], delimiter)


def data_sha256(rows: Iterable[Row]) -> str:
    """Hash of the rows in their order."""
    return storage.sha256_json([astuple(r) for r in rows])


def split_rows(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Shuffles and splits into training and validation rows; no text stands on both sides.

    Raises:
        DataError: too few distinct rows for both parts.
    """
    distinct = sorted({(r.input, r.output): r for r in rows}.values(), key=astuple)
    random.Random(seed).shuffle(distinct)
    held = max(1, round(fraction * len(distinct)))
    if len(distinct) - held < 1:
        raise DataError(f"{len(distinct)} distinct rows are too few to hold {held} out for validation; expected at least 2.")
    validation = {(r.input, r.output) for r in distinct[:held]}
    return [r for r in rows if (r.input, r.output) not in validation], distinct[:held]
