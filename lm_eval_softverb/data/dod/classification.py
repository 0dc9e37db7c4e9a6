"""The classification DoD (section 3): many small label sets with sentences, read from one SQLite file of three tables.

The file comes from `softverb dod generate` or from somebody else, so nothing in it is believed before it is checked.
"""

from __future__ import annotations

import gzip
import json
import random
import sqlite3
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lm_eval_softverb import storage
from lm_eval_softverb.data import labelsets
from lm_eval_softverb.data.dod import DodTask
from lm_eval_softverb.data.rows import Row
from lm_eval_softverb.errors import ConfigError, DataError, did_you_mean

SCHEMA = """
CREATE TABLE datasets (id INTEGER PRIMARY KEY, seed_words TEXT NOT NULL);
CREATE TABLE keywords (
    id INTEGER PRIMARY KEY, dataset_id INTEGER NOT NULL REFERENCES datasets(id), keyword TEXT NOT NULL
);
CREATE TABLE sentences (
    id INTEGER PRIMARY KEY, keyword_id INTEGER NOT NULL REFERENCES keywords(id), sentence TEXT NOT NULL
);
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
"""Three tables of data; ``meta`` holds JSON values about the file: format, config, counts, usage."""

FORMAT = 1
MAX_BYTES = 4 << 30
"""Of a compressed file's contents: a few kilobytes can unpack to terabytes."""
MAX_TEXT = 2_000
"""Characters of the longest text that is believed to be a sentence."""

SHIPPED = {"tight": Path(__file__).parents[1] / "tight.sqlite.gz"}
"""Name → file; its card lies beside it."""

_QUERIES = {
    "datasets": "SELECT id, seed_words FROM datasets ORDER BY id",
    "keywords": "SELECT id, dataset_id, keyword FROM keywords ORDER BY id",
    "sentences": "SELECT id, keyword_id, sentence FROM sentences ORDER BY id",
}
_Sentences = tuple[str, ...]


@dataclass(frozen=True)
class Reading:
    """How a file becomes tasks.

    Attributes:
        test_share: of the label sets that are for testing; by a hash of the set's id, so that it never changes.
        heldout: sentences per label that are never trained on; at least one of each label stays for training.
        seed: of the labels' order in the target text, and of which sentences are held out.
    """

    test_share: float = 0.2
    heldout: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.test_share <= 1 or self.heldout < 1:
            raise ConfigError(
                f"test_share is {self.test_share} and heldout {self.heldout}; expected a share of 0 to 1 and at least 1 row."
            )


