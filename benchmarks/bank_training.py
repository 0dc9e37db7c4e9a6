"""Training many soft prompts: one bank against a loop over PEFT with a plain training loop.

    make bench NAME=bank_training
    make bench NAME=bank_training ARGS="--prompts 64 --epochs 5 --widths 1,4,16,64 --plot widths.svg"

Prompts of the packaged default on the shipped label sets (one per set and seed), 20 virtual tokens; both sides have the same
initial rows, batches in the same order, optimiser, schedule, clipping, epochs and validation. The peer is what PEFT's
documentation shows: ``get_peft_model`` with PROMPT_TUNING, padded batches, ``loss.backward()``, one prompt after the other.
The sides take turns in parts (a share of the prompts each); ``--widths`` also measures our cost per prompt by the number of
prompts trained together.

In float32 each prompt's final loss must be the peer's. In bfloat16 single runs drift apart (rounding is amplified from step
to step, also between two runs of the peer with another batch order), so there the mean over prompts is compared: ``agree``
says whether the paired difference is within two standard errors of zero.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import peak_mib, ratio, report, reset_peak
from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.data import labelsets
from lm_eval_softverb.data.rows import Row
from lm_eval_softverb.models.harness import find_rows
from lm_eval_softverb.tuners.config import SoftConfig, config
from lm_eval_softverb.tuners.encoding import Example, epoch_batches
from lm_eval_softverb.tuners.soft import train_together
from lm_eval_softverb.tuners.training import Training, initial_rows

Job = tuple[list[Row], SoftConfig]


def main() -> None:
    a = arguments()
    backbone = Backbone.load("smollm2-135m", dtype=a.dtype)
    rows = {name: find_rows(name)[0] for name in labelsets.names()}
    settings = config(epochs=a.epochs, patience=0)
    jobs = [(rows[labelsets.names()[i % 12]], replace(settings, seed=i)) for i in range(a.prompts)]
    if a.widths:
        widths(a, backbone, jobs)
        return
    peer = Peer(backbone)
    ours(backbone, jobs[:1], 1), peer.train(*jobs[0])  # warm up
    times: tuple[list[float], list[float]] = ([], [])
    losses: tuple[list[float], list[float]] = ([], [])
    peaks = [0.0, 0.0]
    parts = [jobs[i :: a.turns] for i in range(a.turns)]
    for turn, part in enumerate(parts):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            reset_peak()
            start = time.perf_counter()
            losses[side].extend(ours(backbone, part, len(part)) if side == 0 else [peer.train(*job) for job in part])
            times[side].append(time.perf_counter() - start)
            peaks[side] = max(peaks[side], peak_mib())
            print(f"# turn {turn}, {'peer' if side else 'ours'}: {times[side][-1]:.1f} s for {len(part)} prompts", flush=True)
    differences = [x - y for x, y in zip(*losses, strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    mean, largest = statistics.mean(differences), max(map(abs, differences))
    report(
        "bank_training",
        {**ratio(*times), "prompts": a.prompts, "together": len(parts[0])},
        abs(mean) <= 2 * error if a.dtype == "bfloat16" else largest < 0.01,
        dtype=a.dtype,
        epochs=a.epochs,
        seconds_per_prompt={"ours": round(sum(times[0]) / a.prompts, 2), "peer": round(sum(times[1]) / a.prompts, 2)},
        final_validation_loss={
            "ours": round(statistics.mean(losses[0]), 4),
            "peer": round(statistics.mean(losses[1]), 4),
            "difference": round(mean, 4),
            "stderr": round(error, 4),
            "largest_difference": round(largest, 4),
        },
        peak_mib={"ours": round(peaks[0]), "peer": round(peaks[1])},
    )


def ours(backbone: Backbone, jobs: Sequence[Job], width: int) -> list[float]:
    """Last validation losses of prompts trained ``width`` at a time."""
    with tempfile.TemporaryDirectory() as folder:
        trainings = [Training(backbone, rows, c, Path(folder) / str(i)) for i, (rows, c) in enumerate(jobs)]
        found = dict(train_together(backbone, trainings, width=width, checkpoint_seconds=1e9))
    return [float(found[t].info["losses"][-1]["validation"]) for t in trainings]  # type: ignore[union-attr]


class Peer:
    """PEFT's PROMPT_TUNING on the same stock model, one prompt at a time."""

    def __init__(self, backbone: Backbone) -> None:
        from peft import PromptTuningConfig, TaskType, get_peft_model

        self.backbone = backbone
        self.model: Any = get_peft_model(
            backbone.model, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=20)
        )
        self.weight = next(p for p in self.model.parameters() if p.requires_grad)

    def train(self, rows: list[Row], settings: SoftConfig) -> float:
        """The last validation loss; rows are encoded by us, so that both sides read the same tokens."""
        with tempfile.TemporaryDirectory() as folder:
            training = Training(self.backbone, rows, settings, Path(folder))
            training.start()
        self.weight.data = initial_rows(self.backbone, settings).to(self.backbone.device)
        optimiser = torch.optim.AdamW([self.weight], lr=settings.learning_rate, weight_decay=settings.weight_decay)
        step, loss = 0, 0.0
        for epoch in range(settings.epochs):
            for indices in epoch_batches(training.examples, settings, epoch):
                batch = [training.examples[i] for i in indices]
                optimiser.zero_grad()
                self.loss(batch).backward()
                torch.nn.utils.clip_grad_norm_([self.weight], settings.max_grad_norm)
                optimiser.param_groups[0]["lr"] = settings.rate(step, training.total)
                optimiser.step()
                step += 1
            with torch.no_grad():
                held, size = training.held_out, settings.batch_size
                parts = [held[i : i + size] for i in range(0, len(held), size)]
                tokens = [sum(len(e.target) for e in part) for part in parts]
                loss = sum(float(self.loss(part)) * n for part, n in zip(parts, tokens, strict=True)) / sum(tokens)
        return loss

    def loss(self, batch: Sequence[Example]) -> torch.Tensor:
        texts = [[t for t in (*e.context, *e.target) if t >= 0] for e in batch]
        ids = self.backbone.tensor(texts)
        mask = self.backbone.tensor([[1] * len(t) for t in texts])
        labels = torch.full_like(ids, -100)
        for row, (text, e) in enumerate(zip(texts, batch, strict=True)):
            labels[row, len(text) - len(e.target) : len(text)] = ids[row, len(text) - len(e.target) : len(text)]
        return self.model(input_ids=ids, attention_mask=mask, labels=labels).loss  # type: ignore[no-any-return]


