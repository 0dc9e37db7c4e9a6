"""Texts in the slot that a soft prompt would fill: read from a file, chosen per document, put in by a template.

Texts travel by file only, and as data: they are joined with the document's text, never rendered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance

from lm_eval_softverb import storage
from lm_eval_softverb.errors import ConfigError, DataError, did_you_mean
from lm_eval_softverb.models.secrets import refuse_secrets

PAPER, SYSTEM, NONE = "paper", "system", "none"
TEMPLATES = (PAPER, SYSTEM, NONE)
BREAK = "\n\n"
"""Between prompt and text: the translator paper's template is ``"{prompt}\\n\\n{text}"``."""


@dataclass
class HardPrompts:
    """The texts of one run.

    Attributes:
        template: ``paper``, ``system``, or ``none`` without texts.
        texts: by prompt id; one text for all documents has no id and stands in ``one``.
        prompt_field: document field with the prompt's id; documents without it go by their task's name.
        used: requests by prompt id.
    """

    template: str = NONE
    texts: Mapping[str, str] = field(default_factory=dict)
    one: str | None = None
    prompt_field: str = "prompt_id"
    source: str | None = None
    sha256: str | None = None
    used: Counter[str] = field(default_factory=Counter)

    @classmethod
    def read(cls, file: str | None, template: str | None = None, prompt_field: str = "prompt_id") -> HardPrompts:
        """Reads ``file``: a ``.txt`` is one text; a ``.jsonl`` has lines with prompt_id, text and rank (0 is used).

        Raises:
            ConfigError: an unknown template or file type, or a template that does not go with the file.
            DataError: a file that cannot be read, lacks texts, or has two of one prompt.
        """
        chosen = template or (PAPER if file else NONE)
        if chosen not in TEMPLATES:
            raise ConfigError(f"Unknown template {chosen!r}. {did_you_mean(str(chosen), list(TEMPLATES))}")
        if (chosen == NONE) != (not file):
            raise ConfigError(
                f"template={chosen} with {'a' if file else 'no'} prompt_file. Pass prompt_file=FILE with template={PAPER} or "
                f"{SYSTEM}; without a file there is no prompt, which is the control."
            )
        if not file:
            return cls(prompt_field=prompt_field)
        path = Path(str(file)).expanduser()
        common: dict[str, Any] = {"template": chosen, "prompt_field": prompt_field, "source": str(path)}
        if path.suffix.lower() == ".jsonl":
            texts = _lines(path)
            return cls(texts=texts, sha256=storage.sha256_file(path), **common)
        if path.suffix.lower() != ".txt":
            raise ConfigError(f"prompt_file={path}: expected a .txt (one text for all) or a .jsonl (prompt_id, text, rank).")
        try:
            text = path.read_bytes().decode("utf-8-sig").strip()
        except OSError as error:
            raise DataError(f"Cannot read {path}: {error.strerror or error}.") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
        if not text:
            raise DataError(f"{path} is empty. Write the prompt into it, or leave out prompt_file for no prompt.")
        return cls(one=text, sha256=storage.sha256_file(path), **common)

    def __bool__(self) -> bool:
        return self.template != NONE

    def name(self, request: Instance) -> str:
        """Id of the prompt of one request; ``""`` where there is one text for all, or none.

        Raises:
            DataError: the file has no text for this document.
        """
        if not self.texts:
            return ""
        doc = request.doc if isinstance(request.doc, Mapping) else {}
        wanted = str(doc.get(self.prompt_field, request.task_name))
        if wanted not in self.texts:
            how = f"document field {self.prompt_field!r}" if self.prompt_field in doc else "task"
            raise DataError(
                f"{self.source} has no text for prompt {wanted!r}, asked for by {how} (task {request.task_name}, document "
                f"{request.doc_id}). {did_you_mean(wanted, list(self.texts))}"
            )
        return wanted

    def text(self, name: str) -> str:
        return self.texts[name] if self.texts else self.one or ""

    def count(self, requests: Sequence[Instance]) -> None:
        if self:
            self.used.update(self.name(r) for r in requests)

    def to_json(self) -> dict[str, Any]:
        """What the results say about the prompts; their texts are in the file."""
        every = [self.text(n) for n in self.texts or [""]] if self else []
        return {
            "prompt_file": self.source,
            "prompt_sha256": self.sha256,
            "template": self.template,
            "n_texts": len(every),
            "n_empty_texts": sum(not t for t in every),
            "requests_by_prompt": {name or "(all)": n for name, n in sorted(self.used.items())},
        }


def with_prompt(messages: Sequence[Mapping[str, str]], template: str, prompt: str, mark: str = "") -> list[dict[str, str]]:
    """A chat with ``prompt`` in its slot; ``mark`` is put in front of the text that begins behind it.

    ``paper``: before the first user turn; ``system``: before the system message, in a new one where there is none.

    Raises:
        DataError: there is no user turn.
    """
    chat = [dict(m) for m in messages]
    user = next((m for m in chat if m["role"] == "user"), None)
    if user is None:
        raise DataError(f"The chat has no user turn to put a prompt in; roles: {[m['role'] for m in chat]}.")
    if template == PAPER:
        user["content"] = prompt + BREAK + mark + user["content"]
        return chat
    user["content"] = mark + user["content"]
    system = next((m for m in chat if m["role"] == "system"), None)
    if system is None:
        return [{"role": "system", "content": prompt}, *chat]
    system["content"] = prompt + BREAK + system["content"]
    return chat


def refuse_arguments(arguments: Mapping[str, Any], known: Sequence[str] = ()) -> None:
    """Model arguments reach the results, so neither keys nor prompts may travel in them.

    Raises:
        ConfigError: an argument that looks like a secret, a prompt given in place of a file, or a name not in ``known``.
    """
    refuse_secrets(arguments)
    if "prompt" in arguments:
        raise ConfigError(
            "prompt= is not taken: the command line splits arguments at commas and reads numbers, so a prompt would be "
            "changed silently. Write it to a file and pass prompt_file=FILE.txt."
        )
    unknown = sorted(set(arguments) - set(known)) if known else []
    if unknown:
        raise ConfigError(f"Unknown model argument {unknown[0]!r}. {did_you_mean(unknown[0], list(known))}")


def _lines(path: Path) -> dict[str, str]:
    texts: dict[str, str] = {}
    for number, line in storage.read_jsonl(path):
        name, text, rank = line.get("prompt_id"), line.get("text"), line.get("rank", 0)
        if not isinstance(name, str) or not name or not isinstance(text, str) or type(rank) is not int:
            raise DataError(
                f"{path}:{number}: expected prompt_id and text as strings and rank as a number, as `softverb verbalize` "
                f"writes them; got prompt_id {name!r}, text {type(text).__name__}, rank {rank!r}."
            )
        if rank != 0:
            continue
        if name in texts:
            raise DataError(f"{path}:{number}: a second text of rank 0 for prompt {name!r}; keep one line per prompt.")
        texts[name] = text.strip()
    if not texts:
        raise DataError(f"{path} has no text of rank 0. Expected lines with prompt_id, text and rank.")
    return texts
