"""Soft prompt tuning (Lester et al. 2021): vectors in front of a frozen model, trained on target tokens only.

The loop reads top to bottom: encode rows, then for every epoch one optimiser step per batch, validation, and a decision.
A step is exact and lean: the virtual tokens (with the text all rows of a batch share behind them) run once and not once per
row, and only target positions go through the LM head.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import lm_eval_softverb
from lm_eval_softverb import storage
from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.batching import Counters, halving, is_out_of_memory, shared_length
from lm_eval_softverb.data.rows import Row, data_sha256, split_rows
from lm_eval_softverb.errors import ArtifactError, DataError, NonFiniteError
from lm_eval_softverb.prompt import SIDECAR, SoftPrompt
from lm_eval_softverb.tuners import checkpoint
from lm_eval_softverb.tuners.config import SoftConfig
from lm_eval_softverb.tuners.encoding import Example, encode_rows, epoch_batches


@dataclass
class _State:
    """Everything that a resumed run needs beside the settings."""

    prompt: Tensor
    best: Tensor
    optimiser: torch.optim.AdamW
    epoch: int = 0
    cursor: int = 0
    step: int = 0
    best_loss: float = float("inf")
    stale: int = 0
    epoch_loss: float = 0.0
    micro_batch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


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


def loss_sum(backbone: Backbone, prompt: Tensor, batch: Sequence[Example]) -> Tensor:
    """Summed cross-entropy (nats) of all target tokens of ``batch``, differentiable in ``prompt`` [n, d]."""
    targets = torch.tensor([t for e in batch for t in e.target], device=backbone.device)
    if backbone.is_seq2seq:
        start = backbone.model.config.decoder_start_token_id
        logits = backbone.seq2seq_logits(
            backbone.embed(backbone.tensor([e.context for e in batch]), prompt),
            backbone.tensor([[1] * len(e.context) for e in batch]),
            backbone.tensor([(start, *e.target[:-1]) for e in batch]),
            backbone.tensor([[1] * len(e.target) for e in batch]).bool(),
        )
        return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
    prefix = backbone.prefix(batch[0].context[: shared_length([e.context[:-1] for e in batch])], prompt)
    skip = prefix.length if prefix else 0
    ids = backbone.tensor([e.ids[skip:] for e in batch])
    keep = backbone.tensor([[0] * (len(e.context) - skip - 1) + [1] * len(e.target) for e in batch]).bool()
    logits = backbone.logits(
        backbone.embed(ids, prompt),
        keep,
        cache=prefix.expand(len(batch), backbone.model.config) if prefix else None,
    )
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")


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
    out = Path(out)
    storage.require_writable(out)
    data = data_sha256([*rows, *(validation_rows or ())])
    run = storage.sha256_json(
        [
            config.to_json(),
            data,
            backbone.fingerprint.to_json()["sketch"],
            str(backbone.dtype),
            lm_eval_softverb.__version__,
        ]
    )
    folder = out / "checkpoint"
    if overwrite:
        shutil.rmtree(folder, ignore_errors=True)
        (out / SIDECAR).unlink(missing_ok=True)
    elif (out / SIDECAR).exists():
        found = SoftPrompt.load(out)
        if found.info.get("run") != run:
            raise ArtifactError(
                f"{out} already holds prompt {found.id} of another run. Choose another --out, or pass --overwrite."
            )
        return found

    training, validation = (
        (list(rows), list(validation_rows)) if validation_rows else split_rows(rows, config.validation, config.seed)
    )
    examples, cut = encode_rows(backbone, training, config)
    held_out, held_cut = encode_rows(backbone, validation, config)
    state = _start(backbone, config, folder, run)
    steps_per_epoch = -(-len(examples) // config.batch_size)
    total = steps_per_epoch * config.epochs
    saved = time.monotonic()

    def save() -> None:
        nonlocal saved
        moments = state.optimiser.state.get(state.prompt, {})
        tensors = {"prompt": state.prompt, "best": state.best}
        tensors |= {k: moments[k] for k in ("exp_avg", "exp_avg_sq") if k in moments}
        names = ("epoch", "cursor", "step", "best_loss", "stale", "epoch_loss", "micro_batch", "history")
        checkpoint.save(folder, state.step, tensors, {"run": run, **{n: getattr(state, n) for n in names}})
        saved = time.monotonic()

    with (
        checkpoint.stop_on_signal() as stop,
        tqdm(total=total, initial=state.step, desc="soft prompt", unit="step", disable=not progress) as bar,
    ):
        while state.epoch < config.epochs and not (config.patience and state.stale >= config.patience):
            batches = epoch_batches(examples, config, state.epoch)
            for indices in batches[state.cursor :]:
                loss = _step(backbone, state, [examples[i] for i in indices], config, total)
                state.epoch_loss += loss
                state.cursor += 1
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}", best=f"{state.best_loss:.3f}", epoch=state.epoch + 1)
                if time.monotonic() - saved >= checkpoint_seconds:
                    save()
                on_step(state.step)
                if stop.number is not None:
                    save()
                    raise checkpoint.Interrupted(stop.number)
            _end_epoch(backbone, state, held_out, config, len(batches))
        if state.step < total:
            bar.total = state.step
            bar.refresh()

    prompt = SoftPrompt(
        state.best.clone(),
        frame=config.frame,
        fingerprint=backbone.fingerprint,
        info={
            **(info or {}),
            "run": run,
            "tuner": "soft",
            "config": config.to_json(),
            "data_sha256": data,
            "rows": {"training": len(examples), "validation": len(held_out), "inputs_cut": cut + held_cut},
            "losses": state.history,
            "best_validation_loss": state.best_loss,
            "steps": state.step,
            "micro_batch": state.micro_batch,
            "dtype": str(backbone.dtype).removeprefix("torch."),
            "task_type": "SEQ_2_SEQ_LM" if backbone.is_seq2seq else "CAUSAL_LM",
            "versions": _versions(),
        },
        source=str(out),
    )
    prompt.save(out)
    shutil.rmtree(folder, ignore_errors=True)
    return prompt


def _start(backbone: Backbone, config: SoftConfig, folder: Path, run: str) -> _State:
    prompt = initial_rows(backbone, config).to(backbone.device).requires_grad_()
    optimiser = torch.optim.AdamW([prompt], lr=config.learning_rate, weight_decay=config.weight_decay)
    state = _State(prompt, prompt.detach().cpu().clone(), optimiser, micro_batch=config.batch_size)
    if found := checkpoint.load(folder, run):
        tensors, values = found
        with torch.no_grad():
            prompt.copy_(tensors["prompt"])
        state.best = tensors["best"]
        for name, value in values.items():
            if name != "run":
                setattr(state, name, value)
        if "exp_avg" in tensors:
            optimiser.state[prompt] = {
                "step": torch.tensor(float(state.step)),
                "exp_avg": tensors["exp_avg"].to(prompt.device),
                "exp_avg_sq": tensors["exp_avg_sq"].to(prompt.device),
            }
    return state


def _rate(config: SoftConfig, step: int, total: int) -> float:
    """Learning rate of the 0-based ``step`` of ``total``."""
    warm = int(config.warmup * total)
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    done = (step - warm) / max(1, total - warm)
    if config.schedule == "linear":
        return config.learning_rate * (1 - done)
    if config.schedule == "cosine":
        return float(config.learning_rate * 0.5 * (1 + torch.cos(torch.tensor(done * torch.pi))))
    return config.learning_rate


def _step(backbone: Backbone, state: _State, batch: list[Example], config: SoftConfig, total: int) -> float:
    """One optimiser step on the mean loss per target token; when memory runs out, in smaller parts of the same batch."""
    tokens = sum(len(e.target) for e in batch)
    while True:
        try:
            loss = 0.0
            state.prompt.grad = None
            for start in range(0, len(batch), state.micro_batch):
                with _attention(backbone):
                    part = loss_sum(backbone, state.prompt, batch[start : start + state.micro_batch]) / tokens
                    part.backward()
                loss += float(part.detach())
            break
        except RuntimeError as error:
            if not is_out_of_memory(error) or state.micro_batch == 1:
                raise
            state.micro_batch = max(1, min(state.micro_batch, len(batch)) // 2)
    gradient = state.prompt.grad
    if gradient is None or not torch.isfinite(gradient).all() or loss != loss:
        raise NonFiniteError(
            f"Training diverged at step {state.step}: the loss is {loss} or its gradient is not finite. "
            f"Lower the learning rate (now {config.learning_rate}) or use dtype float32."
        )
    if config.max_grad_norm > 0:
        torch.nn.utils.clip_grad_norm_([state.prompt], config.max_grad_norm)
    for group in state.optimiser.param_groups:
        group["lr"] = _rate(config, state.step, total)
    state.optimiser.step()
    state.step += 1
    return loss


def _attention(backbone: Backbone) -> AbstractContextManager[None]:
    """On a CPU the backward pass of fused attention in bfloat16 outweighs all matrix products; written out it does not."""
    if backbone.device.type == "cpu" and backbone.dtype == torch.bfloat16:
        return sdpa_kernel(SDPBackend.MATH)  # type: ignore[no-any-return]
    return nullcontext()


@torch.no_grad()
def mean_loss(backbone: Backbone, prompt: Tensor, examples: Sequence[Example], batch_size: int) -> float:
    """Mean cross-entropy per target token over ``examples``."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    total = 0.0
    for start in range(0, len(order), batch_size):
        batch = [examples[i] for i in order[start : start + batch_size]]
        total += sum(halving(lambda part: [float(loss_sum(backbone, prompt, part))], batch, Counters()))
    return total / sum(len(e.target) for e in examples)


def _end_epoch(backbone: Backbone, state: _State, held_out: list[Example], config: SoftConfig, steps: int) -> None:
    loss = mean_loss(backbone, state.prompt, held_out, 2 * state.micro_batch)
    if loss != loss:
        raise NonFiniteError(f"The validation loss is not a number after epoch {state.epoch + 1}; lower the learning rate.")
    improved = loss < state.best_loss - config.min_delta
    if improved:
        state.best, state.best_loss, state.stale = state.prompt.detach().cpu().clone(), loss, 0
    else:
        state.stale += 1
    state.history.append({"epoch": state.epoch + 1, "train": state.epoch_loss / steps, "validation": loss})
    state.epoch, state.cursor, state.epoch_loss = state.epoch + 1, 0, 0.0


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers")} | {"lm_eval_softverb": lm_eval_softverb.__version__}
