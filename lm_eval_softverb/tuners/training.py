"""One soft prompt on its way: its rows, its optimiser, its best epoch, and the checkpoint that a resumed run needs.

Nothing here knows of other prompts. :mod:`lm_eval_softverb.tuners.soft` runs one or many of these together.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lm_eval_softverb
from lm_eval_softverb import checkpoint, storage
from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.data.rows import Row, data_sha256, split_rows
from lm_eval_softverb.errors import ArtifactError, DataError, NonFiniteError
from lm_eval_softverb.prompt import SIDECAR, SoftPrompt
from lm_eval_softverb.tuners.config import SoftConfig
from lm_eval_softverb.tuners.encoding import Example, encode_rows, epoch_batches


def initial_rows(backbone: Backbone, config: SoftConfig) -> Tensor:
    """Float32 rows [n, d] to start from; depends on the seed only, not on the dtype the model is loaded in."""
    generator = torch.Generator().manual_seed(config.seed)
    if config.init == "normal":
        return torch.randn(config.tokens, backbone.hidden_size, generator=generator) * config.init_scale
    if config.init == "text":
        ids = backbone.tokenizer.encode(config.init_text, add_special_tokens=False)
        if not ids:
            raise DataError(f"init_text {config.init_text!r} has no tokens.")
        chosen = torch.tensor([ids[i % len(ids)] for i in range(config.tokens)])
    else:
        known = min(len(backbone.tokenizer), backbone.vocab_size)  # a padded vocabulary has rows that mean nothing
        chosen = torch.randint(known, (config.tokens,), generator=generator)
    return backbone.embedding.weight[chosen.to(backbone.device)].detach().float().cpu()


@dataclass
class Progress:
    """What changes from step to step, beside tensors."""

    epoch: int = 0
    cursor: int = 0
    step: int = 0
    best_loss: float = float("inf")
    stale: int = 0
    epoch_loss: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


class Training:
    """Trains one soft prompt, step by step, into the folder ``out``.

    Args:
        rows: to learn from; a share is held out to choose the best epoch unless ``validation_rows`` are given.
        info: facts about the run to record in the artifact.
        name: for messages; by default the folder's.

    Raises:
        DataError: rows that cannot be encoded or split.
    """

    def __init__(
        self,
        backbone: Backbone,
        rows: Sequence[Row],
        config: SoftConfig,
        out: Path,
        *,
        validation_rows: Sequence[Row] | None = None,
        info: dict[str, Any] | None = None,
        name: str = "",
    ) -> None:
        self.backbone, self.config, self.out, self.name = backbone, config, out, name or out.name
        self.info = info or {}
        self.data_sha256 = data_sha256([*rows, *(validation_rows or ())])
        self.run = storage.sha256_json(
            [
                config.to_json(),
                self.data_sha256,
                backbone.fingerprint.to_json()["sketch"],
                str(backbone.dtype),
                lm_eval_softverb.__version__,
            ]
        )
        self._rows, self._validation_rows = rows, validation_rows
        self.progress = Progress()
        self.out_of_memory = 0

    # --- before ------------------------------------------------------------------------------------------------------

    def finished_before(self, overwrite: bool = False) -> SoftPrompt | None:
        """The prompt of a finished run of the same rows, settings and base model, if the folder holds it.

        Raises:
            ArtifactError: the folder holds another run's prompt and ``overwrite`` is false.
        """
        if overwrite:
            shutil.rmtree(self.out / "checkpoint", ignore_errors=True)
            (self.out / SIDECAR).unlink(missing_ok=True)
        if not (self.out / SIDECAR).exists():
            return None
        found = SoftPrompt.load(self.out)
        if found.info.get("run") != self.run:
            raise ArtifactError(
                f"{self.out} already holds prompt {found.id} of another run. Choose another --out, or pass --overwrite."
            )
        return found

    def start(self) -> None:
        """Encodes the rows and takes up the newest checkpoint, if there is one.

        Raises:
            ArtifactError: the checkpoints belong to another run.
        """
        rows, config = list(self._rows), self.config
        given = self._validation_rows
        training, validation = (rows, list(given)) if given else split_rows(rows, config.validation, config.seed)
        self.examples, cut = encode_rows(self.backbone, training, config)
        self.held_out, held_cut = encode_rows(self.backbone, validation, config)
        self.inputs_cut = cut + held_cut
        self.prompt = initial_rows(self.backbone, config).to(self.backbone.device).requires_grad_()
        self.best = self.prompt.detach().cpu().clone()
        self.optimiser = torch.optim.AdamW([self.prompt], lr=config.learning_rate, weight_decay=config.weight_decay)
        if found := checkpoint.load(self.out / "checkpoint", self.run):
            tensors, values = found
            with torch.no_grad():
                self.prompt.copy_(tensors["prompt"])
            self.best = tensors["best"]
            self.progress = Progress(**values["progress"])
            self.out_of_memory = values["out_of_memory"]
            if "exp_avg" in tensors:
                self.optimiser.state[self.prompt] = {
                    "step": torch.tensor(float(self.progress.step)),
                    "exp_avg": tensors["exp_avg"].to(self.prompt.device),
                    "exp_avg_sq": tensors["exp_avg_sq"].to(self.prompt.device),
                }

    def save(self) -> None:
        """Writes a checkpoint."""
        moments = self.optimiser.state.get(self.prompt, {})
        tensors = {"prompt": self.prompt, "best": self.best}
        tensors |= {k: moments[k] for k in ("exp_avg", "exp_avg_sq") if k in moments}
        values = {"run": self.run, "progress": self.progress.__dict__, "out_of_memory": self.out_of_memory}
        checkpoint.save(self.out / "checkpoint", self.progress.step, tensors, values)

    # --- on the way --------------------------------------------------------------------------------------------------

    @cached_property
    def steps_per_epoch(self) -> int:
        return -(-len(self.examples) // self.config.batch_size)

    @property
    def total(self) -> int:
        """Most steps; fewer with early stopping."""
        return self.steps_per_epoch * self.config.epochs

    @property
    def done(self) -> bool:
        """Whether all epochs are over or the validation loss has not improved for ``patience`` of them."""
        p, c = self.progress, self.config
        return p.epoch >= c.epochs or bool(c.patience and p.stale >= c.patience)

    @property
    def epoch_over(self) -> bool:
        return self.progress.cursor == self.steps_per_epoch

    def batch(self) -> list[Example]:
        """The rows of the next step; which these are depends on the seed, the epoch and the step only."""
        if self.progress.cursor == 0 or not hasattr(self, "_order"):
            self._order = epoch_batches(self.examples, self.config, self.progress.epoch)
        return [self.examples[i] for i in self._order[self.progress.cursor]]

    def apply(self, loss: float) -> None:
        """One optimiser step with the gradient that the prompt has.

        Raises:
            NonFiniteError: the loss or the gradient is no number.
        """
        gradient, config, p = self.prompt.grad, self.config, self.progress
        norm = float("nan") if gradient is None else float(gradient.norm())
        if not abs(norm) < float("inf") or loss != loss:
            raise NonFiniteError(
                f"Training of {self.name} diverged at step {p.step}: the loss is {loss}, the norm of its gradient {norm}. "
                f"Lower the learning rate (now {config.learning_rate}) or use dtype float32."
            )
        if config.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_([self.prompt], config.max_grad_norm)
        for group in self.optimiser.param_groups:
            group["lr"] = config.rate(p.step, self.total)
        self.optimiser.step()
        self.prompt.grad = None
        p.step, p.cursor, p.epoch_loss = p.step + 1, p.cursor + 1, p.epoch_loss + loss

    def end_epoch(self, loss: float) -> None:
        """Takes the validation loss of the epoch and keeps the prompt where it is the best so far.

        Raises:
            NonFiniteError: the loss is no number.
        """
        p = self.progress
        if loss != loss:
            raise NonFiniteError(
                f"The validation loss of {self.name} is not a number after epoch {p.epoch + 1}; lower the learning rate."
            )
        if loss < p.best_loss - self.config.min_delta:
            self.best, p.best_loss, p.stale = self.prompt.detach().cpu().clone(), loss, 0
        else:
            p.stale += 1
        p.history.append({"epoch": p.epoch + 1, "train": p.epoch_loss / self.steps_per_epoch, "validation": loss})
        p.epoch, p.cursor, p.epoch_loss = p.epoch + 1, 0, 0.0

    # --- after -------------------------------------------------------------------------------------------------------

    def finish(self) -> SoftPrompt:
        """Writes the prompt of the best epoch and removes the checkpoints."""
        prompt = SoftPrompt(
            self.best.clone(),
            frame=self.config.frame,
            fingerprint=self.backbone.fingerprint,
            info={
                **self.info,
                "run": self.run,
                "tuner": "soft",
                "config": self.config.to_json(),
                "data_sha256": self.data_sha256,
                "rows": {
                    "training": len(self.examples),
                    "validation": len(self.held_out),
                    "inputs_cut": self.inputs_cut,
                },
                "losses": self.progress.history,
                "best_validation_loss": self.progress.best_loss,
                "steps": self.progress.step,
                "out_of_memory": self.out_of_memory,
                "dtype": str(self.backbone.dtype).removeprefix("torch."),
                "task_type": "SEQ_2_SEQ_LM" if self.backbone.is_seq2seq else "CAUSAL_LM",
                "versions": _versions(),
            },
            source=str(self.out),
        )
        prompt.save(self.out)
        shutil.rmtree(self.out / "checkpoint", ignore_errors=True)
        return prompt


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers")} | {"lm_eval_softverb": lm_eval_softverb.__version__}
