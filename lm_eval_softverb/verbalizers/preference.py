"""Preference training of a translator (DPO, Rafailov et al. 2023, equation 7), without labels and without people.

For each training prompt the translator draws candidate texts, which are scored by how much the frozen model behaves under
them as under the soft prompt (:mod:`~lm_eval_softverb.verbalizers.rerank`). The best is preferred to the worst. The reference
is the translator that training starts from, whose log-probabilities are computed once: not the frozen model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lm_eval_softverb import storage
from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.bank import Bank
from lm_eval_softverb.errors import DataError
from lm_eval_softverb.fitting import Processes
from lm_eval_softverb.verbalizers.answers import normalised
from lm_eval_softverb.verbalizers.rerank import Reranked, inputs_of, read_inputs
from lm_eval_softverb.verbalizers.texts import verbalize_to
from lm_eval_softverb.verbalizers.translator import Translator
from lm_eval_softverb.verbalizers.translator_adapter import TranslatorAdapter
from lm_eval_softverb.verbalizers.translator_config import PreferenceConfig
from lm_eval_softverb.verbalizers.translator_data import Example, Item, encode, held_out, pairs_of, target_losses
from lm_eval_softverb.verbalizers.translator_fit import Fit
from lm_eval_softverb.verbalizers.translator_heads import Heads, heads
from lm_eval_softverb.verbalizers.translator_lora import LoraLayers
from lm_eval_softverb.verbalizers.translator_training import facts, finish, finished_before, run_of

CANDIDATES = "candidates.jsonl"


@dataclass(frozen=True, eq=False)
class Preference:
    """Two texts of one prompt, and their log-probabilities (nats) under the reference."""

    chosen: Example
    rejected: Example
    reference: tuple[float, float]


def dpo_loss(chosen: Tensor, rejected: Tensor, reference: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta ((log p_w - log r_w) - (log p_l - log r_l))) of each pair [B].

    Args:
        chosen, rejected: log-probabilities of the texts under the translator [B].
        reference: of chosen and rejected under the reference [B, 2].
    """
    return -logsigmoid(beta * ((chosen - reference[:, 0]) - (rejected - reference[:, 1])))


class Preferring:
    """The objective: mean DPO loss per pair."""

    def __init__(
        self, backbone: Backbone, training: Sequence[Preference], validation: Sequence[Preference], config: PreferenceConfig
    ) -> None:
        self.backbone, self.training, self.held_out, self.config = backbone, training, validation, config

    def epoch(self, number: int) -> list[Preference]:
        return random.Random(f"{self.config.seed}/{number}").sample(list(self.training), len(self.training))

    def validation(self) -> Sequence[Preference]:
        return self.held_out

    def losses(self, examples: Sequence[Preference]) -> Tensor:
        found = -target_losses(self.backbone, [e.chosen for e in examples] + [e.rejected for e in examples])
        reference = torch.tensor([e.reference for e in examples], dtype=found.dtype, device=found.device)
        chosen, rejected = found.split(len(examples))
        return dpo_loss(chosen, rejected, reference, self.config.beta)

    def weight(self, example: Preference) -> float:
        return 1.0

    def length(self, example: Preference) -> int:
        return 2 * max(len(example.chosen.ids), len(example.rejected.ids))


