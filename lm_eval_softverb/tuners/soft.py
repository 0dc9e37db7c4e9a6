"""Soft prompt tuning (Lester et al. 2021): vectors in front of a frozen model, trained on target tokens only.

One prompt, or many together: every optimiser step takes one batch of each, one backward pass over all of them, and then each
prompt's own clipping, Adam step and, after an epoch, validation. A prompt trained beside others follows the trajectory it
follows alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lm_eval_softverb import checkpoint, storage
from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.batching import is_out_of_memory
from lm_eval_softverb.data.rows import Row
from lm_eval_softverb.errors import NonFiniteError
from lm_eval_softverb.fitting import tokens_per_pass
from lm_eval_softverb.prompt import SoftPrompt
from lm_eval_softverb.tuners.config import SoftConfig
from lm_eval_softverb.tuners.encoding import Example
from lm_eval_softverb.tuners.loss import backward, mean_losses
from lm_eval_softverb.tuners.training import Training

Outcome = tuple[Training, SoftPrompt | NonFiniteError]


def train_soft_prompt(
    backbone: Backbone,
    rows: Sequence[Row],
    config: SoftConfig,
    out: Path | str,
    *,
    validation_rows: Sequence[Row] | None = None,
    info: dict[str, Any] | None = None,
    checkpoint_seconds: float = 30.0,
    overwrite: bool = False,
    progress: bool = True,
    on_step: Callable[[int], None] = lambda _step: None,
) -> SoftPrompt:
    """Trains one soft prompt and writes it to ``out``; called again after a kill, it goes on where it was.

    Args:
        validation_rows: rows that choose the best epoch; by default a share of ``rows`` is held out.
        info: facts about the run to record in the artifact.
        checkpoint_seconds: time between checkpoints; 0 writes one after each step.
        on_step: called after every optimiser step (and its checkpoint).

    Returns:
        The prompt of the epoch with the best validation loss. A finished run with the same rows, settings and base model
        is loaded, not repeated.

    Raises:
        ArtifactError: ``out`` holds another prompt or run and ``overwrite`` is false.
        NonFiniteError: the loss is no longer a number.
        Interrupted: SIGTERM or SIGINT arrived; a checkpoint was written first.
    """
    storage.require_writable(Path(out))
    training = Training(backbone, rows, config, Path(out), validation_rows=validation_rows, info=info)
    if found := training.finished_before(overwrite):
        return found
    with tqdm(desc="soft prompt", unit="step", disable=not progress) as bar:

        def stepped(_active: Sequence[Training], losses: Sequence[float]) -> None:
            done = training.progress
            bar.total = training.total
            bar.update(done.step - bar.n)
            bar.set_postfix(loss=f"{losses[0]:.3f}", best=f"{done.best_loss:.3f}", epoch=done.epoch + 1)
            on_step(done.step)

        [(_, result)] = train_together(backbone, [training], width=1, checkpoint_seconds=checkpoint_seconds, on_step=stepped)
        if isinstance(result, NonFiniteError):
            raise result
        bar.total = training.progress.step
    return result


def train_together(
    backbone: Backbone,
    waiting: Iterable[Training],
    *,
    width: int,
    max_tokens: int | None = None,
    checkpoint_seconds: float = 30.0,
    on_step: Callable[[Sequence[Training], Sequence[float]], None] = lambda _active, _losses: None,
) -> Iterator[Outcome]:
    """Trains prompts side by side, at most ``width`` at a time; as one finishes the next one enters.

    Args:
        waiting: taken from only as places become free, so it may read rows lazily.
        max_tokens: padded tokens of one forward and backward pass; halved for good when memory runs out.
        checkpoint_seconds: time between checkpoints of all prompts that are on their way.
        on_step: called after each step with these prompts and their losses.

    Yields:
        Each training with its prompt, as soon as it is written, or with the error of one that diverged.

    Raises:
        Interrupted: SIGTERM or SIGINT arrived; checkpoints were written first.
    """
    source = iter(waiting)
    active: list[Training] = []
    size = max_tokens or tokens_per_pass(backbone)
    saved = time.monotonic()
    with checkpoint.stop_on_signal() as stop:
        while True:
            while len(active) < width and (entering := next(source, None)) is not None:
                entering.start()
                active.append(entering)
            if not active:
                return
            failed = {}
            if ended := [t for t in active if t.epoch_over]:  # a checkpoint may end here, too
                found, size = _validation_losses(backbone, ended, size)
                failed = _each(ended, found, Training.end_epoch)
            if leaving := [t for t in active if t in failed or t.done]:
                active = [t for t in active if t not in leaving]
                for training in leaving:
                    yield training, failed[training] if training in failed else training.finish()
                continue
            losses, size = _backward(backbone, active, size)
            failed = _each(active, losses, Training.apply)
            losses = [x for t, x in zip(active, losses, strict=True) if t not in failed]
            active = [t for t in active if t not in failed]
            yield from failed.items()
            if time.monotonic() - saved >= checkpoint_seconds:
                _save(active)
                saved = time.monotonic()
            if active:
                on_step(active, losses)
            if stop.number is not None:
                _save(active)
                raise checkpoint.Interrupted(stop.number)


def _save(trainings: Sequence[Training]) -> None:
    for training in trainings:
        training.save()


def _each(
    trainings: Sequence[Training], values: Sequence[float], act: Callable[[Training, float], None]
) -> dict[Training, NonFiniteError]:
    """``act`` on each; those that diverged, so that one of them does not stop the others."""
    failed = {}
    for training, value in zip(trainings, values, strict=True):
        try:
            act(training, value)
        except NonFiniteError as error:
            failed[training] = error
    return failed


def _backward(backbone: Backbone, active: Sequence[Training], size: int) -> tuple[list[float], int]:
    """Gradients of all prompts on their next batches, and their losses."""
    batches = [t.batch() for t in active]

    def run(size: int) -> list[float]:
        for training in active:
            training.prompt.grad = None  # of an attempt that ran out of memory
        return backward(backbone, [t.prompt for t in active], batches, size)

    return _fitting(run, active, batches, size)


def _validation_losses(backbone: Backbone, ended: Sequence[Training], size: int) -> tuple[list[float], int]:
    """Nothing is kept for a backward pass, so the passes are twice as large."""
    batches = [t.held_out for t in ended]

    def run(size: int) -> list[float]:
        found: list[float] = mean_losses(backbone, [t.prompt for t in ended], batches, 2 * size)
        return found

    return _fitting(run, ended, batches, size)


def _fitting(
    run: Callable[[int], list[float]], trainings: Sequence[Training], batches: Sequence[Sequence[Example]], size: int
) -> tuple[list[float], int]:
    """``run`` with passes of ``size`` tokens, or of half of that as often as memory runs out; also the size that worked."""
    rows = [len(e.ids) for batch in batches for e in batch]
    while True:
        try:
            return run(size), size
        except RuntimeError as error:
            if not is_out_of_memory(error) or size < min(rows):
                raise
        for training in trainings:
            training.out_of_memory += 1
        size = min(size, sum(rows)) // 2
