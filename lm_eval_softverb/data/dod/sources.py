"""Where Super-NaturalInstructions is read from: a clone of its repository, a hub dataset, or the rebuilt copies.

Each source offers all tasks of the English default split and reads one at a time, so memory stays bounded by the largest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lm_eval_softverb import storage
from lm_eval_softverb.data.benchmarks import DATA_DIR
from lm_eval_softverb.errors import ArtifactError, DataError, ModelUnavailable

HUB = "Muennighoff/natural-instructions"
FOLDER = "natural_instructions"
SPLITS = ("train", "test")
_MAX_BYTES = 1 << 30  # of one task file; the largest has some 100 MB


@dataclass(frozen=True)
class Instance:
    """One input with all its reference outputs; ``tokens`` counts the input and the first output where it is known."""

    input: str
    outputs: tuple[str, ...]
    tokens: int | None = None


@dataclass(frozen=True)
class RawTask:
    """One task as it stands in its source.

    Attributes:
        english: input and output language; None where the source does not say.
        info: source corpora (``sources``), ``categories``, ``domains``, as far as they are known.
    """

    definition: str
    instances: tuple[Instance, ...]
    english: bool | None = None
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Count:
    """What a source knows of a task without reading it: instances, and how many of them are short enough."""

    instances: int
    short: int


class Source(Protocol):
    """Raw material of the general DoD."""

    def splits(self) -> dict[str, str]:
        """Every task of the default split in a fixed order → ``train`` or ``test``, also where its data are missing."""
        ...

    def stamp(self, name: str) -> str:
        """Changes whenever the task's data do; empty where there are none."""
        ...

    def known(self, name: str) -> Count | None:
        """Counts that come with the source; None where the task must be read to know."""
        ...

    def read(self, name: str) -> RawTask:
        """One task.

        Raises:
            DataError: it cannot be read.
        """
        ...

    @property
    def sha256(self) -> str:
        """Hash of what is read, the same on every machine for the same files."""
        ...


def find(path: str | None = None) -> Source:
    """Opens ``path``; by default ``natural_instructions`` in ``SOFTVERB_DATA_DIR``, else the hub dataset.

    Raises:
        DataError: a folder of another layout.
        ModelUnavailable: no such folder, and the hub does not deliver it.
    """
    if not path:
        folder = os.environ.get(DATA_DIR)
        path = str(Path(folder) / FOLDER) if folder else HUB
    root = Path(path).expanduser()
    if (root / RebuiltSource.INDEX).is_file():
        return RebuiltSource(root)
    if (root / "splits" / "default").is_dir():
        return CloneSource(root)
    if root.is_dir() and not [*root.rglob("*.parquet"), *root.rglob("*.jsonl*"), *root.rglob("*.json")]:
        raise DataError(
            f"{root} holds no Super-NaturalInstructions. Expected a clone (tasks/, splits/default/), the rebuilt copies "
            f"({RebuiltSource.INDEX}, {RebuiltSource.ROWS}), or files of the hub dataset {HUB}."
        )
    return HubSource(str(root) if root.exists() else path)


# --- a clone of github.com/allenai/natural-instructions --------------------------------------------------------------


