"""Documents without an answer: left out of every metric, visible in the samples, counted; never scored as empty.

The harness has no such answer, but it lets a document contribute to no metric: ``process_results`` may return nothing. A
model gives an :class:`Unscored` text; after the filters, the task's ``process_results`` returns ``{}`` for its document.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask, Task

from lm_eval_softverb.errors import BackendError

_MARK = "_softverb_unscored"


class Unscored(str):
    """Stands for the answer that never came; its text says why."""

    @classmethod
    def because(cls, reason: str) -> Unscored:
        return cls(f"[unscored: {reason}]")


def count(requests: Sequence[Instance], answers: Sequence[str]) -> dict[str, int]:
    """Documents without an answer by task.

    Raises:
        BackendError: a task has none but such documents, so that it has no score at all.
    """
    documents: dict[str, set[Any]] = {}
    unscored: dict[str, set[Any]] = {}
    reasons: dict[str, Counter[str]] = {}
    for request, answer in zip(requests, answers, strict=True):
        task = str(request.task_name)
        documents.setdefault(task, set()).add(request.doc_id)
        if isinstance(answer, Unscored):
            unscored.setdefault(task, set()).add(request.doc_id)
            reasons.setdefault(task, Counter())[str(answer)] += 1
    for task, missing in unscored.items():
        if missing == documents[task]:
            raise BackendError(
                f"Task {task}: not one of {len(missing)} documents got a usable answer ({dict(reasons[task])}), so there is "
                "nothing to score. Check the model and max_gen_toks; with --use_cache the same command goes on."
            )
    return {task: len(missing) for task, missing in sorted(unscored.items())}


def install() -> None:
    """Makes tasks leave out documents with an :class:`Unscored` answer; all others are scored as before."""
    for cls in (Task, ConfigurableTask):
        if not hasattr(cls.apply_filters, _MARK):
            cls.apply_filters = _guarding(cls.apply_filters)


def _guarding(stock: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(stock)
    def apply_filters(task: Any) -> Any:
        result = stock(task)
        # A filter may have made words of an answer that is none.
        for request in task.instances:
            found = next((r for r in request.resps if isinstance(r, Unscored)), None)
            if found is not None:
                request.filtered_resps = dict.fromkeys(request.filtered_resps, found)
                _guard(task)
        return result

    setattr(apply_filters, _MARK, True)
    return apply_filters


def _guard(task: Any) -> None:
    if "process_results" in vars(task):
        return
    stock = task.process_results

    def process_results(doc: Any, results: Iterable[Any]) -> dict[str, Any]:
        answers = list(results)
        return {} if any(isinstance(a, Unscored) for a in answers) else stock(doc, answers)

    task.process_results = process_results


install()
