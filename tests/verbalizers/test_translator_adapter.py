"""A translator as files: what PEFT makes of them, and what is refused. Everything in the folder is untrusted."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_translators import toy_bank

from lm_eval_softverb.errors import ArtifactError, BaseModelMismatch, NonFiniteError
from lm_eval_softverb.storage import sha256_file
from lm_eval_softverb.verbalizers.translator import Translator
from lm_eval_softverb.verbalizers.translator_adapter import TranslatorAdapter
from lm_eval_softverb.verbalizers.translator_config import Between, config
from lm_eval_softverb.verbalizers.translator_lora import LoraLayers, layers_of

CONFIG, WEIGHTS, SIDECAR = "adapter_config.json", "adapter_model.safetensors", "translator.json"


def made_of(b, folder, seed: int = 0) -> TranslatorAdapter:
    """A translator of random weights."""
    layers = LoraLayers(b, config(rank=3, alpha=6))
    stream = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(p.shape, generator=stream) * 0.3 for name, p in layers.parameters.items()}
    adapter = TranslatorAdapter(
        tensors, 3, 6, layers.targets, b.fingerprint, "labels", Between(words="Labels:"), {"config": {"dropout": 0.1}}
    )
    adapter.save(folder)
    return adapter


@pytest.fixture
def folder(backbone, tmp_path):
    made_of(backbone("llama"), tmp_path / "t")
    return tmp_path / "t"


def edit(path, **changes):
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(value))


def rewrite(folder, change, metadata: bool = True):
    """Other tensors, with a sidecar that vouches for them."""
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors) or tensors, folder / WEIGHTS)
    if metadata:
        edit(folder / SIDECAR, sha256=sha256_file(folder / WEIGHTS))


def test_saved_and_loaded(backbone, tmp_path):
    made = made_of(backbone("llama"), tmp_path)
    found = TranslatorAdapter.load(tmp_path)
    assert (found.id, found.rank, found.alpha, found.targets) == (made.id, 3, 6, made.targets)
    assert (found.kind, found.between, found.info) == ("labels", Between(words="Labels:"), made.info)
    assert found.check_fits(backbone("llama").fingerprint) == []
    assert {p.name for p in tmp_path.iterdir()} == {CONFIG, WEIGHTS, SIDECAR}


def test_shipped_translators_go_by_their_names(backbone, tmp_path, monkeypatch):
    from lm_eval_softverb.verbalizers import translator_adapter

    monkeypatch.setattr(translator_adapter, "SHIPPED", tmp_path)
    with pytest.raises(ArtifactError, match="there are none"):
        TranslatorAdapter.load("toy-labels")
    made = made_of(backbone("llama"), tmp_path / "toy-labels")
    assert translator_adapter.shipped() == ["toy-labels"] and TranslatorAdapter.load("toy-labels").id == made.id
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy-labels" / SIDECAR).unlink()
    (tmp_path / "other").mkdir()
    with pytest.raises(ArtifactError, match="other is no translator"):  # a folder of that name comes first
        TranslatorAdapter.load("other")


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_vision"])
def test_without_our_file_it_is_a_working_peft_adapter(tiny, backbone, tmp_path, name):
    from peft import PeftModel

    from lm_eval_softverb.backbone import Backbone

    b, ids = backbone(name), torch.tensor([[5, 9, 40, 7]])
    made = made_of(b, tmp_path)
    (tmp_path / SIDECAR).unlink()
    with torch.no_grad(), layers_of(b, made).on():
        ours = b.model(ids).logits
    peft = PeftModel.from_pretrained(Backbone.load(tiny(name), dtype="float32", device="cpu").model, str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(peft(input_ids=ids).logits, ours, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(b.model(ids).logits, ours, atol=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "expected LORA"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_dora": True}, "use_dora"),
        ({"auto_mapping": {"parent_library": "os"}}, "auto_mapping"),
        ({"bias": "all"}, "bias"),
        ({"r": 10**6}, "at most 1024"),
        ({"r": "3"}, "whole numbers"),
        ({"r": True}, "whole numbers"),
        ({"lora_alpha": None}, "whole numbers"),
        ({"target_modules": ".*"}, "expected a list"),
        ({"target_modules": []}, "expected a list"),
        ({"target_modules": ["q_proj", {}]}, "expected a list"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ],
    ids=str,
)
def test_f13_an_adapter_config_that_is_no_translator_s(folder, changes, message):
    edit(folder / CONFIG, **changes)
    with pytest.raises(ArtifactError, match=message):
        TranslatorAdapter.load(folder)


def test_f13_other_targets_than_the_model_s(backbone, folder):
    edit(folder / CONFIG, target_modules=["lm_head", "q_proj"])
    with pytest.raises(ArtifactError, match=r"target_modules lm_head, q_proj, expected down_proj"):
        layers_of(backbone("llama"), TranslatorAdapter.load(folder))


def swapped(tensors):
    names = sorted(tensors)
    tensors[names[0]] = tensors[names[0]] + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {**t, "base_model.model.lm_head.weight": torch.zeros(3, 4)}, "lm_head"),
        (lambda t: {k: v.long() for k, v in t.items()}, "I64"),
        (lambda t: {k: v[None] for k, v in t.items()}, "expected LoRA matrices"),
        (lambda t: {k: torch.zeros(4, 4) for k in t}, "expected LoRA matrices of rank 3"),
    ],
)
def test_f12_tensors_that_are_no_lora(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(ArtifactError, match=message):
        TranslatorAdapter.load(folder)


def test_f12_tensors_of_another_model(backbone, folder):
    b = backbone("llama")
    rewrite(folder, lambda t: dict(list(t.items())[1:]))
    with pytest.raises(ArtifactError, match="1 LoRA matrices are missing"):
        layers_of(b, TranslatorAdapter.load(folder))
    made_of(b, folder)
    rewrite(folder, lambda t: {k: v[:, :-1].contiguous() if "lora_A" in k else v for k, v in t.items()})
    with pytest.raises(ArtifactError, match=r"lora_A.*expected \[3, "):
        layers_of(b, TranslatorAdapter.load(folder))


def test_f12_nan_truncation_and_swapped_tensors(folder):
    good = (folder / WEIGHTS).read_bytes()
    rewrite(folder, swapped, metadata=False)
    with pytest.raises(ArtifactError, match="is not the file"):
        TranslatorAdapter.load(folder)
    rewrite(folder, lambda t: {k: v * float("nan") for k, v in t.items()})
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        TranslatorAdapter.load(folder)
    (folder / WEIGHTS).write_bytes(good[:200])
    with pytest.raises(ArtifactError, match="truncated"):
        TranslatorAdapter.load(folder)
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'exit'\ntR.")
    with pytest.raises(ArtifactError, match="is missing"):
        TranslatorAdapter.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "schema 2"),
        ({"kind": "poem"}, "kind 'poem'"),
        ({"bos": "yes"}, "'bos': 'yes'"),
        ({"info": []}, "info list"),
        ({"fingerprint": None}, "fingerprint is malformed"),
    ],
)
def test_f13_a_sidecar_that_cannot_be_read(folder, changes, message):
    edit(folder / SIDECAR, **changes)
    with pytest.raises(ArtifactError, match=message):
        TranslatorAdapter.load(folder)


def test_f13_an_unfinished_folder_says_so(folder):
    (folder / SIDECAR).unlink()
    with pytest.raises(ArtifactError, match="training is not finished"):
        TranslatorAdapter.load(folder)


def test_f11_another_base_model_is_refused_and_another_width_always(backbone, folder, tmp_path):
    adapter, other = TranslatorAdapter.load(folder), backbone("llama_tied")
    with pytest.raises(BaseModelMismatch, match="force_adapter=true"):
        adapter.check_fits(other.fingerprint)
    assert adapter.check_fits(other.fingerprint, force=True)
    wide = type(other.fingerprint)(**{**other.fingerprint.__dict__, "hidden_size": 64})
    with pytest.raises(BaseModelMismatch, match="width"):
        adapter.check_fits(wide, force=True)
    bank = toy_bank(other, tmp_path / "bank")
    arguments = {"kind": "labels", "max_new_tokens": 3}
    with pytest.raises(BaseModelMismatch):
        Translator(adapter=str(folder)).verbalize(other, bank.prompts, **arguments)
    [[found], *_] = Translator(adapter=str(folder), force_adapter=True).verbalize(other, bank.prompts, **arguments)
    assert found.details["forced_despite"]