def train_preferences(
    backbone: Backbone,
    bank: Bank,
    start: Path,
    inputs: Path,
    config: PreferenceConfig,
    out: Path,
    *,
    split: str = "train",
    info: Mapping[str, Any] | None = None,
    force: bool = False,
    max_tokens: int | None = None,
    checkpoint_seconds: float = 30.0,
    overwrite: bool = False,
    progress: bool = True,
    on_step: Callable[[int], None] = lambda _step: None,
) -> TranslatorAdapter:
    """Trains the translator in ``start`` further and writes the result to ``out``, with all candidates beside it.

    Args:
        inputs: JSONL of unlabelled inputs for every training prompt; see
            :func:`~lm_eval_softverb.verbalizers.rerank.read_inputs`.
        split, info, force, max_tokens, checkpoint_seconds, overwrite, progress, on_step: as for
            :func:`~lm_eval_softverb.verbalizers.translator_training.train_translator`.

    Raises:
        DataError: prompts without inputs, or too few prompts with two different texts.
        Others: as for ``train_translator``.
    """
    storage.require_writable(out)
    first = TranslatorAdapter.load(start)
    forced = set(first.check_fits(backbone.fingerprint, force=force))
    pairs, counts = pairs_of(bank, first.kind, split)
    known = read_inputs(inputs)
    for pair in pairs:
        forced.update(pair.prompt.check_fits(backbone.fingerprint, force=force))
        inputs_of(pair.prompt, known)  # before hours of drawing
    names = {p.name: p for p in pairs}
    run = run_of(
        backbone, [config.to_json(), first.id, storage.sha256_file(inputs), [[n, p.prompt.id] for n, p in names.items()]]
    )
    if found := finished_before(out, run, overwrite):
        return found
    translator = Translator(
        str(start), samples=config.candidates, temperature=config.temperature, seed=config.seed, force_adapter=force
    )
    processes = Processes()
    if processes.first:
        verbalize_to(
            out / CANDIDATES,
            Reranked(translator, str(inputs), config.answer_tokens),
            backbone,
            [p.prompt for p in pairs],
            [{"prompt_id": p.name} for p in pairs],
            kind=first.kind,
            max_new_tokens=config.max_tokens,
            overwrite=overwrite,
            progress=progress,
        )
    processes.wait()
    lines: dict[str, list[dict[str, Any]]] = {}
    for _, line in storage.read_jsonl(out / CANDIDATES):
        lines.setdefault(line["prompt_id"], []).append(line)
    chosen = {name: two for name in names if (two := preferred(lines[name]))}
    if len(chosen) < 2:
        raise DataError(
            f"Only {len(chosen)} of {len(pairs)} prompts have two different finished texts among {config.candidates} "
            "candidates; expected at least 2. Draw more of them, or at a higher temperature."
        )
    layers = LoraLayers(backbone, first, dropout=config.dropout)
    layers.load(first.tensors, first.source)
    prompts = [names[name].prompt for name in chosen]
    before = heads(backbone, prompts, first.between, first.kind, progress=progress, processes=processes)
    sides = held_out([names[name] for name in chosen], config.validation, config.seed)
    training, validation = (
        _referenced(backbone, layers, [(names[p.name], *chosen[p.name]) for p in side], before, config.max_tokens)
        for side in sides
    )
    objective = Preferring(backbone, training, validation, config)
    fit = Fit(backbone, layers, objective, config, out, run=run, max_tokens=max_tokens)
    best = fit.fit(checkpoint_seconds=checkpoint_seconds, progress=progress, what="preferences", on_step=on_step)
    made = {
        **(info or {}),
        **facts(backbone, fit, run),
        "config": config.to_json(),
        "start": {"id": first.id, "info": dict(first.info)},
        "inputs_sha256": storage.sha256_file(inputs),
        "prompts": {"training": [p.name for p in sides[0]], "validation": [p.name for p in sides[1]]},
        "counts": {**counts, "without_preference": len(pairs) - len(chosen)},
        "forced_despite": sorted(forced),
    }
    adapter = TranslatorAdapter(
        best, first.rank, first.alpha, first.targets, backbone.fingerprint, first.kind, first.between, made, str(out)
    )
    return finish(adapter, out, fit.processes)


def preferred(lines: Sequence[Mapping[str, Any]]) -> tuple[str, str] | None:
    """The texts of one prompt with the smallest and the largest divergence; None where they are not two.

    Texts that ``max_new_tokens`` ended are left out: behind them EOS would be a lie, and without it they never end.
    """
    finished = sorted((x for x in lines if not x["details"]["cut"]), key=lambda x: x["details"]["kl"])
    if not finished or finished[0]["details"]["kl"] == finished[-1]["details"]["kl"]:
        return None
    best, worst = str(finished[0]["text"]), str(finished[-1]["text"])
    return (best, worst) if normalised(best) != normalised(worst) else None


@torch.no_grad()
def _referenced(
    backbone: Backbone, layers: LoraLayers, texts: Sequence[tuple[Any, str, str]], before: Heads, most: int
) -> list[Preference]:
    out = []
    with layers.on():
        for pair, best, worst in texts:
            items = [Item(pair.prompt, before[pair.prompt.id], text) for text in (best, worst)]
            (chosen, rejected), _ = encode(backbone, items, max_tokens=most)
            reference = (-target_losses(backbone, [chosen, rejected])).tolist()
            out.append(Preference(chosen, rejected, (reference[0], reference[1])))
    return out
