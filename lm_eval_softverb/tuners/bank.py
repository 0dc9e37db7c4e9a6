"""``softverb bank``: one soft prompt for every task of a DoD, trained side by side on one frozen model.

Prompts are independent, so any group of them is a unit of work: ``shard=(i, n)`` trains every n-th task from the i-th on, on
any machine that sees the same work folder. A prompt is finished when its folder there holds its scores; whoever finishes the
last one writes the bank, the manifest after everything else. A kill loses at most the steps since the last checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from lm_eval_softverb import storage
from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.bank import Bank
from lm_eval_softverb.data.dod import Dod, DodTask
from lm_eval_softverb.data.rows import data_sha256
from lm_eval_softverb.errors import ConfigError, NonFiniteError
from lm_eval_softverb.prompt import SoftPrompt
from lm_eval_softverb.tuners.config import SoftConfig
from lm_eval_softverb.tuners.heldout import heldout_scores
from lm_eval_softverb.tuners.soft import train_together
from lm_eval_softverb.tuners.training import Training

SCORES = "heldout.json"
WIDTH = 32


def train_bank(
    backbone: Backbone,
    dod: Dod,
    config: SoftConfig,
    out: Path,
    *,
    tasks: Sequence[str],
    width: int = WIDTH,
    shard: tuple[int, int] = (1, 1),
    heldout_rows: int = 100,
    texts: bool = True,
    max_tokens: int | None = None,
    checkpoint_seconds: float = 60.0,
    overwrite: bool = False,
    progress: bool = True,
) -> Bank | None:
    """Trains and scores this shard's prompts; writes the bank once those of all shards are there.

    Args:
        tasks: names from ``dod``; those of the whole bank, whatever the shard.
        width: prompts on their way at a time.
        shard: (i, n), counted from 1.
        heldout_rows: of each task, to score its prompt on.
        texts: put labels and instructions into the manifest; without, only their hash, for data that must not be copied.
        max_tokens: of one pass; see :func:`~lm_eval_softverb.tuners.soft.train_together`.

    Returns:
        The bank, or None while other shards are unfinished.

    Raises:
        ConfigError: no tasks, a shard that does not exist, or another process at work on this shard.
        ArtifactError: the work folder holds prompts of another run and ``overwrite`` is false.
        NonFiniteError: some prompts diverged; all others are finished and kept.
    """
    number, count = shard
    if not tasks or not 1 <= number <= count:
        raise ConfigError(f"Shard {number}/{count} of {len(tasks)} tasks; expected at least one task and 1 <= i <= n.")
    work = work_folder(out)
    storage.require_writable(work)
    storage.require_writable(out)
    lock = FileLock(work / f"shard-{number}-of-{count}.lock")
    try:
        with lock.acquire(timeout=0):
            mine = tasks[number - 1 :: count]
            failed = _train(
                backbone, dod, config, work, mine, width, heldout_rows, max_tokens, checkpoint_seconds, overwrite, progress
            )
    except Timeout as error:
        raise ConfigError(
            f"Another process is training shard {number}/{count} of {out}. Wait for it, or take another shard."
        ) from error
    if failed:
        raise NonFiniteError(
            f"{len(failed)} of {len(mine)} prompts diverged; the others are finished. First: {failed[0]} "
            "Leave these tasks out (--exclude), or train all with a lower learning rate into another --out."
        )
    if unfinished(out, tasks):
        return None
    with FileLock(work / "bank.lock"):  # two shards may finish at once
        items = [_item(dod, work / name, name, texts) for name in tasks]
        Bank.save(out, items)
    return Bank.load(out)


def work_folder(out: Path) -> Path:
    """Where prompts lie until the bank is written: checkpoints, finished prompts, their scores."""
    return out.with_name(out.name + ".work")


def unfinished(out: Path, tasks: Sequence[str]) -> list[str]:
    """Tasks whose prompt is not finished, in their order."""
    return [name for name in tasks if not (work_folder(out) / name / SCORES).exists()]


def seed_of(config: SoftConfig, task: str) -> int:
    """Each prompt's own random stream, whatever bank or shard it is in."""
    return int(hashlib.sha256(f"{config.seed}/{task}".encode()).hexdigest()[:8], 16)


def _train(
    backbone: Backbone,
    dod: Dod,
    config: SoftConfig,
    work: Path,
    mine: Sequence[str],
    width: int,
    heldout_rows: int,
    max_tokens: int | None,
    checkpoint_seconds: float,
    overwrite: bool,
    progress: bool,
) -> list[NonFiniteError]:
    failed: list[NonFiniteError] = []
    with tqdm(total=len(mine), desc="bank", unit="prompt", disable=not progress) as bar:

        def finish(name: str, prompt: SoftPrompt, task: DodTask, own: SoftConfig) -> None:
            rows = task.heldout[:heldout_rows]
            scores = heldout_scores(backbone, prompt.embeddings, rows, own) if rows else {"rows": 0}
            entry = {
                "split": task.split,
                "labels": list(task.labels),
                "instruction": task.instruction,
                "heldout_sha256": data_sha256(task.heldout),
                "rows": {"train": len(task.train), "heldout": len(task.heldout)},
                "heldout": scores,
            }
            storage.write_json(work / name / SCORES, {"softprompt": prompt.id, **entry})
            bar.update()

        def waiting() -> Iterator[Training]:
            for name in mine:
                task, own = dod.task(name), replace(config, seed=seed_of(config, name))
                info = {"dod": dod.kind, "task": name}
                training = Training(backbone, task.train, own, work / name, info=info, name=name)
                if overwrite:
                    (work / name / SCORES).unlink(missing_ok=True)
                found = training.finished_before(overwrite)
                if found is None:
                    yield training
                elif _scored(work / name, found):
                    bar.update()
                else:
                    finish(name, found, task, own)

        def stepped(active: Sequence[Training], losses: Sequence[float]) -> None:
            steps = sum(t.progress.step for t in active)
            bar.set_postfix(active=len(active), steps=steps, loss=f"{sum(losses) / len(losses):.3f}")

        for training, result in train_together(
            backbone, waiting(), width=width, max_tokens=max_tokens, checkpoint_seconds=checkpoint_seconds, on_step=stepped
        ):
            if isinstance(result, NonFiniteError):
                failed.append(result)
            else:
                finish(training.name, result, dod.task(training.name), training.config)
    return failed


def _scored(folder: Path, prompt: SoftPrompt) -> bool:
    path = folder / SCORES
    return path.exists() and storage.read_json(path).get("softprompt") == prompt.id


def _item(dod: Dod, folder: Path, name: str, texts: bool) -> tuple[SoftPrompt, Mapping[str, Any]]:
    """A finished prompt and its line of the manifest."""
    entry = storage.read_json(folder / SCORES)
    truth = {key: entry.pop(key) for key in ("labels", "instruction")}
    entry |= {k: v for k, v in truth.items() if v} if texts else {"truth_sha256": storage.sha256_json(truth)}
    prompt = SoftPrompt.load(folder)
    losses = {"best_validation_loss": prompt.info["best_validation_loss"], "steps": prompt.info["steps"]}
    return prompt, {"prompt_id": name, "task": name, **entry, **losses, "dod": dod.reference()}