@dataclass(frozen=True)
class ClassificationDod:
    """Label sets as tasks; all text is in memory, rows are made on demand."""

    kind: ClassVar[str] = "classification"
    sha256: str
    sets: Mapping[str, Mapping[str, tuple[_Sentences, _Sentences]]]
    """Task → label → sentences to train on and held out."""
    reading: Reading
    splits: Mapping[str, str]
    source: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path | str, reading: Reading = Reading()) -> ClassificationDod:
        """Reads a file of `softverb dod generate`, also compressed by gzip (``.gz``); it is opened for reading only.

        Args:
            path: of the file, or the name of a shipped one (:data:`SHIPPED`).

        Raises:
            DataError: not such a file, or a row that cannot be used, named by table and id.
        """
        path = Path(path)
        file = SHIPPED[str(path)] if str(path) in SHIPPED and not path.exists() else path
        try:
            with _unpacked(file) as plain:
                digest = storage.sha256_file(plain)
                with closing(sqlite3.connect(f"{plain.resolve().as_uri()}?mode=ro", uri=True)) as db:
                    db.text_factory = bytes
                    found, meta = _tables(path, db), _meta(path, db)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"Cannot read {path}: {getattr(error, 'strerror', None) or error}.") from error
        except sqlite3.Error as error:
            raise DataError(
                f"{path} is not a readable file of `softverb dod generate` ({error}); expected SQLite with the tables "
                "datasets, keywords and sentences. It may be truncated; copy or generate it again."
            ) from error
        if not found:
            raise DataError(f"{path} holds no label sets; run `softverb dod generate` again to go on.")
        sets, splits = {}, {}
        for number, labels in found.items():
            name = f"labels_{number:05d}"
            sets[name] = {label: _hold_out(name, label, s, reading) for label, s in labels.items()}
            splits[name] = split_of(number, reading.test_share)
        return cls(storage.sha256_json([digest, vars(reading)]), sets, reading, splits, {"path": str(path), "meta": meta})

    @classmethod
    def from_labelsets(cls, reading: Reading = Reading()) -> ClassificationDod:
        """The twelve shipped label sets, with the split of sentences that the tasks ``softverb_labels_*`` have."""
        sets, splits = {}, {}
        for name in labelsets.names():
            words, loaded = labelsets.label_words(name), labelsets.load(name)
            of: dict[str, dict[str, _Sentences]] = {
                split: {
                    word: tuple(r["text"] for r in loaded[split] if r["label"] == index) for index, word in enumerate(words)
                }
                for split in ("train", "test")
            }
            sets[name] = {word: (of["train"][word], of["test"][word]) for word in words}
            splits[name] = "test" if _share(name) < reading.test_share else "train"
        digest = storage.sha256_json([storage.sha256_file(labelsets.FILE), vars(reading)])
        return cls(digest, sets, reading, splits, {"path": "", "meta": {}})

    def reference(self) -> dict[str, Any]:
        """What a bank's manifest records as ``dod``: enough to open it again and to notice other data."""
        stock = vars(Reading())
        changed = {key: value for key, value in vars(self.reading).items() if value != stock[key]}
        return {"kind": self.kind, "source": self.source.get("path", ""), "settings": changed, "sha256": self.sha256}

    def names(self, split: str | None = None) -> list[str]:
        return [name for name in self.sets if split in (None, self.splits[name])]

    def task(self, name: str) -> DodTask:
        """Rows of one label set; both parts are shuffled, so that the labels alternate.

        Raises:
            ConfigError: no task of that name.
        """
        if name not in self.sets:
            raise ConfigError(f"There is no label set {name!r}. {did_you_mean(name, list(self.sets)[:1000])}")
        labels = list(self.sets[name])
        stream = random.Random(f"{self.reading.seed}:{name}")
        stream.shuffle(labels)
        parts = []
        for part in (0, 1):
            rows = [to_row(s, label) for label in sorted(labels) for s in self.sets[name][label][part]]
            stream.shuffle(rows)
            parts.append(tuple(rows))
        info = {
            "source": Path(self.source.get("path", "") or labelsets.FILE).name,
            "sha256": storage.sha256_json([labels, *map(_texts, parts)]),
        }
        return DodTask(name, self.splits[name], parts[0], parts[1], tuple(labels), info=info)


def split_of(number: int, test_share: float = Reading.test_share) -> str:
    """Split of the label set with this number, in every file."""
    return "test" if _share(f"dataset {number}") < test_share else "train"


def to_row(sentence: str, label: str) -> Row:
    return Row(f"Sentence: {sentence} Label:", label)


def _texts(rows: Sequence[Row]) -> list[list[str]]:
    return [[r.input, r.output] for r in rows]


def _share(key: str) -> float:
    """A number in [0, 1) that depends on ``key`` only."""
    return int(storage.sha256_bytes(key.encode())[:12], 16) / 16**12


def _hold_out(name: str, label: str, sentences: Sequence[str], reading: Reading) -> tuple[_Sentences, _Sentences]:
    if len(sentences) <= reading.heldout:
        raise DataError(
            f"Label set {name!r} has {len(sentences)} sentences of {label!r}; {reading.heldout} are held out and at least "
            "one must stay for training. Lower heldout, or generate more sentences per label."
        )
    mixed = list(sentences)
    random.Random(f"{reading.seed}:{name}:{label}").shuffle(mixed)
    return tuple(mixed[reading.heldout :]), tuple(mixed[: reading.heldout])


