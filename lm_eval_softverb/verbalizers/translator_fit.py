"""Fitting LoRA weights to any loss: steps, epochs, checkpoints, memory and processes. What the loss is, an objective says.

Under ``accelerate launch`` every process takes its share of each batch and gradients are added up, so that several processes
follow the trajectory of one (dropout aside, whose masks are each process's own). Checkpoints are written by the first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from lm_eval_softverb import checkpoint, storage
from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.batching import is_out_of_memory
from lm_eval_softverb.errors import NonFiniteError
from lm_eval_softverb.fitting import Processes, attention, tokens_per_pass
from lm_eval_softverb.verbalizers.translator_config import FitConfig
from lm_eval_softverb.verbalizers.translator_lora import LoraLayers

E = TypeVar("E")


class Objective(Protocol[E]):
    """What to minimise: the sum of ``losses`` over the sum of ``weight``."""

    def epoch(self, number: int) -> Sequence[E]:
        """The training examples of one epoch in their order; their number is the same in every epoch."""
        ...

    def validation(self) -> Sequence[E]: ...

    def losses(self, examples: Sequence[E]) -> Tensor:
        """Loss of each example [B], differentiable in the LoRA weights."""
        ...

    def weight(self, example: E) -> float: ...

    def length(self, example: E) -> int:
        """Tokens that the example takes in a pass."""
        ...


@dataclass
class Progress:
    """What changes from step to step, beside tensors."""

    epoch: int = 0
    cursor: int = 0
    step: int = 0
    best_loss: float = float("inf")
    best_epoch: int = 0
    stale: int = 0
    epoch_loss: float = 0.0
    out_of_memory: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


class Fit(Generic[E]):
    """Fits the weights of ``layers`` to an objective, with checkpoints in ``out / "checkpoint"``.

    Args:
        run: hash of everything that decides the result; another run's checkpoints are refused.
        max_tokens: padded tokens of one pass (default: by device); halved for good when memory runs out.
    """

    def __init__(
        self,
        backbone: Backbone,
        layers: LoraLayers,
        objective: Objective[E],
        config: FitConfig,
        out: Path,
        *,
        run: str,
        max_tokens: int | None = None,
    ) -> None:
        self.backbone, self.layers, self.objective, self.config = backbone, layers, objective, config
        self.folder, self.run = out / "checkpoint", run
        self.size = max_tokens or tokens_per_pass(backbone)
        self.processes = Processes()
        self.progress = Progress()
        self.parameters = list(layers.parameters.values())
        for parameter in self.parameters:
            parameter.requires_grad_()
        self.optimiser = torch.optim.AdamW(self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.best = layers.state()
        self._restore()
        self._take_order()
        self.total = self.steps_per_epoch * config.epochs

    def fit(
        self,
        *,
        checkpoint_seconds: float = 30.0,
        progress: bool = True,
        what: str = "translator",
        on_step: Callable[[int], None] = lambda _step: None,
    ) -> dict[str, Tensor]:
        """Goes on from the newest checkpoint until all epochs are over or the validation loss has stopped falling.

        Returns:
            The weights of the epoch with the best validation loss.

        Raises:
            NonFiniteError: a loss or gradient is no number.
            Interrupted: SIGTERM or SIGINT arrived; a checkpoint was written first.
        """
        p, config, saved = self.progress, self.config, time.monotonic()
        hidden = not (progress and self.processes.first)
        bar = tqdm(total=self.total, initial=p.step, desc=what, unit="step", disable=hidden)
        with checkpoint.stop_on_signal() as stop, bar:
            while True:
                if p.cursor == self.steps_per_epoch:  # a checkpoint may end here, too
                    self._end_epoch()
                if p.epoch >= config.epochs or (config.patience and p.stale >= config.patience):
                    return self.best
                loss, stopped = self._step(stop.number is not None)
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}", best=f"{p.best_loss:.3f}", epoch=p.epoch + 1)
                if time.monotonic() - saved >= checkpoint_seconds or stopped:
                    self._save()
                    saved = time.monotonic()
                on_step(p.step)
                if stopped:
                    raise checkpoint.Interrupted(stop.number or 15)

    # --- one step ----------------------------------------------------------------------------------------------------

    def _take_order(self) -> None:
        self._order = self.objective.epoch(self.progress.epoch)
        self.steps_per_epoch = -(-len(self._order) // self.config.batch_size)

    def _step(self, stopping: bool) -> tuple[float, bool]:
        """One optimiser step over the next batch; its mean loss, and whether any process was asked to stop."""
        p, config = self.progress, self.config
        batch = self._order[p.cursor * config.batch_size : (p.cursor + 1) * config.batch_size]
        weight = sum(self.objective.weight(e) for e in batch)
        mine = batch[self.processes.rank :: self.processes.count]
        own = self._fitting(lambda: self._backward(mine, weight), mine)
        gradients = [torch.zeros_like(q) if q.grad is None else q.grad for q in self.parameters]
        facts = torch.tensor([own, float(stopping)], device=gradients[0].device)
        summed = self.processes.sum(torch.cat([*(g.flatten() for g in gradients), facts]))
        loss, norm = float(summed[-2]), float(summed[:-2].norm())
        if not abs(norm) < float("inf") or not abs(loss) < float("inf"):
            raise NonFiniteError(
                f"Training diverged at step {p.step}: the loss is {loss}, the norm of its gradient {norm}. Lower the learning "
                f"rate (now {config.learning_rate}) or use dtype float32."
            )
        for parameter, part in zip(self.parameters, summed[:-2].split([q.numel() for q in self.parameters]), strict=True):
            parameter.grad = part.view_as(parameter)
        if config.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm)
        for group in self.optimiser.param_groups:
            group["lr"] = config.rate(p.step, self.total)
        self.optimiser.step()
        p.step, p.cursor, p.epoch_loss = p.step + 1, p.cursor + 1, p.epoch_loss + loss
        return loss, bool(summed[-1] > 0)

    def _backward(self, examples: Sequence[E], weight: float) -> float:
        """Adds the gradient of this process's share of the batch's mean loss; returns that share."""
        self.optimiser.zero_grad()  # also of an attempt that ran out of memory
        device, total = self.backbone.device, 0.0
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), self.layers.on(training=True), attention(self.backbone):
            # Dropout depends on the seed, the step and the process only, so a resumed run draws the same masks.
            torch.manual_seed(storage.seed_from(self.config.seed, self.progress.step, self.processes.rank))
            for part in self._passes(examples, self.size):
                loss = self.objective.losses(part).sum() / weight
                loss.backward()
                total += float(loss.detach())
        return total

    def _end_epoch(self) -> None:
        """Validates, and keeps the weights where they are the best so far."""
        p, examples = self.progress, self.objective.validation()
        mine = examples[self.processes.rank :: self.processes.count]
        own = self._fitting(lambda: self._evaluate(mine), mine)
        sums = self.processes.sum(torch.tensor([own], dtype=torch.float64).to(self.parameters[0].device))
        loss = float(sums[0]) / sum(self.objective.weight(e) for e in examples)
        if not abs(loss) < float("inf"):
            raise NonFiniteError(f"The validation loss is {loss} after epoch {p.epoch + 1}; lower the learning rate.")
        if loss < p.best_loss - self.config.min_delta:
            self.best, p.best_loss, p.best_epoch, p.stale = self.layers.state(), loss, p.epoch + 1, 0
        else:
            p.stale += 1
        p.history.append({"epoch": p.epoch + 1, "train": p.epoch_loss / self.steps_per_epoch, "validation": loss})
        p.epoch, p.cursor, p.epoch_loss = p.epoch + 1, 0, 0.0
        self._take_order()

    @torch.no_grad()
    def _evaluate(self, examples: Sequence[E]) -> float:
        """Summed loss; nothing is kept for a backward pass, so passes are twice as large."""
        with self.layers.on():
            return sum(float(self.objective.losses(part).sum()) for part in self._passes(examples, 2 * self.size))

    def _passes(self, examples: Sequence[E], size: int) -> Iterator[list[E]]:
        """Longest first, at most ``size`` padded tokens each; a single example may have more."""
        part: list[E] = []
        for example in sorted(examples, key=self.objective.length, reverse=True):
            if part and (len(part) + 1) * self.objective.length(part[0]) > size:
                yield part
                part = []
            part.append(example)
        if part:
            yield part

    def _fitting(self, run: Callable[[], float], examples: Sequence[E]) -> float:
        """``run``, again with passes of half the size as often as memory runs out; each time is counted."""
        lengths = [self.objective.length(e) for e in examples]
        while True:
            try:
                return run()
            except RuntimeError as error:
                if not is_out_of_memory(error) or self.size < min(lengths):
                    raise
            self.progress.out_of_memory += 1
            self.size = min(self.size, len(lengths) * max(lengths)) // 2

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if not self.processes.first:
            return
        tensors = {f"best/{name}": t for name, t in self.best.items()}
        for name, parameter in self.layers.parameters.items():
            tensors[f"now/{name}"] = parameter
            moments = self.optimiser.state[parameter]
            tensors |= {f"{key}/{name}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
        checkpoint.save(self.folder, self.progress.step, tensors, {"run": self.run, "progress": self.progress.__dict__})

    def _restore(self) -> None:
        if not (found := checkpoint.load(self.folder, self.run)):
            return
        tensors, state = found
        self.progress = Progress(**state["progress"])
        self.best = {name: tensors[f"best/{name}"] for name in self.layers.parameters}
        self.layers.load({name: tensors[f"now/{name}"] for name in self.layers.parameters})
        for name, parameter in self.layers.parameters.items():
            self.optimiser.state[parameter] = {
                "step": torch.tensor(float(self.progress.step)),
                **{key: tensors[f"{key}/{name}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")},
            }
