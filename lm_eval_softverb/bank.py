"""A bank: many soft prompts of one frozen model in one folder, with ``manifest.jsonl`` written last.

``prompts.safetensors`` holds the rows of all prompts by name, ``bank.json`` what they share: the base model's fingerprint,
which is larger than a prompt. A line of the manifest may instead name a ``path``: a prompt's own folder inside the bank. Any
prompt of a bank saved by itself (:meth:`SoftPrompt.save`) is a PEFT folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lm_eval_softverb import storage
from lm_eval_softverb.errors import ArtifactError, did_you_mean
from lm_eval_softverb.frame import Frame
from lm_eval_softverb.prompt import Fingerprint, SoftPrompt

MANIFEST = "manifest.jsonl"
TENSORS = "prompts.safetensors"
SHARED = "bank.json"
SCHEMA = 1


def manifest_of(root: Path) -> Path:
    """The manifest of a bank.

    Raises:
        ArtifactError: there is none.
    """
    manifest = root / MANIFEST
    if not manifest.exists():
        raise ArtifactError(f"{root} is no bank: {MANIFEST} is missing (it is written last, so the bank is incomplete).")
    return manifest


@dataclass(frozen=True)
class Bank:
    """Prompts and their manifest entries, in the same order.

    Each entry has at least ``prompt_id``, usually ``task`` and ``split``, and what is known of the ground truth: ``labels`` (a
    list) or ``instruction``.
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
        manifest = manifest_of(root)
        fingerprint = _shared(root) if (root / SHARED).exists() else None
        prompts, entries, names = [], [], set[str]()
        for number, entry in storage.read_jsonl(manifest):
            where = f"{manifest}:{number}"
            name = entry.get("prompt_id")
            if not isinstance(name, str):
                raise ArtifactError(f"{where}: expected a string 'prompt_id', got {name!r}.")
            if name in names:
                raise ArtifactError(f"{where}: a second prompt is named {name!r}; names must be unique.")
            if "path" in entry:
                prompts.append(SoftPrompt.load(_inside(root, entry["path"], where)))
            else:
                prompts.append(_row_of(root, name, entry, fingerprint, where))
            entries.append(entry)
            names.add(name)
        if not prompts:
            raise ArtifactError(f"{manifest} lists no prompts.")
        return cls(tuple(prompts), tuple(entries), str(root))

    @classmethod
    def joined(cls, banks: Sequence[Bank]) -> Bank:
        """The prompts of all banks, one bank after the other; they may be of different models.

        A prompt with the name of one before it gets its bank's in front: ``labels_00001`` of ``banks/more`` is then
        ``more/labels_00001``.

        Raises:
            ArtifactError: two prompts of one name still.
        """
        entries: dict[str, Mapping[str, Any]] = {}
        prompts = []
        for bank in banks:
            for prompt, entry in zip(bank.prompts, bank.entries, strict=True):
                name = str(entry["prompt_id"])
                if name in entries:
                    name = f"{Path(bank.source).name}/{name}"
                    prompt = replace(prompt, source=f"{bank.source}#{name}")
                if name in entries:
                    raise ArtifactError(
                        f"A prompt of {bank.source} would be a second {name!r}; pass each bank once, and no two of one name."
                    )
                entries[name] = {**entry, "prompt_id": name}
                prompts.append(prompt)
        return cls(tuple(prompts), tuple(entries.values()), ", ".join(bank.source for bank in banks))

    @staticmethod
    def save(folder: Path | str, items: Iterable[tuple[SoftPrompt, Mapping[str, Any]]]) -> Path:
        """Writes all prompts, what they share, and the manifest after everything else.

        Raises:
            ArtifactError: two prompts of one name, or prompts of different base models.
        """
        root = Path(folder)
        tensors: dict[str, Any] = {}
        entries = []
        shared: Fingerprint | None = None
        for prompt, entry in items:
            name = str(entry.get("prompt_id", prompt.id))
            if name in tensors:
                raise ArtifactError(f"A second prompt of the bank {root} is named {name!r}; names must be unique.")
            other = shared.differences(prompt.fingerprint) if shared and prompt.fingerprint else []
            if other or (tensors and (shared is None) != (prompt.fingerprint is None)):
                raise ArtifactError(
                    f"Prompt {name!r} was not trained on the model of the prompts before it ({'; '.join(other) or 'unknown'}). "
                    "A bank holds prompts of one frozen model; write one bank per model."
                )
            shared, tensors[name] = prompt.fingerprint, prompt.embeddings
            own = {"prompt_id": name, "softprompt": prompt.id, "frame": prompt.frame.to_json(), "info": dict(prompt.info)}
            entries.append({**{k: v for k, v in entry.items() if k != "path"}, **own})
        storage.write_tensors(root / TENSORS, tensors)
        storage.write_json(root / SHARED, {"schema": SCHEMA, "fingerprint": shared.to_json() if shared else None})
        storage.write_jsonl(root / MANIFEST, entries)
        return root

    def prompt(self, name: str) -> SoftPrompt:
        """The prompt of one name; saved by itself it is a PEFT folder.

        Raises:
            ArtifactError: no such name.
        """
        names = [str(e["prompt_id"]) for e in self.entries]
        if name not in names:
            raise ArtifactError(f"Bank {self.source} has no prompt named {name!r}. {did_you_mean(name, names)}")
        return self.prompts[names.index(name)]

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


def _shared(root: Path) -> Fingerprint | None:
    value = storage.read_json(root / SHARED)
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        got = value.get("schema") if isinstance(value, dict) else type(value).__name__
        raise ArtifactError(f"{root / SHARED} has schema {got!r}, this version reads {SCHEMA}.")
    found = value.get("fingerprint")
    return Fingerprint.from_json(found) if found is not None else None


def _inside(root: Path, path: object, where: str) -> Path:
    if not isinstance(path, str) or "\0" in path:
        raise ArtifactError(f"{where}: expected a string 'path', got {path!r}.")
    found = (root / path).resolve()
    if not found.is_relative_to(root.resolve()):
        raise ArtifactError(f"{where}: path {path!r} leaves the bank's folder.")
    return found


def _row_of(root: Path, name: str, entry: Mapping[str, Any], fingerprint: Fingerprint | None, where: str) -> SoftPrompt:
    info = entry.get("info", {})
    if not isinstance(info, dict):
        raise ArtifactError(f"{where}: 'info' is {type(info).__name__}, expected an object.")
    prompt = SoftPrompt(
        storage.read_embeddings(root / TENSORS, name),
        frame=Frame.from_json(entry.get("frame", {})),
        fingerprint=fingerprint,
        info=info,
        source=f"{root}#{name}",
    )
    if entry.get("softprompt", prompt.id) != prompt.id:
        raise ArtifactError(
            f"{where}: the rows of {name!r} in {TENSORS} are not those the manifest was written for ({prompt.id}, expected "
            f"{entry['softprompt']}). Restore the file."
        )
    return prompt