# --- the untrusted file ----------------------------------------------------------------------------------------------


@contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    """``path`` itself, or the contents of a ``.gz`` file in a temporary place."""
    if path.suffix != ".gz":
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="softverb-") as folder:
        plain, size = Path(folder) / "plain.sqlite", 0
        with gzip.open(path) as packed, plain.open("wb") as out:
            while block := packed.read(1 << 20):
                size += len(block)
                if size > MAX_BYTES:
                    raise DataError(f"{path} unpacks to more than {MAX_BYTES:,} bytes; unpack it yourself if you trust it.")
                out.write(block)
        yield plain


def _tables(path: Path, db: sqlite3.Connection) -> dict[int, dict[str, list[str]]]:
    """Dataset id → label → sentences, everything checked."""
    sets: dict[int, dict[str, list[str]]] = {number: {} for number, _ in _checked(path, db, "datasets")}
    labels: dict[int, list[str]] = {}
    for number, dataset, keyword in _checked(path, db, "keywords"):
        where = f"{path}, table keywords, id {number}"
        if dataset not in sets:
            raise DataError(f"{where}: dataset_id is {dataset}, which table datasets does not have.")
        if keyword in sets[dataset]:
            raise DataError(f"{where}: label {keyword!r} occurs twice in dataset {dataset}; labels of a set differ.")
        labels[number] = sets[dataset][keyword] = []
    for number, keyword_id, sentence in _checked(path, db, "sentences"):
        if keyword_id not in labels:
            raise DataError(
                f"{path}, table sentences, id {number}: keyword_id is {keyword_id}, which table keywords does not have."
            )
        labels[keyword_id].append(sentence)
    for dataset, found in sets.items():
        if len(found) < 2:
            raise DataError(f"{path}, table datasets, id {dataset}: {len(found)} labels; a classification needs at least 2.")
        for label, sentences in found.items():
            if len(set(sentences)) < len(sentences):
                raise DataError(f"{path}, table sentences: label {label!r} of dataset {dataset} has the same sentence twice.")
    return sets


def _checked(path: Path, db: sqlite3.Connection, table: str) -> Iterable[tuple[Any, ...]]:
    """Rows whose columns are whole numbers except the last, which is text without control characters."""
    for row in db.execute(_QUERIES[table]):
        where = f"{path}, table {table}, id {row[0]!r}"
        for number in row[:-1]:
            if type(number) is not int or number < 0:
                raise DataError(f"{where}: an id is {type(number).__name__} {number!r}, expected a number from 0 upwards.")
        yield (*row[:-1], _text(where, row[-1]))


def _text(where: str, value: Any) -> str:
    if not isinstance(value, bytes):  # text_factory: text comes as bytes, so a BLOB is told apart by its SQL type only
        raise DataError(f"{where}: the text is {type(value).__name__}, expected text.")
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text (byte {error.start}).") from error
    if not text.strip() or len(text) > MAX_TEXT or not text.isprintable():
        raise DataError(
            f"{where}: {len(text)} characters, {'' if text.isprintable() else 'with control characters, '}expected 1 to "
            f"{MAX_TEXT:,} printable ones."
        )
    return text


def _meta(path: Path, db: sqlite3.Connection) -> dict[str, Any]:
    meta: dict[str, Any] = {}
    for key, value in db.execute("SELECT key, value FROM meta WHERE length(value) <= ?", (storage.MAX_JSON_BYTES,)):
        try:
            meta[bytes(key).decode()] = json.loads(bytes(value).decode())
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(f"{path}, table meta, key {key!r}: not JSON ({error}).") from error
    if meta.get("format") != FORMAT:
        raise DataError(f"{path}, table meta: format is {meta.get('format')!r}, this version reads {FORMAT}.")
    return meta
