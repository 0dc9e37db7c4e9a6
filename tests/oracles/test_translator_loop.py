"""Translator training against a plain loop over PEFT's own model: one row at a time, no passes, no swapping of layers."""

from __future__ import annotations

import pytest
import torch
from toy_translators import toy_bank
from toys import BOS, EOS

from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.verbalizers.translator_config import config
from lm_eval_softverb.verbalizers.translator_data import epoch_items, held_out, pairs_of
from lm_eval_softverb.verbalizers.translator_heads import heads
from lm_eval_softverb.verbalizers.translator_lora import LoraLayers
from lm_eval_softverb.verbalizers.translator_training import train_translator

SETTINGS = {"rank": 3, "alpha": 6, "epochs": 3, "batch_size": 2, "patience": 0, "min_delta": -1e9, "learning_rate": 5e-3}


def plain(model_folder, pairs, c, initial):
    """LoRA weights after all epochs, and the mean validation loss of each."""
    from peft import LoraConfig, get_peft_model

    b = Backbone.load(model_folder, dtype="float64", device="cpu")
    targets = ["c_attn", "c_proj", "c_fc"] if b.model.config.model_type == "gpt2" else [f"{x}_proj" for x in "qkvo"]
    targets += [] if "c_fc" in targets else ["gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=c.rank, lora_alpha=c.alpha, target_modules=targets, fan_in_fan_out="c_fc" in targets)
    model = get_peft_model(b.model, lora)
    weights = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in weights.items():
            p.data = p.data.double()
            p.copy_(initial[name])
    training, validation = held_out(pairs, c.validation, c.seed)
    optimiser = torch.optim.AdamW(list(weights.values()), lr=c.learning_rate, weight_decay=c.weight_decay)

    def nll(prompt, text):
        target = [*b.tokenizer.encode(text, add_special_tokens=False), EOS]
        real = b.embedding(torch.tensor([[BOS, *target[:-1]]]))
        logits = model(inputs_embeds=torch.cat([prompt.embeddings[None].double(), real], dim=1)).logits[0]
        scores = logits[-len(target) :].log_softmax(-1)
        return -scores[range(len(target)), target].sum(), len(target)

    before = heads(b, [p.prompt for p in training], c.between, c.kind)
    step, losses, total = 0, [], 3 * -(-len(training) // c.batch_size)
    for epoch in range(c.epochs):
        order = epoch_items(training, before, c, epoch)
        for start in range(0, len(order), c.batch_size):
            found = [nll(item.prompt, item.text) for item in order[start : start + c.batch_size]]
            optimiser.zero_grad()
            (sum(x for x, _ in found) / sum(n for _, n in found)).backward()
            torch.nn.utils.clip_grad_norm_(list(weights.values()), c.max_grad_norm)
            for group in optimiser.param_groups:
                group["lr"] = c.rate(step, total)
            optimiser.step()
            step += 1
        with torch.no_grad():
            found = [nll(p.prompt, p.text) for p in validation]
        losses.append(float(sum(x for x, _ in found)) / sum(n for _, n in found))
    return weights, losses


@pytest.mark.parametrize("tokens_per_pass", [None, 20])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_training_follows_a_plain_peft_loop(tiny, tmp_path, name, tokens_per_pass):
    b = Backbone.load(tiny(name), dtype="float64", device="cpu")
    bank = toy_bank(b, tmp_path / "bank")
    c = config(**SETTINGS, dropout=0.0)
    made = train_translator(b, bank, c, tmp_path / "t", progress=False, max_tokens=tokens_per_pass)
    expected, losses = plain(tiny(name), pairs_of(bank, "labels")[0], c, LoraLayers(b, c, seed=c.seed).state())
    assert [x["validation"] for x in made.info["losses"]] == pytest.approx(losses, rel=1e-4)
    assert made.tensors.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(made.tensors[key].double(), value.detach(), rtol=1e-3, atol=1e-4)
