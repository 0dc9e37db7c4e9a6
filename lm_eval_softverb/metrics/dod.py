"""What the ``dod_*`` tasks call: documents, texts of the upper-bound arms, scores of a document, and per DoD task.

Besides the mean over documents (micro, with its standard error) the results hold the mean over DoD tasks (``macro_…``) and
``by_task``, one record for each of them. A DoD has hundreds of tasks: as tasks of the harness or as metrics of their own they
would fill the screen, so they are one value that prints as one cell and is written in full.

Values of corpus metrics are pairs (DoD task, score) until all documents are done. Aggregations are plain functions: the
harness writes their source code into the results.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval_softverb.data.dod import Dod
from lm_eval_softverb.data.dod import documents as dod_documents
from lm_eval_softverb.data.dod.opening import open_dod, parse
from lm_eval_softverb.data.dod.tokens import TokenCounter
from lm_eval_softverb.metrics.rouge import rouge_l
from lm_eval_softverb.pretrained import cache_dir, locate

if TYPE_CHECKING:
    from datasets import Dataset

Doc = Mapping[str, Any]
_PUNCTUATION = str.maketrans("", "", string.punctuation)


# --- documents -------------------------------------------------------------------------------------------------------


def open_with(source: str, settings: Mapping[str, Any]) -> Dod:
    """:func:`~lm_eval_softverb.data.dod.opening.open_dod` with a manifest's settings: a tokenizer may be a packaged model.

    Raises:
        SoftverbError: as ``open_dod``.
    """
    settings = {key: value for key, value in settings.items() if key != "cache"}  # a manifest does not say where we write
    if parse(source)[0] == "general":
        settings["cache"] = cache_dir() / "dod"
    if name := settings.pop("tokenizer", None):
        settings["tokenizer"] = TokenCounter.load(str(name), locate(str(name)))
    return open_dod(source, **settings)


def general(**metadata: Any) -> dict[str, Dataset]:
    """``custom_dataset`` of the general tasks; see :func:`lm_eval_softverb.data.dod.documents.load`."""
    return dod_documents.load("general", open_with, **metadata)


def classification(**metadata: Any) -> dict[str, Dataset]:
    """``custom_dataset`` of the classification tasks; see :func:`lm_eval_softverb.data.dod.documents.load`."""
    return dod_documents.load("classification", open_with, **metadata)


def with_definition(doc: Doc) -> str:
    """The upper-bound arm of the general DoD: the gold definition in front of the input."""
    return f"{doc['instruction']}\n\n{doc['input']}"


def with_labels(doc: Doc) -> str:
    """The upper-bound arm of the classification DoD: the gold label set in front of the input."""
    return f"Classify the sentence as one of: {', '.join(doc['choices'])}.\n\n{doc['input']}"


# --- scores of one document ------------------------------------------------------------------------------------------


def score_text(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    """ROUGE-L and exact match of a generated output."""
    text = results[0]
    return _with_task(doc, {"exact_match": exact_match(text, doc["target"]), "rouge_l": rouge_l(text, doc["target"])})


def score_label(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    """Exact match of the first line of a generated label."""
    first = next(iter(results[0].strip().splitlines()), "")
    return _with_task(doc, {"exact_match": exact_match(first, doc["target"])})


def score_choice(doc: Doc, results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """Accuracy of the label with the highest log-likelihood, as it is and per character; the first wins a tie."""
    plain = [score for score, _ in results]
    normed = [score / len(choice) for score, choice in zip(plain, doc["choices"], strict=True)]
    found = {"acc": plain, "acc_norm": normed}
    return _with_task(doc, {name: float(v.index(max(v)) == doc["label"]) for name, v in found.items()})


def exact_match(text: str, target: str) -> float:
    """1 where both are equal but for case, ASCII punctuation and blanks; 0 otherwise.

    Texts of nothing but punctuation are compared as they are.
    """
    ours, gold = (_plain(t) or " ".join(t.split()) for t in (text, target))
    return float(ours == gold)


def _plain(text: str) -> str:
    return " ".join(text.translate(_PUNCTUATION).casefold().split())


def _with_task(doc: Doc, scores: Mapping[str, float]) -> dict[str, Any]:
    macro = {f"macro_{name}": [doc["task"], score] for name, score in scores.items()}
    return {**scores, **macro, "by_task": [doc["task"], dict(scores)]}


# --- scores of a DoD -------------------------------------------------------------------------------------------------


def macro(values: Sequence[tuple[str, float]]) -> float:
    """Mean over DoD tasks of the mean over each one's documents."""
    means = [sum(scores) / len(scores) for scores in _grouped(values, float).values()]
    return float(sum(means) / len(means))


def by_task(values: Sequence[tuple[str, Mapping[str, float]]]) -> ByTask:
    """One record per DoD task: its name, documents, and the mean and standard error of each score (None for one document)."""
    records = []
    for task, scores in _grouped(values, dict).items():
        record: dict[str, Any] = {"task": task, "n": len(scores)}
        for name in scores[0]:
            record[name], record[f"{name}_stderr"] = _mean_and_error([score[name] for score in scores])
        records.append(record)
    return ByTask(records)


class ByTask(tuple[dict[str, Any], ...]):
    """Records that print as one short cell of the harness's table and are written to its results file in full."""

    def __repr__(self) -> str:
        return f"{len(self)} tasks"

    __str__ = __repr__


def _grouped(values: Sequence[tuple[str, Any]], convert: Callable[[Any], Any]) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = {}
    for task, value in values:
        groups.setdefault(task, []).append(convert(value))
    return groups


def _mean_and_error(scores: Sequence[float]) -> tuple[float, float | None]:
    n = len(scores)
    mean = sum(scores) / n
    if n < 2:
        return mean, None
    return mean, math.sqrt(sum((score - mean) ** 2 for score in scores) / (n - 1) / n)
