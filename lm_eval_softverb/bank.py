"""A bank: many soft prompts of one frozen model in one folder, with ``manifest.jsonl`` written last."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lm_eval_softverb import storage
from lm_eval_softverb.errors import ArtifactError, did_you_mean
from lm_eval_softverb.prompt import SoftPrompt

MANIFEST = "manifest.jsonl"


@dataclass(frozen=True)
class Bank:
    """Prompts and their manifest entries, in the same order.

    Each entry has at least ``prompt_id`` and ``path`` (a prompt folder inside the bank), usually ``task``.
    """

    prompts: tuple[SoftPrompt, ...]
    entries: tuple[Mapping[str, Any], ...]
    source: str = ""

    @classmethod
    def load(cls, folder: Path | str) -> Bank:
        """Reads a bank.

        Raises:
            ArtifactError: no manifest, a path that leaves the folder, or a prompt that does not load.
        """
        root = Path(folder).expanduser()
        manifest = root / MANIFEST
        if not manifest.exists():
            raise ArtifactError(f"{root} is no bank: {MANIFEST} is missing (it is written last, so the bank is incomplete).")
        prompts, entries, names = [], [], set[str]()
        for number, entry in storage.read_jsonl(manifest):
            path, name = entry.get("path"), entry.get("prompt_id")
            if not isinstance(path, str) or not isinstance(name, str) or "\0" in path:
                raise ArtifactError(f"{manifest}:{number}: expected strings 'prompt_id' and 'path', got {name!r}, {path!r}.")
            if name in names:
                raise ArtifactError(f"{manifest}:{number}: a second prompt is named {name!r}; names must be unique.")
            inside = (root / path).resolve()
            if not inside.is_relative_to(root.resolve()):
                raise ArtifactError(f"{manifest}:{number}: path {path!r} leaves the bank's folder.")
            prompts.append(SoftPrompt.load(inside))
            entries.append(entry)
            names.add(name)
        if not prompts:
            raise ArtifactError(f"{manifest} lists no prompts.")
        return cls(tuple(prompts), tuple(entries), str(root))

    @staticmethod
    def save(folder: Path | str, items: Iterable[tuple[SoftPrompt, Mapping[str, Any]]]) -> Path:
        """Writes each prompt to ``<folder>/<prompt_id>/`` and the manifest after all of them."""
        root = Path(folder)
        rows = []
        for prompt, entry in items:
            name = str(entry.get("prompt_id", prompt.id))
            prompt.save(root / name)
            rows.append({**entry, "prompt_id": name, "path": name})
        storage.write_jsonl(root / MANIFEST, rows)
        return root

    @cached_property
    def _places(self) -> dict[str, list[int]]:
        places: dict[str, list[int]] = {}
        for i, entry in enumerate(self.entries):
            if "task" in entry:
                places.setdefault(str(entry["task"]), []).append(i)
        return places | {str(e["prompt_id"]): [i] for i, e in enumerate(self.entries)}

    def place(self, doc: Mapping[str, Any], task: str | None, field: str) -> int:
        """Index of the prompt for one document: by its ``field``, else by its task.

        Raises:
            ArtifactError: the bank has no such prompt, or several for the task.
        """
        wanted = str(doc[field]) if field in doc else str(task)
        if wanted not in self._places:
            how = f"document field {field!r}" if field in doc else f"task (documents have no field {field!r})"
            raise ArtifactError(
                f"Bank {self.source} has no prompt for {wanted!r}, asked for by {how}. "
                f"{did_you_mean(wanted, list(self._places))}"
            )
        found = self._places[wanted]
        if len(found) > 1:
            raise ArtifactError(
                f"Bank {self.source} has {len(found)} prompts for task {wanted!r}; a document field {field!r} must name one."
            )
        return found[0]
