"""``softverb translate train``: a LoRA on the frozen model learns to write down what soft prompts stand for (section 5).

The model reads ``cat(S, E[BOS h EOS])``: a prompt's vectors, and its text behind them; the loss is on h and EOS only. EOS is
put behind every text after it was cut, so that the last supervised token of each target is EOS.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lm_eval_softverb
from lm_eval_softverb import storage
from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.bank import Bank
from lm_eval_softverb.errors import ArtifactError
from lm_eval_softverb.fitting import Processes
from lm_eval_softverb.verbalizers.translator_adapter import SIDECAR, TranslatorAdapter
from lm_eval_softverb.verbalizers.translator_config import TranslatorConfig
from lm_eval_softverb.verbalizers.translator_data import (
    Example,
    Item,
    Pair,
    data_sha256,
    encode,
    epoch_items,
    fixed_items,
    held_out,
    noisy,
    pairs_of,
    target_losses,
)
from lm_eval_softverb.verbalizers.translator_fit import Fit
from lm_eval_softverb.verbalizers.translator_heads import Heads, heads, reads
from lm_eval_softverb.verbalizers.translator_lora import LoraLayers


class Translation:
    """The objective: mean cross-entropy per supervised token. Validation texts are in one order."""

    def __init__(
        self,
        backbone: Backbone,
        training: Sequence[Pair],
        validation: Sequence[Pair],
        config: TranslatorConfig,
        before: Heads,
    ) -> None:
        self.backbone, self.config, self.training, self.before = backbone, config, training, before
        self.held_out, cut = self._encode(fixed_items(validation, before, config))
        self.cut = cut + self._encode(epoch_items(training, before, config, 0))[1]

    def epoch(self, number: int) -> list[Example]:
        examples, _ = self._encode(epoch_items(self.training, self.before, self.config, number))
        return noisy(examples, self.config.noise, f"{self.config.seed}/{number}") if self.config.noise else examples

    def validation(self) -> list[Example]:
        return self.held_out

    def losses(self, examples: Sequence[Example]) -> Tensor:
        return target_losses(self.backbone, examples)

    def weight(self, example: Example) -> float:
        return float(len(example.target))

    def length(self, example: Example) -> int:
        return len(example.ids)

    def _encode(self, items: Sequence[Item]) -> tuple[list[Example], int]:
        return encode(self.backbone, items, max_tokens=self.config.max_tokens, whole_sentences=self.config.whole_sentences)


def train_translator(
    backbone: Backbone,
    bank: Bank,
    config: TranslatorConfig,
    out: Path,
    *,
    split: str = "train",
    texts: Mapping[str, Sequence[str]] | None = None,
    info: Mapping[str, Any] | None = None,
    force: bool = False,
    max_tokens: int | None = None,
    checkpoint_seconds: float = 30.0,
    overwrite: bool = False,
    progress: bool = True,
    on_step: Callable[[int], None] = lambda _step: None,
) -> TranslatorAdapter:
    """Trains a translator on a bank's prompts and writes it to ``out``; called again after a kill, it goes on where it was.

    Args:
        split: of the manifest's entries to learn from.
        texts: paraphrases by prompt or task.
        info: facts about the run to record in the artifact.
        force: learn from prompts of another base model than the one in use; recorded.
        max_tokens: of one pass; see :class:`~lm_eval_softverb.verbalizers.translator_fit.Fit`.
        checkpoint_seconds: time between checkpoints; 0 writes one after each step.
        on_step: called after every optimiser step (and its checkpoint).

    Returns:
        The translator of the epoch with the best validation loss. A finished run with the same prompts, settings and base
        model is loaded, not repeated.

    Raises:
        ArtifactError: ``out`` holds another translator or run and ``overwrite`` is false.
        BaseModelMismatch: the prompts are another model's.
        DataError: too few prompts.
        NonFiniteError: the loss is no longer a number.
        Interrupted: SIGTERM or SIGINT arrived; a checkpoint was written first.
    """
    storage.require_writable(out)
    pairs, counts = pairs_of(bank, config.kind, split, texts)
    forced = sorted({d for p in pairs for d in p.prompt.check_fits(backbone.fingerprint, force=force)})
    answers = reads(config.kind, config.name_answers) if config.answers else None
    run = run_of(backbone, [config.to_json(), data_sha256(pairs), answers])
    if found := finished_before(out, run, overwrite):
        return found
    training, validation = held_out(pairs, config.validation, config.seed, config.share)
    prompts = [pair.prompt for pair in (*training, *validation)]
    before = heads(backbone, prompts, config.between, config.kind, progress=progress, processes=Processes())
    objective = Translation(backbone, training, validation, config, before)
    layers = LoraLayers(backbone, config, dropout=config.dropout, seed=config.seed)
    fit = Fit(backbone, layers, objective, config, out, run=run, max_tokens=max_tokens)
    best = fit.fit(checkpoint_seconds=checkpoint_seconds, progress=progress, on_step=on_step)
    made = {
        **(info or {}),
        **facts(backbone, fit, run),
        "config": config.to_json(),
        "data_sha256": data_sha256(pairs),
        "prompts": {"training": [p.name for p in training], "validation": [p.name for p in validation]},
        "counts": {**counts, "texts_per_epoch": len(objective.epoch(0)), "texts_cut": objective.cut},
        "forced_despite": forced,
    }
    return finish(
        TranslatorAdapter(
            best, config.rank, config.alpha, layers.targets, backbone.fingerprint, config.kind, config.between, made, str(out)
        ),
        out,
        fit.processes,
    )


def run_of(backbone: Backbone, deciding: Sequence[Any]) -> str:
    """Hash of what decides the weights: base model, dtype, code version, and the rest."""
    base = backbone.fingerprint
    model = [sorted(base.sketch.items()), base.tokenizer_sha256, str(backbone.dtype)]
    return storage.sha256_json([lm_eval_softverb.__version__, model, *deciding])


def finished_before(out: Path, run: str, overwrite: bool) -> TranslatorAdapter | None:
    """The translator of a finished run, if the folder holds it.

    Raises:
        ArtifactError: the folder holds another run's and ``overwrite`` is false.
    """
    processes = Processes()
    if overwrite and processes.first:
        shutil.rmtree(out / "checkpoint", ignore_errors=True)
        (out / SIDECAR).unlink(missing_ok=True)
    processes.wait()
    if not (out / SIDECAR).exists():
        return None
    found = TranslatorAdapter.load(out)
    if found.info.get("run") != run:
        raise ArtifactError(
            f"{out} already holds translator {found.id} of another run. Choose another --out, or pass --overwrite."
        )
    return found


def facts(backbone: Backbone, fit: Fit[Any], run: str) -> dict[str, Any]:
    """What a fit records of itself."""
    p = fit.progress
    return {
        "run": run,
        "losses": p.history,
        "best_validation_loss": p.best_loss,
        "best_epoch": p.best_epoch,
        "steps": p.step,
        "out_of_memory": p.out_of_memory,
        "tokens_per_pass": fit.size,
        "processes": fit.processes.count,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "versions": _versions(),
    }


def finish(adapter: TranslatorAdapter, out: Path, processes: Processes) -> TranslatorAdapter:
    """Writes the folder and removes the checkpoints."""
    if processes.first:
        adapter.save(out)
        shutil.rmtree(out / "checkpoint", ignore_errors=True)
    processes.wait()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return adapter


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {n: version(n) for n in ("torch", "transformers", "peft")} | {"lm_eval_softverb": lm_eval_softverb.__version__}