class CloneSource:
    """``tasks/*.json`` and ``splits/default/{train,test}_tasks.txt``; tasks in neither are excluded by their authors."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def splits(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for split in SPLITS:
            path = self.root / "splits" / "default" / f"{split}_tasks.txt"
            try:
                names = path.read_text("utf-8").split()
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(
                    f"{path} cannot be read ({error}). Expected one task per line; is the clone complete?"
                ) from error
            for name in names:
                if found.setdefault(name, split) != split:
                    raise DataError(f"{path}: {name} is a {found[name]} task, too. Expected disjoint splits.")
        return found

    def _file(self, name: str) -> Path:
        return self.root / "tasks" / f"{name}.json"

    def stamp(self, name: str) -> str:
        try:
            stat = self._file(name).stat()
        except OSError:
            return ""
        return f"{stat.st_size}-{stat.st_mtime_ns}"

    def known(self, name: str) -> Count | None:
        return None

    def read(self, name: str) -> RawTask:
        path = self._file(name)
        try:
            value = storage.read_json(path, _MAX_BYTES)
        except ArtifactError as error:
            raise DataError(str(error)) from error
        try:
            instances = tuple(Instance(i["input"], tuple(_texts(i["output"]))) for i in value["Instances"])
            definition = "\n".join(_texts(value["Definition"])).strip()
            languages = {*_texts(value["Input_language"]), *_texts(value["Output_language"])}
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{path}: {type(error).__name__} {error}; expected Definition, Input_language, Output_language and "
                "Instances with input and output, as in the repository's schema."
            ) from error
        if not all(isinstance(text, str) for i in instances for text in (i.input, *i.outputs)):
            raise DataError(f"{path}: an instance's input or output is not text. Check the file.")
        info = {ours: _texts(value[key]) for ours, key in _FIELDS.items() if value.get(key)}
        return RawTask(definition, instances, languages == {"English"}, info)

    @cached_property
    def sha256(self) -> str:
        # Sizes, not contents: gigabytes would be hashed on each opening. Held-out rows have hashes of their own.
        return storage.sha256_json([(n, s, self.stamp(n).partition("-")[0]) for n, s in self.splits().items()])


_FIELDS = {"sources": "Source", "categories": "Categories", "domains": "Domains"}


def _texts(value: Any) -> list[str]:
    """A list of strings, or one string, as a list."""
    texts = [value] if isinstance(value, str) else list(value)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"holds {texts[:2]}, expected text")
    return texts


# --- a hub dataset ---------------------------------------------------------------------------------------------------


class HubSource:
    """Columns ``task_name``, ``id``, ``definition``, ``inputs``, ``targets``, one row per target; or a folder of its files.

    A task is a test task where the split ``test`` has rows of it, else a training task; all its rows are pooled. Rows of one
    id are one instance. The dataset holds the default split only and does not name languages.
    """

    COLUMNS = ("task_name", "id", "definition", "inputs", "targets")

    def __init__(self, name: str) -> None:
        self.name = name
        import datasets
        from datasets.exceptions import DatasetsError

        try:
            data = datasets.load_dataset(name)
        except (OSError, DatasetsError, ValueError) as error:
            raise ModelUnavailable(
                f"{name} is neither a folder here nor a dataset that the hub delivers ({error}). Pass a folder, set {DATA_DIR} "
                f"to a folder that has {FOLDER}/, or download {HUB} where there is a network and the same HF_HOME."
            ) from error
        self.data = {str(split): data[split] for split in data}
        for split, part in self.data.items():
            if missing := [c for c in self.COLUMNS if c not in part.column_names]:
                raise DataError(f"{name}, split {split}: no column {', '.join(missing)}; found {', '.join(part.column_names)}.")

    @cached_property
    def _places(self) -> dict[str, dict[str, npt.NDArray[np.int64]]]:
        """Task → split of the hub → its row numbers (8 bytes per row of the dataset)."""
        places: dict[str, dict[str, list[npt.NDArray[np.int64]]]] = {}
        for split, part in self.data.items():
            start = 0
            for chunk in part.with_format("arrow").select_columns(["task_name"]).iter(1 << 16):
                codes = chunk["task_name"].combine_chunks().dictionary_encode()
                rows = codes.indices.to_numpy()
                for code, name in enumerate(codes.dictionary.to_pylist()):
                    places.setdefault(str(name), {}).setdefault(split, []).append(start + np.flatnonzero(rows == code))
                start += len(rows)
        return {name: {s: np.concatenate(p) for s, p in parts.items()} for name, parts in sorted(places.items())}

    def splits(self) -> dict[str, str]:
        return {name: "test" if "test" in parts else "train" for name, parts in self._places.items()}

    def stamp(self, name: str) -> str:
        return self.sha256

    def known(self, name: str) -> Count | None:
        return None

    def read(self, name: str) -> RawTask:
        definition = ""
        grouped: dict[tuple[str, str], dict[str, None]] = {}
        for split, rows in self._places[name].items():
            for row in self.data[split].select(rows):
                if not isinstance(row["inputs"], str) or not isinstance(row["targets"], str):
                    raise DataError(f"{self.name}, {split}: a row of {name} has no text in 'inputs' or 'targets'.")
                grouped.setdefault((str(row["id"]), row["inputs"]), {})[row["targets"]] = None
                definition = row["definition"] or definition
        instances = tuple(Instance(text, tuple(outputs)) for (_, text), outputs in grouped.items())
        return RawTask(definition.strip(), instances, None, {"hub_splits": {s: len(r) for s, r in self._places[name].items()}})

    @cached_property
    def sha256(self) -> str:
        return storage.sha256_json(
            [self.name.split("/")[-1], {s: [len(p), p.num_columns] for s, p in self.data.items()}, list(self._places)]
        )


# --- the rebuilt copies ----------------------------------------------------------------------------------------------


class RebuiltSource:
    """At most 500 instances of each task that passes, with token counts, and an index of all tasks."""

    ROWS, INDEX, FILTER = "ni_all_pass_500.parquet", "ni_index.json", "ni_filter.json"

    def __init__(self, root: Path) -> None:
        from pyarrow import ArrowException, parquet

        self.root = root
        try:
            entries = json.loads((root / self.INDEX).read_text("utf-8"))
            self._index = {e["task"]: e for e in entries if e["split"] in SPLITS}
            self._file = parquet.ParquetFile(root / self.ROWS)
            groups = [self._file.read_row_group(i, columns=["task"]) for i in range(self._file.num_row_groups)]
        except (OSError, ValueError, KeyError, TypeError, ArrowException) as error:
            raise DataError(f"{root}: {self.INDEX} or {self.ROWS} cannot be read ({error}). Copy the files again.") from error
        self._groups: dict[str, list[int]] = {}
        for number, group in enumerate(groups):
            for name in group["task"].unique().to_pylist():
                self._groups.setdefault(name, []).append(number)
        self._last: tuple[int, Any] = (-1, None)  # tasks are read in the file's order as a rule

    def splits(self) -> dict[str, str]:
        return {name: entry["split"] for name, entry in self._index.items()}

    def stamp(self, name: str) -> str:
        return self.sha256 if self._index[name]["n_instances_stored"] else ""

    def known(self, name: str) -> Count | None:
        entry = self._index[name]
        return Count(entry["n_instances_stored"], entry["n_instances_le400"])

    def _group(self, number: int) -> Any:
        if self._last[0] != number:
            self._last = (number, self._file.read_row_group(number))
        return self._last[1]

    def read(self, name: str) -> RawTask:
        from pyarrow import compute

        entry = self._index[name]
        instances: list[Instance] = []
        for number in self._groups.get(name, []):
            table = self._group(number)
            for row in table.filter(compute.equal(compute.cast(table["task"], "string"), name)).to_pylist():
                instances.append(Instance(row["input"], tuple(row["outputs"]), row["n_tokens"]))
        if not instances:
            raise DataError(f"{self.root / self.ROWS} has no rows of {name}; {self.INDEX} lists it. Copy the files again.")
        languages = {entry["input_language"], entry["output_language"]} - {None}
        info = {
            "categories": [entry["category"]] if entry["category"] else [],
            "domains": entry["domain"] or [],
            "label_space": entry.get("label_space") or [],
            "instances_before_capping": entry["n_instances_stored"],
        }
        return RawTask((entry["definition"] or "").strip(), tuple(instances), languages <= {"English"}, info)

    @cached_property
    def sha256(self) -> str:
        return storage.sha256_json([storage.sha256_file(self.root / name) for name in (self.ROWS, self.INDEX)])