def widths(a: argparse.Namespace, backbone: Backbone, jobs: Sequence[Job]) -> None:
    """Seconds per prompt by the number of prompts trained together, each over the same number of prompts at least."""
    cost = {}
    ours(backbone, jobs[:1], 1)
    for width in map(int, a.widths.split(",")):
        some = jobs[: max(width, a.least)]
        reset_peak()
        start = time.perf_counter()
        ours(backbone, some, width)
        cost[width] = round((time.perf_counter() - start) / len(some), 3)
        print(f"# width {width}: {cost[width]} s per prompt, peak {peak_mib():.0f} MiB", flush=True)
    if a.plot:
        from lm_eval_softverb.compare.report import figure, inline_svg

        with figure(1, (5.2, 3.4)) as (drawn, axes):
            axes[0].plot(list(cost), list(cost.values()), "o-", color="#1d3557")
            axes[0].set_xscale("log", base=2)
            axes[0].set_xticks(list(cost), [str(w) for w in cost])
            axes[0].set_ylim(bottom=0)
            axes[0].set_xlabel("prompts trained together")
            axes[0].set_ylabel("seconds per prompt")
            axes[0].grid(alpha=0.3)
            a.plot.write_text(inline_svg(drawn))
    first, best = cost[min(cost)], min(cost.values())
    head = {"ours": best, "peer": first, "ratio": round(first / best, 3)}
    print(
        json.dumps({"name": "bank_training_widths", **head, "seconds_per_prompt": cost, "epochs": a.epochs, "dtype": a.dtype})
    )


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--prompts", type=int, default=32)
    p.add_argument("--epochs", type=int, default=2)
    p.add_argument("--turns", type=int, default=2, help="parts that the two sides train alternately")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--widths", help="measure our cost by width instead, e.g. 1,2,4,8,16,32,64")
    p.add_argument("--least", type=int, default=4, help="with --widths: train at least this many prompts")
    p.add_argument("--plot", type=Path, help="with --widths: SVG file")
    return p.parse_args()


if __name__ == "__main__":
    main()
