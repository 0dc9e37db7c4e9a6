"""``--model replay``: scores recorded outputs, so that anybody's results enter the same tables.

    lm_eval --model replay --model_args file=outputs.jsonl --tasks softverb_sst2

Lines: ``text`` and one of ``doc_hash``, ``doc_id`` (both as in the harness's samples) or ``prompt_id``; ``task`` where the same
number means different documents. A ``text`` of null is a document without an answer: unscored and counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import postprocess_generated_text
from lm_eval.utils import handle_non_serializable, hash_string

import lm_eval_softverb
from lm_eval_softverb import storage
from lm_eval_softverb.errors import ConfigError, DataError
from lm_eval_softverb.models import unscored
from lm_eval_softverb.models.hardprompts import refuse_arguments
from lm_eval_softverb.models.unscored import Unscored

FIELDS = ("doc_hash", "doc_id", "prompt_id")
_HARNESS = ("batch_size", "max_batch_size", "device")
Place = tuple[str | None, str, str | int]
"""Task (None: any), name of the field, its value."""


@register_model("replay")
class ReplayLM(LM):
    """Answers generation requests from a file, by document."""

    def __init__(self, file: str | None = None, **others: Any) -> None:
        super().__init__()
        refuse_arguments({k: v for k, v in others.items() if k not in _HARNESS}, ("file",))
        if not file:
            raise ConfigError("--model replay needs file=FILE.jsonl in --model_args.")
        self.path = Path(str(file)).expanduser()
        self.texts = _read(self.path)
        self.sha256 = storage.sha256_file(self.path)
        self.used: set[Place] = set()
        self.stopped = 0
        self.unscored: dict[str, int] = {}

    @property
    def tokenizer_name(self) -> str:
        return "replay"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return "\n".join(message["content"] for message in chat_history)

    def get_model_info(self) -> dict[str, Any]:
        return {
            "replay": {
                "version": lm_eval_softverb.__version__,
                "file": str(self.path),
                "file_sha256": self.sha256,
                "n_lines": len(self.texts),
                "n_used": len(self.used),
                "n_unused": len(self.texts) - len(self.used),
                "n_cut_at_stop": self.stopped,
                "unscored": sum(self.unscored.values()),
                "unscored_by_task": self.unscored,
            }
        }

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        raise ConfigError("Recorded texts have no log-likelihoods; replay them on generate_until tasks (without _mc).")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        self.loglikelihood(requests)
        return []

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        tasks = {str(r.task_name) for r in requests}
        if len(tasks) > 1 and any(task is None and field == "doc_id" for task, field, _ in self.texts):
            raise DataError(
                f"{self.path} has doc_id without task, but {len(tasks)} tasks are scored and each counts from 0. Add the field "
                "'task' to the lines, or score one task at a time."
            )
        places = [self._place(r) for r in requests]
        missing = [f"{r.task_name}/{r.doc_id}" for r, p in zip(requests, places, strict=True) if p is None]
        if missing:
            listed = ", ".join(missing[:20]) + (f" and {len(missing) - 20} more" if len(missing) > 20 else "")
            raise DataError(
                f"{self.path} has no output for {len(missing)} of {len(requests)} documents: {listed}. Add them (text null "
                "where there is no answer), or score fewer with --limit."
            )
        answers = [self._answer(r, p) for r, p in zip(requests, places, strict=True) if p is not None]
        self.unscored = unscored.count(requests, answers)
        return answers

    def _place(self, request: Instance) -> Place | None:
        if (request.repeats or 1) > 1:
            raise ConfigError(f"Task {request.task_name} asks {request.repeats} times; a recorded output is one answer.")
        doc = request.doc if isinstance(request.doc, Mapping) else {}
        # The harness hashes documents so, see lm_eval.evaluator.
        text = json.dumps(request.doc, indent=2, default=handle_non_serializable, ensure_ascii=False)
        values = {"doc_hash": hash_string(text), "doc_id": request.doc_id, "prompt_id": doc.get("prompt_id")}
        for field in FIELDS:
            for task in (request.task_name, None):
                place = (task, field, values[field])
                if place in self.texts:
                    return place
        return None

    def _answer(self, request: Instance, place: Place) -> str:
        text = self.texts[place]
        self.used.add(place)
        if text is None:
            return Unscored.because("recorded as null")
        cut = str(postprocess_generated_text(text, request.args[1].get("until"), None))
        self.stopped += cut != text
        return cut


def _read(path: Path) -> dict[Place, str | None]:
    texts: dict[Place, str | None] = {}
    for number, line in storage.read_jsonl(path):
        field = next((f for f in FIELDS if f in line), None)
        task, value = line.get("task"), line.get(field or "")
        kind = int if field == "doc_id" else str
        text = line.get("text", 0)
        if field is None or type(value) is not kind or not isinstance(task, str | None) or not isinstance(text, str | None):
            raise DataError(
                f"{path}:{number}: expected text (a string, or null for no answer), one of {', '.join(FIELDS)} (doc_id is a "
                f"number, the others are strings), and task as a string or not at all; got the fields {sorted(line)}."
            )
        place = (task, field, value)
        if place in texts:
            raise DataError(f"{path}:{number}: a second output for {field} {value!r}{f' of task {task}' if task else ''}.")
        texts[place] = text
    if not texts:
        raise DataError(f"{path} has no outputs. Expected lines with text and one of {', '.join(FIELDS)}.")
    return texts
