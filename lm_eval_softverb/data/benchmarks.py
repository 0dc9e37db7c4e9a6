"""Eight public classification datasets behind one loader, with the same columns whatever the source.

Rows come from the hub or, when the environment variable ``SOFTVERB_DATA_DIR`` is set, from files
``<folder>/<name>/<split>.parquet``, ``.jsonl`` or ``.csv`` with the columns that the hub uses. A dataset without an
official split may be one file ``all.*`` instead; the split is then a function of the row, so that it never changes:

* deceptive_opinion_spam: fold 5 of the corpus is the test split, folds 1 to 4 train;
* human_vs_ai_essays: by the parity of SHA-256 of ``pair_id`` (of the text where there is none), about half each, and
  the two essays on one prompt stay together.

Blanks around a text are stripped (the hub's SST-2 ends every sentence with one); nothing else is changed or dropped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any

from lm_eval_softverb.errors import ConfigError, DataError, ModelUnavailable, did_you_mean
from lm_eval_softverb.storage import read_csv, read_jsonl, sha256_bytes

if TYPE_CHECKING:
    from datasets import Dataset

DATA_DIR = "SOFTVERB_DATA_DIR"
Row = dict[str, Any]
Rows = Iterable[tuple[str, Row]]  # pairs of (where the row stands, for messages; the row)


@dataclass(frozen=True)
class Benchmark:
    """How one dataset is found and read."""

    hub: str | None  # id on the hub; None where there is no copy that we know of
    label_words: tuple[str, ...]  # what a model answers, in the order of the label index
    splits: tuple[str, ...] = ("train", "test")  # first the training split, last the one that tasks score
    text: str = "{text}"  # makes the document's text out of columns
    label: tuple[str, ...] = ("label",)  # the first of these columns that is there counts: names before numbers
    spellings: tuple[tuple[str, ...], ...] = ()  # per label: values that mean it, besides its word and its index
    split_of: Callable[[str, Row], str] | None = None  # names the split of a row; None where splits are official

    def label_index(self) -> dict[str, int]:
        """Case-folded value in the data → label index."""
        rows = enumerate(zip_longest(self.label_words, self.spellings, fillvalue=()))
        return {value.casefold(): i for i, (word, more) in rows for value in (word, str(i), *more)}


def _split_by_fold(where: str, row: Row) -> str:
    fold = str(row.get("fold"))
    if fold not in ("1", "2", "3", "4", "5"):
        raise DataError(f"{where}: 'fold' is {fold}, expected 1 to 5; fold 5 is the test split.")
    return "test" if fold == "5" else "train"


def _split_by_pair(where: str, row: Row) -> str:
    key = row.get("pair_id", row.get("text"))
    if key is None:
        raise DataError(f"{where}: neither 'pair_id' nor 'text' has a value; the split of a row depends on them.")
    return "test" if int(sha256_bytes(str(key).encode("utf-8", "surrogatepass")), 16) % 2 else "train"


BENCHMARKS: dict[str, Benchmark] = {
    # The hub hides the test labels (-1), so that split is not offered.
    "sst2": Benchmark("stanfordnlp/sst2", ("negative", "positive"), ("train", "validation"), "{sentence}"),
    "sst5": Benchmark("SetFit/sst5", ("terrible", "bad", "neutral", "good", "great"), ("train", "validation", "test")),
    "ag_news": Benchmark("fancyzhx/ag_news", ("world", "sports", "business", "technology")),
    # Copies disagree on which of the two is 0, so the name is read first.
    "subj": Benchmark("SetFit/subj", ("subjective", "objective"), label=("label_text", "label")),
    "trec": Benchmark(
        "SetFit/TREC-QC",
        ("abbreviation", "entity", "description", "human", "location", "number"),
        # `label` is not among them: on SetFit's copy it is the fine class, numbered in its own way.
        label=("coarse_text", "label_coarse_text", "label_coarse_original", "label_original", "coarse_label"),
        spellings=(("ABBR",), ("ENTY",), ("DESC",), ("HUM", "human being"), ("LOC",), ("NUM", "numeric value")),
    ),
    "boolq": Benchmark(
        "google/boolq",
        ("no", "yes"),
        ("train", "validation"),
        "{passage} Question: {question}?",
        label=("answer",),
        spellings=(("false",), ("true",)),
    ),
    "deceptive_opinion_spam": Benchmark(None, ("truthful", "deceptive"), split_of=_split_by_fold),
    "human_vs_ai_essays": Benchmark(
        "andythetechnerd03/AI-human-text",
        ("human", "machine"),
        label=("label", "generated"),
        spellings=(("0.0",), ("1.0", "AI")),
        split_of=_split_by_pair,
    ),
}


def load(name: str, **_: Any) -> dict[str, Dataset]:
    """Reads one benchmark; tasks call it through ``custom_dataset``, which also passes all of lm_eval's metadata.

    Returns:
        For each split on offer a dataset with ``text``, ``label`` (index into the label words) and ``choices`` (the
        label words), plus ``passage`` and ``question`` for BoolQ.

    Raises:
        ConfigError: no benchmark of that name.
        DataError: files or rows that cannot be used, with ``file:line`` where there is one.
        ModelUnavailable: the hub cannot be reached and ``SOFTVERB_DATA_DIR`` is not set.
    """
    if name not in BENCHMARKS:
        raise ConfigError(f"There is no benchmark {name!r}. {did_you_mean(name, list(BENCHMARKS))}")
    benchmark = BENCHMARKS[name]
    folder = os.environ.get(DATA_DIR)
    origin = str(Path(folder).expanduser() / name) if folder else str(benchmark.hub)
    parts = _folder_parts(Path(origin), benchmark) if folder else _hub_parts(name, benchmark)
    if benchmark.split_of and "all" in parts and not parts.keys() >= set(benchmark.splits):
        placed = [(benchmark.split_of(where, row), where, row) for where, row in parts["all"]]
        parts = {s: [(where, row) for split, where, row in placed if split == s] for s in benchmark.splits}
    missing = [split for split in benchmark.splits if split not in parts]
    if missing:
        raise DataError(
            f"{origin} has no split {' or '.join(missing)}. Expected <split>.parquet, .jsonl or .csv for each of "
            f"{', '.join(benchmark.splits)}{' (or one file all.*)' if benchmark.split_of else ''}; {DATA_DIR} names "
            "the folder above, and unset it means the hub."
        )
    return {split: _dataset(benchmark, f"{origin}, split {split}", parts[split]) for split in benchmark.splits}


def _dataset(benchmark: Benchmark, origin: str, rows: Rows) -> Dataset:
    from datasets import Dataset

    columns = [column for _, column, _, _ in Formatter().parse(benchmark.text) if column]
    index, choices = benchmark.label_index(), list(benchmark.label_words)
    uniform: list[Row] = []
    seen: dict[str, str] = {}
    for where, row in rows:
        identifier = row.get("idx", row.get("id"))
        if identifier is not None and seen.setdefault(str(identifier), where) != where:
            raise DataError(f"{where}: id {identifier!r} was used before, at {seen[str(identifier)]}. Ids are unique.")
        texts = {column: _text(where, row, column) for column in columns}
        label = _label(where, row, benchmark.label, index)
        parts = texts if len(texts) > 1 else {}
        uniform.append({"text": benchmark.text.format(**texts), **parts, "label": label, "choices": choices})
    found = {row["label"] for row in uniform}
    if len(found) < 2:
        what = f"only rows of one class, {choices[found.pop()]!r}" if found else "no rows"
        raise DataError(f"{origin} has {what}; expected rows of the classes {', '.join(choices)}. Check the file.")
    return Dataset.from_list(uniform)


def _text(where: str, row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise DataError(
            f"{where}: column '{column}' "
            + (f"holds {type(value).__name__}, expected text." if column in row else f"is missing; found {list(row)}.")
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: '{column}' has half a surrogate pair at character {error.start}.") from error
    return value.strip()


def _label(where: str, row: Row, columns: tuple[str, ...], index: dict[str, int]) -> int:
    column = next((column for column in columns if column in row), None)
    if column is None:
        raise DataError(f"{where}: the label is missing; expected a column {' or '.join(columns)}, found {list(row)}.")
    value = str(row[column]).strip().casefold()
    if column == "label_original":
        value = value.partition(":")[0]  # TREC's "DESC:manner" is of the class DESC
    if value not in index:
        raise DataError(f"{where}: '{column}' is {row[column]!r}, expected one of {', '.join(index)}.")
    return index[value]


def _hub_parts(name: str, benchmark: Benchmark) -> dict[str, Rows]:
    files = f"set {DATA_DIR} to a folder with {name}/<split>.parquet, .jsonl or .csv"
    if benchmark.hub is None:
        raise ModelUnavailable(f"{name} is not on the hub. Get the corpus from its authors and {files} (or one all.*).")
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        data = datasets.load_dataset(benchmark.hub)
    except (OSError, DatasetsError) as error:
        raise ModelUnavailable(
            f"The dataset {benchmark.hub} is neither in the cache nor reachable ({error}). Download it beforehand with "
            f"python -c \"import datasets; datasets.load_dataset('{benchmark.hub}')\" where there is a network and the "
            f"same HF_HOME, or {files}."
        ) from error
    parts: dict[str, Rows] = {split: _numbered(f"{benchmark.hub}, {split}", data[split].to_list) for split in data}
    return {"all": parts["train"]} if benchmark.split_of and list(parts) == ["train"] else parts


def _folder_parts(folder: Path, benchmark: Benchmark) -> dict[str, Rows]:
    parts: dict[str, Rows] = {}
    for stem in (*benchmark.splits, "all"):
        paths = [path for path in (folder / f"{stem}{suffix}" for suffix in _READERS) if path.is_file()]
        if len(paths) > 1:
            raise DataError(f"{folder} has {' and '.join(path.name for path in paths)}; keep one of them.")
        if paths:
            parts[stem] = _READERS[paths[0].suffix](paths[0])
    return parts


def _numbered(origin: str, read: Callable[[], list[Row]]) -> Iterator[tuple[str, Row]]:
    for number, row in enumerate(read(), start=1):
        yield f"{origin}, row {number}", row


def _parquet(path: Path) -> list[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        return list(parquet.read_table(path).to_pylist())
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable parquet file ({error}). It may be truncated.") from error


def _lines(path: Path, read: Callable[[Path], Iterator[tuple[int, Row]]]) -> Rows:
    return ((f"{path}:{number}", row) for number, row in read(path))


_READERS: dict[str, Callable[[Path], Rows]] = {
    ".parquet": lambda path: _numbered(str(path), lambda: _parquet(path)),
    ".jsonl": lambda path: _lines(path, read_jsonl),
    ".csv": lambda path: _lines(path, read_csv),
}
