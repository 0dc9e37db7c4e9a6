"""The artifact: what is written, what is read back, and whether it fits a model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lm_eval_softverb.errors import ArtifactError, BaseModelMismatch, NonFiniteError
from lm_eval_softverb.frame import Frame
from lm_eval_softverb.prompt import ADAPTER_CONFIG, SIDECAR, WEIGHTS, Fingerprint, SoftPrompt

INFO = {"seed": 3, "data_sha256": "abc", "losses": [2.0, 1.5], "settings": {"lr": 0.3}}


def rows(seed=0, n=4, d=32):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def fingerprint(backbone):
    return backbone("llama").fingerprint


def test_round_trip_keeps_every_bit(tmp_path, fingerprint):
    prompt = SoftPrompt(rows(), Frame("user_start", "Please §."), fingerprint, INFO)
    back = SoftPrompt.load(prompt.save(tmp_path / "p"))
    assert torch.equal(back.embeddings, prompt.embeddings)
    assert (back.frame, back.fingerprint, back.info, back.id) == (prompt.frame, fingerprint, INFO, prompt.id)
    assert back.source == str(tmp_path / "p")
    assert (back.n, back.hidden_size) == (4, 32)


def test_the_folder_is_what_the_design_says(tmp_path, fingerprint):
    prompt = SoftPrompt(rows(), fingerprint=fingerprint, info=INFO)
    folder = prompt.save(tmp_path / "p")
    assert sorted(p.name for p in folder.iterdir()) == sorted([ADAPTER_CONFIG, WEIGHTS, SIDECAR])
    tensors = load_file(folder / WEIGHTS)
    assert list(tensors) == ["prompt_embeddings"]
    assert (tensors["prompt_embeddings"].dtype, list(tensors["prompt_embeddings"].shape)) == (torch.float32, [4, 32])
    sidecar = json.loads((folder / SIDECAR).read_text())
    assert sidecar["id"] == prompt.id
    assert sidecar["id"].startswith("sp-")
    assert set(sidecar) == {"schema", "id", "sha256", "frame", "fingerprint", "info"}
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    assert (config["peft_type"], config["num_virtual_tokens"], config["token_dim"]) == ("PROMPT_TUNING", 4, 32)


def test_saving_again_gives_the_same_bytes(tmp_path, fingerprint):
    for name in ("a", "b"):
        SoftPrompt(rows(), fingerprint=fingerprint, info=INFO).save(tmp_path / name)
    for file in (ADAPTER_CONFIG, WEIGHTS, SIDECAR):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_without_the_sidecar_the_rows_are_left(tmp_path, fingerprint):
    folder = SoftPrompt(rows(), Frame("after_bos"), fingerprint, INFO).save(tmp_path / "p")
    (folder / SIDECAR).unlink()
    bare = SoftPrompt.load(folder)
    assert torch.equal(bare.embeddings, rows())
    assert (bare.frame, bare.fingerprint, bare.info) == (Frame(), None, {})
    assert bare.check_fits(fingerprint) == []


def test_ids_tell_rows_shapes_and_frames_apart():
    same = SoftPrompt(rows()).id
    assert SoftPrompt(rows().clone(), info={"seed": 1}, source="elsewhere").id == same
    others = [
        SoftPrompt(rows(1)),
        SoftPrompt(rows().reshape(8, 16)),
        SoftPrompt(rows(), Frame("after_bos")),
        SoftPrompt(rows(), Frame("user_start", "Please §.")),
    ]
    assert len({same, *(p.id for p in others)}) == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_folders_load_as_float32(tmp_path, dtype):
    folder = SoftPrompt(rows()).save(tmp_path / "p")
    (folder / SIDECAR).unlink()
    save_file({"prompt_embeddings": rows().to(dtype)}, folder / WEIGHTS)
    assert torch.equal(SoftPrompt.load(folder).embeddings, rows().to(dtype).float())


@pytest.mark.parametrize("value", [rows().double(), rows()[0], rows()[None], rows().to(torch.int8)])
def test_a_prompt_in_memory_is_checked_like_one_on_disk(value):
    with pytest.raises(ArtifactError, match="float32"):
        SoftPrompt(value)


def test_a_prompt_in_memory_is_finite():
    bad = rows()
    bad[1, 2] = float("inf")
    with pytest.raises(NonFiniteError, match="learning rate"):
        SoftPrompt(bad)


# --- fingerprints ----------------------------------------------------------------------------------------------------


def test_fingerprint_round_trip(fingerprint):
    again = Fingerprint.from_json(json.loads(json.dumps(fingerprint.to_json())))
    assert again == fingerprint
    assert fingerprint.differences(again) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.pop("hidden_size"),
        lambda v: v.update(hidden_size="wide"),
        lambda v: v.update(hidden_size=float("inf")),
        lambda v: v.update(vocab_size=None),
        lambda v: v.update(sketch=[1, 2]),
        lambda v: v.update(sketch={"a": ["x"]}),
        lambda v: v.update(sketch={"a": 3}),
        lambda v: v.update(sketch={"a": [10**400]}),
    ],
)
def test_a_malformed_fingerprint_is_an_artifact_error(fingerprint, change):
    value = fingerprint.to_json()
    change(value)
    with pytest.raises(ArtifactError, match="fingerprint"):
        Fingerprint.from_json(value)


@pytest.mark.parametrize("value", [None, [], "text", 3])
def test_a_fingerprint_of_another_type_is_an_artifact_error(value):
    with pytest.raises(ArtifactError, match="fingerprint"):
        Fingerprint.from_json(value)


def test_names_and_revisions_are_for_people(fingerprint):

    assert fingerprint.differences(replace(fingerprint, name="elsewhere", revision="abc")) == []


def test_a_sketch_that_shares_nothing_does_not_fit(fingerprint):

    assert fingerprint.differences(replace(fingerprint, sketch={}))
    assert replace(fingerprint, sketch={}).differences(fingerprint)


def test_a_parameter_on_one_side_only_does_not_fit(fingerprint):
    """A tied and an untied head, or a quantized copy: not the weights the prompt was trained on."""
    name = next(n for n in fingerprint.sketch if n != "input embedding")
    fewer = replace(fingerprint, sketch={n: v for n, v in fingerprint.sketch.items() if n != name})
    for a, b in ((fingerprint, fewer), (fewer, fingerprint)):
        (difference,) = a.differences(b)
        assert "1 exist on one side only" in difference
        assert name in difference


def test_nan_in_a_sketch_does_not_fit(fingerprint):

    name = next(iter(fingerprint.sketch))
    sketch = {**fingerprint.sketch, name: (float("nan"),) * len(fingerprint.sketch[name])}
    assert replace(fingerprint, sketch=sketch).differences(fingerprint)
    assert fingerprint.differences(replace(fingerprint, sketch=sketch))


def test_force_lets_differences_pass_but_never_the_width(fingerprint):

    other = replace(fingerprint, tokenizer_sha256="0" * 64, name="other")
    prompt = SoftPrompt(rows(), fingerprint=fingerprint)
    with pytest.raises(BaseModelMismatch, match="force=true"):
        prompt.check_fits(other)
    assert [d.split(":")[0] for d in prompt.check_fits(other, force=True)] == ["tokenizer"]
    with pytest.raises(BaseModelMismatch, match=r"width 16.*hidden size 32"):
        SoftPrompt(rows(d=16)).check_fits(fingerprint, force=True)
