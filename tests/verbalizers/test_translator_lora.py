"""LoRA layers: where they go, that they leave nothing behind, and that nothing else is trained."""

from __future__ import annotations

import pytest
import torch
from toy_translators import toy_bank

from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.errors import ConfigError
from lm_eval_softverb.verbalizers.translator_config import config
from lm_eval_softverb.verbalizers.translator_lora import LoraLayers, target_modules
from lm_eval_softverb.verbalizers.translator_training import train_translator


def train(b, tmp_path, **changes):
    settings = config(**{"epochs": 2, "batch_size": 2, "rank": 2, **changes})
    return train_translator(b, toy_bank(b, tmp_path / "bank"), settings, tmp_path / "t", progress=False)


def test_what_lora_adapts(backbone):
    llama = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    assert all(target_modules(backbone(name)) == llama for name in ("llama", "qwen2", "gemma2", "gemma3"))
    assert target_modules(backbone("gpt2")) == ("c_attn", "c_fc", "c_proj")
    eyes = target_modules(backbone("gemma3_vision"))
    assert len(eyes) == 3 * 7 and all("language_model" in name for name in eyes)
    for name in ("gpt_neo", "mamba", "t5"):
        with pytest.raises(ConfigError, match=r"LoRA has no place|residual stream"):
            target_modules(backbone(name))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_vision"])
def test_layers_are_in_the_model_only_while_wanted(backbone, name):
    b = backbone(name)
    attributes = set(vars(b.model))
    names, ids = [n for n, _ in b.model.named_modules()], torch.tensor([[5, 9, 40]])
    with torch.no_grad():
        before = b.model(ids).logits
        layers = LoraLayers(b, config(rank=3), seed=1)
        layers.load({k: torch.randn(p.shape) for k, p in layers.parameters.items()})
        with pytest.raises(RuntimeError, match="inside"), layers.on(training=True):
            inside = b.model(ids).logits
            raise RuntimeError("inside")
        assert not torch.allclose(inside, before, atol=0.1)
        assert torch.equal(b.model(ids).logits, before)
    assert [n for n, _ in b.model.named_modules()] == names and set(vars(b.model)) == attributes
    assert Backbone(b.model, b.tokenizer, b.name).fingerprint == b.fingerprint


def test_initial_weights_change_nothing_and_depend_on_the_seed_only(backbone):
    b = backbone("llama")
    first = LoraLayers(b, config(), seed=3).state()
    torch.rand(5)
    state = torch.random.get_rng_state()
    again, other = LoraLayers(b, config(), seed=3).state(), LoraLayers(b, config(), seed=4).state()
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's stream is touched
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)
    assert all(not t.any() for k, t in first.items() if "lora_B" in k)
    assert all(t.any() for k, t in first.items() if "lora_A" in k)


def test_only_lora_weights_are_trained(backbone, tmp_path):
    b = backbone("llama")
    before = {k: p.clone() for k, p in b.model.named_parameters()}
    train(b, tmp_path, learning_rate=0.1)
    assert all(torch.equal(p, before[k]) and p.grad is None for k, p in b.model.named_parameters())


def test_weights_are_float32_whatever_the_model_is(tiny, tmp_path):
    b = Backbone.load(tiny("llama"), dtype="bfloat16", device="cpu")
    made = train(b, tmp_path)
    assert {t.dtype for t in made.tensors.values()} == {torch.float32}
    assert made.info["dtype"] == "bfloat16"
