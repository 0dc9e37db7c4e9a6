"""An arm: one run of the harness. All arms of a comparison score the same documents; they differ in what fills the slot.

A run lies in a folder as the harness writes it, so that :func:`~lm_eval_softverb.compare.runs.read_run` reads it and anyone can
make the same by hand; ``arm.json`` beside it, written last, says that it is finished and from what.
"""

from __future__ import annotations

import gc
import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval_softverb
from lm_eval_softverb import storage
from lm_eval_softverb.compare.runs import Run, read_run
from lm_eval_softverb.endpoints.backends import Plan
from lm_eval_softverb.errors import OutputError, PlanOnly

MARK = "arm.json"
_CONTENTS = ("peft", "bank", "prompt_file", "file")
"""Arguments that name files or folders: what is in them decides, not where they are."""
_WITHOUT_CACHE = ("replay",)
"""Models that ask nobody: the harness's own cache goes by the text of a request, and theirs are the same in every arm."""


@dataclass(frozen=True)
class Arm:
    """One way to fill the slot.

    Attributes:
        name: in tables and folders.
        model: ``--model`` of the harness.
        model_args: its arguments.
        tasks: what is scored.
        shots: ``--num_fewshot``.
        metadata: what the tasks are told beside ``model_args``.
        limits: model arguments that decide no answer, such as budgets: a finished arm is finished under others, too.
        batch_size: decides no answer either.
        device: of local models.
    """

    name: str
    model: str
    model_args: Mapping[str, Any]
    tasks: tuple[str, ...]
    shots: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 16
    device: str | None = None

    def settings(self) -> dict[str, Any]:
        """Everything that decides the scores, as JSON; files by their contents."""
        return {
            "versions": [lm_eval_softverb.__version__, version("lm_eval")],
            "model": self.model,
            "model_args": _by_content(self.model_args),
            "tasks": list(self.tasks),
            "shots": self.shots,
            "metadata": _by_content(self.metadata),
        }

    def command(self, folder: Path, cache: Path) -> str:
        """The same run as a command line."""
        words = ["lm_eval", "--model", self.model, "--model_args", _argument({**self.model_args, **self.limits})]
        words += ["--tasks", ",".join(self.tasks)]
        words += ["--metadata", json.dumps(dict(self.metadata), ensure_ascii=False)] if self.metadata else []
        words += ["--num_fewshot", str(self.shots)] if self.shots else []
        words += ["--device", self.device] if self.device else []
        words += ["--batch_size", str(self.batch_size), "--output_path", str(folder), "--log_samples"]
        words += [] if self.model in _WITHOUT_CACHE else ["--use_cache", str(cache)]
        return shlex.join(words)


def is_finished(arm: Arm, folder: Path) -> bool:
    """Whether its results are there, of the same settings, and with an answer to every document."""
    if not (folder / MARK).exists():
        return False
    mark = storage.read_json(folder / MARK)
    results = folder / str(mark.get("results"))
    return mark.get("settings_sha256") == storage.sha256_json(arm.settings()) and results.is_file() and not mark.get("unscored")


def run_arm(arm: Arm, folder: Path, cache: Path) -> Run:
    """Runs the arm, unless it is finished, and reads its results.

    Args:
        folder: of this arm only.
        cache: file of answers, shared by all arms: what a killed run has asked is not asked again.

    Raises:
        OutputError: the harness could not write its results (it only logs that).
        SoftverbError: as the model and its tasks.
    """
    if is_finished(arm, folder):
        return read_run(folder / storage.read_json(folder / MARK)["results"], arm.name)
    from lm_eval.loggers import EvaluationTracker

    storage.require_writable(folder)
    settings = arm.settings()
    tracker = EvaluationTracker(output_path=str(folder))
    results = _evaluate(arm, cache, evaluation_tracker=tracker)
    samples = results.pop("samples")
    before = set(folder.rglob("*.json*"))
    tracker.save_results_aggregated(results=results, samples=samples)
    for task, rows in samples.items():
        tracker.save_results_samples(task_name=task, samples=rows)
    written = set(folder.rglob("*.json*")) - before
    if len(written) != 1 + len(samples):
        raise OutputError(f"The harness could not write its results to {folder} (see the messages above). Is the disk full?")
    # By its name: a clock that went back would make an older run the newest.
    run = read_run(next(path for path in written if path.name.startswith("results_")), arm.name)
    mark = {
        "settings_sha256": storage.sha256_json(settings),
        "results": str(Path(run.source).relative_to(folder)),
        "unscored": sum(len(task.unscored) for task in run.tasks.values()),
        "settings": settings,
        "command": arm.command(folder, cache),
    }
    storage.write_json(folder / MARK, mark)
    del results, samples, tracker
    gc.collect()  # the model's parts refer to each other; the next arm needs its memory
    return run


def plan_arm(arm: Arm, cache: Path) -> Plan:
    """What an arm on an endpoint would still send at most; nothing is sent.

    Raises:
        SoftverbError: as the model and its tasks.
    """
    try:
        _evaluate(arm, cache, plan=True)
    except PlanOnly as stop:
        return stop.plan  # type: ignore[no-any-return]
    return Plan(0, 0, 0, 0.0)


def _evaluate(arm: Arm, cache: Path, plan: bool = False, **options: Any) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    from lm_eval_softverb.plugin import register, task_dir

    register()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # the tables say what these messages say
    model_args = {**arm.model_args, **arm.limits, **({"plan": True} if plan else {})}
    # As the harness does, but without reading its own thousands of tasks.
    metadata = {**arm.model_args, **arm.metadata}
    results: dict[str, Any] = lm_eval.simple_evaluate(
        model=arm.model,
        model_args=model_args,
        tasks=list(arm.tasks),
        num_fewshot=arm.shots or None,
        batch_size=arm.batch_size,
        device=arm.device,
        use_cache=None if arm.model in _WITHOUT_CACHE else str(cache),
        task_manager=TaskManager(include_path=str(task_dir()), include_defaults=False, metadata=metadata),
        bootstrap_iters=1000,
        **options,
    )
    return results


def _argument(values: Mapping[str, Any]) -> str:
    """``a=1,b=2``, or JSON where that would be read as something else."""
    texts = [f"{name}={value}" for name, value in values.items()]
    plain = all(text.count("=") == 1 and "," not in text for text in texts)
    return ",".join(texts) if plain else json.dumps(dict(values), ensure_ascii=False)


def _by_content(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _content(Path(str(value))) if name in _CONTENTS and value else value for name, value in values.items()}


def _content(path: Path) -> str:
    """Hash of a file or of all files in a folder; of the name where there is neither (a hub id)."""
    path = path.expanduser()
    files: Sequence[Path] = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    if not path.exists():
        return str(path)
    return storage.sha256_json([[str(p.relative_to(path)), storage.sha256_file(p)] for p in files])
