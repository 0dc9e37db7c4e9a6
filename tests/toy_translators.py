"""A bank of random prompts with texts, and a translator that overfits it in a second."""

from __future__ import annotations

import torch

from lm_eval_softverb.bank import Bank
from lm_eval_softverb.prompt import SoftPrompt
from lm_eval_softverb.verbalizers.translator_config import config
from lm_eval_softverb.verbalizers.translator_training import train_translator

SETS = [("red", "blue"), ("good", "dull"), ("yes", "no"), ("film", "story"), ("music", "food"), ("one", "two", "three")]
# Random prompts have nothing in common, so the validation loss only rises: keep the last epoch, whatever it is.
OVERFIT = {"rank": 8, "alpha": 16, "learning_rate": 2e-2, "epochs": 40, "patience": 0, "min_delta": -1e9, "batch_size": 3}
OVERFIT |= {"dropout": 0.0, "weight_decay": 0.0, "label_order": "given"}


def toy_prompt(backbone, seed: int, n: int | None = None, **fields) -> SoftPrompt:
    rows = torch.randn(n or 3 + seed % 3, backbone.hidden_size, generator=torch.Generator().manual_seed(seed))
    return SoftPrompt(rows, fingerprint=backbone.fingerprint, **fields)


def toy_bank(backbone, folder, sets=SETS) -> Bank:
    """Prompts ``p0`` … of different lengths with labels and instructions, all of split ``train``."""
    entries = [
        {"prompt_id": f"p{i}", "task": f"t{i}", "split": "train", "labels": list(s), "instruction": f"Say {s[0]} or {s[1]}."}
        for i, s in enumerate(sets)
    ]
    prompts = [toy_prompt(backbone, i) for i in range(len(sets))]
    return Bank.load(Bank.save(folder, zip(prompts, entries, strict=True)))


def overfit(backbone, bank, folder, **changes):
    return train_translator(backbone, bank, config(**{**OVERFIT, **changes}), folder, progress=False)


def learnt(adapter, bank):
    """The bank's prompts that the translator was trained on, and their entries."""
    names = adapter.info["prompts"]["training"]
    both = [(p, e) for p, e in zip(bank.prompts, bank.entries, strict=True) if e["prompt_id"] in names]
    return [p for p, _ in both], [e for _, e in both]
