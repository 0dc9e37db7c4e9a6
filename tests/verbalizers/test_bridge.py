"""The linear bridge: exact where it can be, refused where it does not fit, and a way for prompts of another width."""

from __future__ import annotations

import json

import pytest
import torch
from toy_translators import overfit, toy_bank, toy_prompt

from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.errors import ArtifactError, BaseModelMismatch, ConfigError
from lm_eval_softverb.models.verbalizer import TranslatorLM
from lm_eval_softverb.prompt import Fingerprint
from lm_eval_softverb.verbalizers.base import check_fits
from lm_eval_softverb.verbalizers.bridge import Bridge, common_ids, fit_bridge
from lm_eval_softverb.verbalizers.nearest import special_ids
from lm_eval_softverb.verbalizers.translator import Translator


@pytest.fixture(scope="module")
def wide(tiny, tmp_path_factory):
    """A tiny model of width 48 with the tokenizer of the others."""
    import transformers as t
    from toys import make_tokenizer

    folder = tmp_path_factory.mktemp("wide")
    tokenizer = make_tokenizer(bos=True)
    torch.manual_seed(5)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = t.LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=96, initializer_range=0.3, **sizes)
    t.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Backbone.load(str(folder), dtype="float32", device="cpu")


def related(b: Backbone, width: int, seed: int = 0) -> tuple[Backbone, torch.Tensor]:
    """A model whose input embeddings are a linear map [d, width] of those of ``b``, and the map."""
    import transformers as t

    weight = torch.randn(b.hidden_size, width, generator=torch.Generator().manual_seed(seed))
    sizes = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    model = t.LlamaForCausalLM(t.LlamaConfig(vocab_size=b.vocab_size, **sizes)).requires_grad_(False)
    model.get_input_embeddings().weight.copy_(b.embedding.weight.detach() @ weight)
    return Backbone(model.eval(), b.tokenizer, "related"), weight


def test_a_linear_relation_is_found_exactly(backbone):
    b = backbone("llama")
    other, weight = related(b, 48)
    bridge = fit_bridge(b, other, ridge=0.0)
    torch.testing.assert_close(bridge.weight, weight, rtol=1e-3, atol=1e-3)
    assert bridge.info["held_out_explained"] == pytest.approx(1.0, abs=1e-6)
    prompt = toy_prompt(b, 3, n=5)
    crossed = bridge.cross(prompt)
    torch.testing.assert_close(crossed.embeddings, prompt.embeddings @ weight, rtol=1e-3, atol=1e-3)
    assert crossed.fingerprint == other.fingerprint and crossed.info == {"bridge": bridge.id, "prompt": prompt.id}


def test_a_larger_ridge_makes_a_smaller_map(backbone, wide):
    b = backbone("llama")
    small, large = (fit_bridge(b, wide, ridge=r) for r in (0.1, 10.0))
    assert large.weight.norm() < small.weight.norm()
    assert -0.5 < small.info["held_out_explained"] < 0.5  # random embeddings have nothing to do with each other
    assert small.info["held_out_tokens"] == round(0.1 * small.info["common_tokens"])
    assert fit_bridge(b, wide, ridge=0.1).id == small.id != fit_bridge(b, wide, ridge=0.1, seed=1).id


def test_common_tokens_are_text_and_a_leading_blank_is_one_thing(backbone, wide, monkeypatch):
    b = backbone("llama")
    pairs = common_ids(b, wide)
    assert all(i == j for i, j in pairs) and len(pairs) == len(b.tokenizer) - len(special_ids(b))
    real = wide.tokenizer.convert_ids_to_tokens
    monkeypatch.setattr(wide.tokenizer, "convert_ids_to_tokens", lambda ids: [t.replace("Ġ", "▁") for t in real(ids)])
    assert common_ids(b, wide) == pairs
    monkeypatch.setattr(wide.tokenizer, "convert_ids_to_tokens", lambda ids: [f"<{i}>" for i in ids])
    with pytest.raises(ConfigError, match="0 text tokens in common"):
        fit_bridge(b, wide)
    with pytest.raises(ConfigError, match="ridge is -1"):
        fit_bridge(b, wide, ridge=-1)


def test_a_folder_is_checked_before_use(backbone, wide, tmp_path):
    made = fit_bridge(backbone("llama"), wide)
    made.save(tmp_path)
    assert Bridge.load(tmp_path).id == made.id and Bridge.load(tmp_path).info == made.info
    sidecar = json.loads((tmp_path / "bridge.json").read_text())
    turned = Bridge(made.weight.T.contiguous(), made.source, made.target, made.info)
    turned.save(tmp_path)
    with pytest.raises(ArtifactError, match=r"\[48, 32\], expected \[32, 48\]"):
        Bridge.load(tmp_path)
    (tmp_path / "bridge.json").write_text(json.dumps(sidecar))
    with pytest.raises(ArtifactError, match="is not the file"):
        Bridge.load(tmp_path)
    for broken in ({**sidecar, "schema": 9}, {**sidecar, "info": 3}, []):
        (tmp_path / "bridge.json").write_text(json.dumps(broken))
        with pytest.raises(ArtifactError, match="no description of a bridge"):
            Bridge.load(tmp_path)
    (tmp_path / "bridge.json").unlink()
    with pytest.raises(ArtifactError, match="no bridge"):
        Bridge.load(tmp_path)


def test_f11_a_prompt_of_another_width_is_refused_and_crosses_a_bridge_when_asked(backbone, wide, tmp_path):
    b = backbone("llama")
    own, theirs = toy_bank(b, tmp_path / "own"), toy_bank(wide, tmp_path / "theirs")
    overfit(wide, theirs, tmp_path / "t", epochs=2)
    fit_bridge(b, wide).save(tmp_path / "bridge")
    plain = {"pretrained": wide, "bank": own.source, "adapter": str(tmp_path / "t")}
    with pytest.raises(BaseModelMismatch, match="width 32"):
        TranslatorLM(**plain, force=True)
    lm = TranslatorLM(**plain, bridge=str(tmp_path / "bridge"))
    arguments = {"kind": "labels", "max_new_tokens": 4}
    crossed = lm.verbalizer.verbalize(wide, own.prompts, **arguments)
    by_hand = [Bridge.load(tmp_path / "bridge").cross(p) for p in own.prompts]
    without = Translator(adapter=str(tmp_path / "t")).verbalize(wide, by_hand, **arguments)
    assert [f[0].text for f in crossed] == [f[0].text for f in without]
    assert lm.get_model_info()["verbalizer"]["bridge_id"] == Bridge.load(tmp_path / "bridge").id
    with pytest.raises(BaseModelMismatch, match="width 48"):  # prompts of the bridge's far side
        check_fits(lm.verbalizer, theirs.prompts, wide.fingerprint)


def test_f11_a_bridge_to_another_model_is_refused(backbone, wide):
    bridge, other = fit_bridge(wide, backbone("llama")), backbone("llama_tied")
    with pytest.raises(BaseModelMismatch, match="leads to"):
        bridge.check_fits(other.fingerprint)
    assert bridge.check_fits(other.fingerprint, force=True)
    wider = Fingerprint(**{**other.fingerprint.__dict__, "hidden_size": 48})
    with pytest.raises(BaseModelMismatch):
        bridge.check_fits(wider, force=True)
    with pytest.raises(BaseModelMismatch, match="width 48; soft prompt"):
        bridge.cross(toy_prompt(backbone("llama"), 1))
