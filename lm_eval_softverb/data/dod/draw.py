"""How rows of a task are chosen: unwound, measured, drawn, and some held out.

A row is drawn by the hash of its text and the seed, so which rows are drawn depends neither on their order in the source
nor on the caps of small versions.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from lm_eval_softverb import storage
from lm_eval_softverb.data.dod.sources import Instance, RawTask
from lm_eval_softverb.data.dod.tokens import PIECES, TokenCounter
from lm_eval_softverb.data.rows import Row
from lm_eval_softverb.errors import ConfigError

_BATCH = 512
Part = Sequence[tuple[str, str, Instance]]  # input, output, where they are from


@dataclass(frozen=True)
class Settings:
    """How rows are chosen; the defaults are the paper's, with rows held out.

    Attributes:
        seed: of the draw and of what is held out.
        rows: (input, output) pairs drawn per task.
        heldout: rows held out per task, at least; half of the rows where there are fewer than twice as many.
        min_instances: a task with fewer short instances does not pass.
        limit_tokens: an instance with more tokens in input and output is long.
        max_tokens: for small versions: rows with more tokens are not drawn.
        max_rows: for small versions: at most this many training rows; what is held out stays the same.
    """

    seed: int = 0
    rows: int = 500
    heldout: int = 100
    min_instances: int = 500
    limit_tokens: int = 400
    max_tokens: int | None = None
    max_rows: int | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and (not isinstance(value, int) or value < (name != "seed")):
                raise ConfigError(f"{name} is {value!r}, expected a whole number{' of at least 1' if name != 'seed' else ''}.")

    @property
    def row_tokens(self) -> int:
        return min(self.limit_tokens, self.max_tokens or self.limit_tokens)


def lengths(part: Part, counter: TokenCounter | None) -> list[int]:
    """Tokens of input and output of each row [N]; without a counter those that come with the source, else pieces."""
    if counter is None and all(i.tokens is not None for _, _, i in part):
        # Counted for the first output; another one changes the count in proportion to the characters.
        return [
            round((i.tokens or 0) * len(text + output) / max(1, len(i.input.strip() + i.outputs[0].strip())))
            for text, output, i in part
        ]
    count = (counter or PIECES).count
    inputs, outputs = count([text for text, _, _ in part]), count([output for _, output, _ in part])
    return [a + b for a, b in zip(inputs, outputs, strict=True)]


def count_short(raw: RawTask, enough: int, settings: Settings, counter: TokenCounter | None) -> int:
    """Instances whose input and first output are short; stops at ``enough``."""
    short = 0
    for part in _batches([(i.input.strip(), i.outputs[0].strip(), i) for i in raw.instances if i.outputs]):
        short += sum(n <= settings.row_tokens for n in lengths(part, counter))
        if short >= enough:
            return enough
    return short


def draw(raw: RawTask, settings: Settings, counter: TokenCounter | None) -> tuple[list[Row], dict[str, int]]:
    """The task's rows ``Input: {x}\\nOutput:`` / `` {y}`` in the order of the draw, and counts of what was left out."""
    candidates: dict[tuple[str, str], Instance] = {}
    unwound = unusable = 0
    for instance in raw.instances:
        for output in instance.outputs:
            unwound += 1
            text, answer = instance.input.strip(), output.strip()
            if not answer or not _encodes(text + answer):
                unusable += 1
            else:
                candidates.setdefault((text, answer), instance)
    ranked = sorted((_rank(settings.seed, "row", *pair), *pair) for pair in candidates)
    rows: list[Row] = []
    long = 0
    for part in _batches([(text, output, candidates[text, output]) for _, text, output in ranked]):
        short = [n <= settings.row_tokens for n in lengths(part, counter)]
        room = settings.rows - len(rows)
        chosen = [place for place, fits in enumerate(short) if fits][:room]
        rows += [Row(f"Input: {part[place][0]}\nOutput:", part[place][1]) for place in chosen]
        looked_at = short[: chosen[-1] + 1] if len(chosen) == room else short
        long += looked_at.count(False)
        if len(rows) == settings.rows:
            break
    counts = {
        "n_instances": len(raw.instances),
        "n_unwound": unwound,
        "n_unusable": unusable,
        "n_duplicates": unwound - unusable - len(candidates),
        "n_too_long": long,
        "n_not_drawn": len(candidates) - long - len(rows),
    }
    return rows, counts


def hold_out(rows: Sequence[Row], wanted: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Training rows and at least ``wanted`` held-out rows (half where there are fewer than twice as many), orders kept.

    All rows of one input go to the same side; blanks and case do not make two inputs.
    """
    groups: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(_same(row.input), []).append(place)
    target, most = min(wanted, len(rows) // 2), max(wanted, len(rows) // 2)
    held: set[int] = set()
    for key in sorted(groups, key=lambda text: _rank(seed, "heldout", text)):
        # An input with very many outputs would leave nothing to train on.
        if len(held) < target and len(held) + len(groups[key]) <= most and len(held) + len(groups[key]) < len(rows):
            held.update(groups[key])
    return [r for i, r in enumerate(rows) if i not in held], [r for i, r in enumerate(rows) if i in held]


def n_inputs(raw: RawTask) -> int:
    """Different inputs, blanks and case aside."""
    return len({_same(instance.input) for instance in raw.instances})


def _rank(seed: int, what: str, *texts: str) -> str:
    return storage.sha256_json([seed, what, *texts])


def _same(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split()).casefold()


def _encodes(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair; no tokenizer reads it
        return False
    return True


def _batches(items: Part) -> Iterator[Part]:
    for start in range(0, len(items), _BATCH):
        yield items[start : start + _BATCH]
