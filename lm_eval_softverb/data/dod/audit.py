"""What a DoD's test tasks may already have shown in training: look-alike tasks, shared rows and corpora, benchmark labels.

Exact and deterministic: tasks are compared by the Jaccard index of their texts' word shingles (label sets: of their labels),
all pairs with something in common, without hashing tricks; rows by their normalised input.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lm_eval_softverb import storage
from lm_eval_softverb.data.benchmarks import BENCHMARKS
from lm_eval_softverb.data.dod import Dod, DodTask

SHINGLE = 3  # words
NEAR = 0.7
FEW = 12
"""A general task with at most so many different outputs has them as its label set."""

_WORDS = re.compile(r"\w+")
_IN_NAME = re.compile(r"^task\d+_+([A-Za-z0-9.\-]+)")


@dataclass(frozen=True)
class _Sketch:
    """What is kept of a task after its rows are gone."""

    name: str
    split: str
    shingles: frozenset[str]
    labels: frozenset[str]
    corpora: frozenset[str]
    corpora_by: str
    inputs: npt.NDArray[np.uint64]  # [N], distinct


def audit(dod: Dod, *, near: float = NEAR) -> dict[str, Any]:
    """The report as JSON; pairs across the train/test split come first.

    Args:
        dod: any DoD; tasks are read one at a time.
        near: Jaccard index from which two tasks are near-duplicates.

    Raises:
        SoftverbError: as the DoD's own methods.
    """
    sketches = [_sketch(dod.task(name)) for name in dod.names()]
    splits = {s.name: s.split for s in sketches}
    alike = [
        {"tasks": [a.name, b.name], "splits": [a.split, b.split], "jaccard": round(j, 4)} for a, b, j in _near(sketches, near)
    ]
    groups = _same_input(sketches)
    shared = [
        {"tasks": list(pair), "splits": [splits[pair[0]], splits[pair[1]]], "inputs": n}
        for pair, n in _shared_inputs(sketches, groups).items()
    ]
    corpora = _corpora(sketches)
    return {
        "kind": dod.kind,
        "sha256": dod.sha256,
        "tasks": dict(Counter(splits.values())),
        "near_duplicates": {
            "measure": f"Jaccard index of {'labels' if dod.kind == 'classification' else f'{SHINGLE}-word shingles'}",
            "threshold": near,
            "pairs": len(alike),
            "pairs_across_splits": sum(map(_crosses, alike)),
            "identical": sum(pair["jaccard"] == 1 for pair in alike),
            "identical_across_splits": sum(pair["jaccard"] == 1 and _crosses(pair) for pair in alike),
            "test_tasks_with_one_in_train": len(_test_tasks(alike)),
            "list": sorted(alike, key=lambda p: (not _crosses(p), -p["jaccard"], p["tasks"])),
        },
        "shared_inputs": {
            "pairs": len(shared),
            "pairs_across_splits": sum(map(_crosses, shared)),
            "inputs_across_splits": sum(len({sketches[i].split for i in members}) > 1 for members in groups),
            "test_tasks_with_some": len(_test_tasks(shared)),
            "test_tasks_with_ten_percent": len(_heavily_shared(sketches, groups)),
            "list": sorted(shared, key=lambda p: (not _crosses(p), -p["inputs"], p["tasks"])),
        },
        "corpora": {
            "known_by": " and ".join(sorted({s.corpora_by for s in sketches if s.corpora})) or "nothing",
            "corpora": len({c for s in sketches for c in s.corpora}),
            "across_splits": len(corpora),
            "test_tasks_with_one_in_train": len({t for found in corpora.values() for t in found["test"]}),
            "list": corpora,
        },
        "benchmark_labels": _benchmark_labels([s for s in sketches if s.split == "train"]),
    }


def summary(report: Mapping[str, Any]) -> str:
    """The counts of a report as a short aligned table."""
    near, rows, corpora = report["near_duplicates"], report["shared_inputs"], report["corpora"]
    lines = [
        ("tasks", ", ".join(f"{n} {split}" for split, n in report["tasks"].items())),
        (
            f"near-duplicate pairs ({near['measure']} >= {near['threshold']})",
            f"{near['pairs']}, {near['pairs_across_splits']} across splits",
        ),
        ("  of them identical", f"{near['identical']}, {near['identical_across_splits']} across splits"),
        ("  test tasks with one in train", near["test_tasks_with_one_in_train"]),
        ("pairs of tasks that share inputs", f"{rows['pairs']}, {rows['pairs_across_splits']} across splits"),
        ("  inputs in both splits", rows["inputs_across_splits"]),
        ("  test tasks with some in train", rows["test_tasks_with_some"]),
        ("  test tasks with 10 % of theirs in train", rows["test_tasks_with_ten_percent"]),
        (f"corpora (known by {corpora['known_by']})", f"{corpora['corpora']}, {corpora['across_splits']} in both splits"),
        ("  test tasks with one in train", corpora["test_tasks_with_one_in_train"]),
    ]
    for name, found in report["benchmark_labels"].items():
        lines.append((f"training label sets with labels of {name}", f"{found['all']} all of them, {found['some']} some"))
    width = max(len(left) for left, _ in lines)
    return "\n".join(f"{left.ljust(width)}  {right}" for left, right in lines)


def _sketch(task: DodTask) -> _Sketch:
    rows = (*task.train, *task.heldout)
    outputs = Counter(row.output for row in rows)
    # Outputs of a small set that each occur more than once are labels; a task of few rows has none by chance.
    labels = task.labels or (tuple(outputs) if len(outputs) <= FEW and min(outputs.values(), default=0) > 1 else ())
    words = _WORDS.findall(task.instruction.casefold())
    shingles = {" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))} if words else set()
    inputs = {int(storage.sha256_bytes(_same(row.input).encode("utf-8", "surrogatepass"))[:16], 16) for row in rows}
    named = _IN_NAME.match(
        task.name
    )  # task1356_xlsum_title_generation: a fair guess, wrong for names like task645_summarization
    known = task.info.get("sources")
    corpora = known or ([named[1]] if named else [])
    return _Sketch(
        task.name,
        task.split,
        frozenset(shingles) if task.instruction else frozenset(map(_same, task.labels)),
        frozenset(map(_same, labels)),
        frozenset(map(_same, corpora)),
        "source field" if known else "task name",
        np.array(sorted(inputs), np.uint64),
    )


def _same(text: str) -> str:
    return " ".join(text.split()).casefold()


def _crosses(pair: Mapping[str, Any]) -> bool:
    return len(set(pair["splits"])) > 1


def _test_tasks(pairs: Iterable[Mapping[str, Any]]) -> set[str]:
    """Test tasks of the pairs that have a training task on the other side."""
    crossing = [pair for pair in pairs if _crosses(pair)]
    return {name for pair in crossing for name, split in zip(pair["tasks"], pair["splits"], strict=True) if split == "test"}


def _near(sketches: Sequence[_Sketch], near: float) -> list[tuple[_Sketch, _Sketch, float]]:
    """Pairs whose Jaccard index is at least ``near``, through an inverted index."""
    holders: dict[str, list[int]] = {}
    found = []
    for j, sketch in enumerate(sketches):
        common = Counter[int]()
        for shingle in sorted(sketch.shingles):
            common.update(holders.get(shingle, ()))
            holders.setdefault(shingle, []).append(j)
        for i, n in sorted(common.items()):
            value = n / (len(sketches[i].shingles) + len(sketch.shingles) - n)
            if value >= near:
                found.append((sketches[i], sketch, value))
    return found


def _shared_inputs(sketches: Sequence[_Sketch], groups: Iterable[Sequence[int]]) -> Counter[tuple[str, str]]:
    """Pairs of tasks → how many different inputs they share."""
    pairs = Counter[tuple[str, str]]()
    for members in groups:
        pairs.update((sketches[a].name, sketches[b].name) for i, a in enumerate(members) for b in members[i + 1 :])
    return pairs


def _heavily_shared(sketches: Sequence[_Sketch], groups: Iterable[Sequence[int]]) -> set[str]:
    """Test tasks with at least a tenth of their inputs in training tasks."""
    count = Counter[int]()
    for members in groups:
        if any(sketches[i].split == "train" for i in members):
            count.update(i for i in members if sketches[i].split == "test")
    return {sketches[i].name for i, n in count.items() if n * 10 >= len(sketches[i].inputs)}


def _same_input(sketches: Sequence[_Sketch]) -> list[list[int]]:
    """For every input of several tasks the places of these tasks. Memory: 16 bytes per row of the DoD."""
    if not sketches:
        return []
    hashes = np.concatenate([s.inputs for s in sketches])
    owners = np.repeat(np.arange(len(sketches)), [len(s.inputs) for s in sketches])
    order = np.argsort(hashes, kind="stable")
    _, starts, counts = np.unique(hashes[order], return_index=True, return_counts=True)
    return [sorted(owners[order[s : s + n]].tolist()) for s, n in zip(starts, counts, strict=True) if n > 1]


def _corpora(sketches: Sequence[_Sketch]) -> dict[str, dict[str, list[str]]]:
    """Corpora that both splits use → their tasks by split."""
    used: dict[str, dict[str, list[str]]] = {}
    for sketch in sketches:
        for corpus in sketch.corpora:
            used.setdefault(corpus, {"train": [], "test": []}).setdefault(sketch.split, []).append(sketch.name)
    return {corpus: tasks for corpus, tasks in sorted(used.items()) if tasks["train"] and tasks["test"]}


def _benchmark_labels(training: Sequence[_Sketch]) -> dict[str, dict[str, Any]]:
    """For every benchmark the training tasks whose label set holds all, or some, of its labels."""
    report = {}
    for name, benchmark in BENCHMARKS.items():
        words = {_same(word) for word in benchmark.label_words}
        some = [s.name for s in training if words & s.labels]
        whole = [s.name for s in training if words <= s.labels]
        report[name] = {"labels": list(benchmark.label_words), "all": len(whole), "some": len(some), "tasks_with_all": whole}
    return report
