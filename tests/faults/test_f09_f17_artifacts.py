"""F09 to F17: a prompt that is damaged, foreign or hostile is refused by name, before anything of it is used."""

from __future__ import annotations

import json
import pickle  # noqa: TID251  (the attack itself)
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lm_eval_softverb.errors import ArtifactError, BaseModelMismatch, NonFiniteError
from lm_eval_softverb.prompt import ADAPTER_CONFIG, SIDECAR, WEIGHTS, SoftPrompt


@pytest.fixture
def folder(tmp_path):
    """A good prompt of four virtual tokens."""
    return SoftPrompt(torch.randn(4, 32, generator=torch.Generator().manual_seed(0))).save(tmp_path / "p")


def refused(folder, words=None, error=ArtifactError):
    """The load fails with one line that names the folder; nothing else happens."""
    with pytest.raises(error, match=words) as caught:
        SoftPrompt.load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def tensor_only(folder, tensor, name="prompt_embeddings", **config):
    """The folder as PEFT would have written it for ``tensor``, without our file."""
    (folder / SIDECAR).unlink(missing_ok=True)
    save_file({name: tensor}, folder / WEIGHTS)
    edit(folder, num_virtual_tokens=max(1, len(tensor) if tensor.dim() else 1), **config)


def edit(folder, **changes):
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config | changes))


def test_f09_to_f17_positive_control_the_good_prompt_loads(folder):
    assert SoftPrompt.load(folder).n == 4
    tensor_only(folder, torch.randn(4, 32))
    assert SoftPrompt.load(folder).n == 4


# --- F09 damaged tensors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:4],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data + b"more",
        lambda data: bytes(range(256)) * 40,
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"[" * (len(data) - 8),
        lambda data: pickle.dumps({"prompt_embeddings": [1.0]}),
    ],
    ids=["empty", "four-bytes", "half", "one-short", "longer", "noise", "huge-header", "no-json-header", "pickle"],
)
@pytest.mark.parametrize("with_sidecar", [True, False])
def test_f09_damaged_tensor_files(folder, damage, with_sidecar):
    if not with_sidecar:
        (folder / SIDECAR).unlink()
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(damage(data))
    refused(folder)


@pytest.mark.parametrize("file", [ADAPTER_CONFIG, SIDECAR])
@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b"3", b'{"peft_type": '])
def test_f09_damaged_json_files(folder, file, content):
    (folder / file).write_bytes(content)
    refused(folder)


@pytest.mark.parametrize("file", [ADAPTER_CONFIG, WEIGHTS])
def test_f09_missing_files(folder, file):
    (folder / file).unlink()
    refused(folder, file.replace(".", r"\."))


def test_f09_an_empty_folder_and_no_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty")
    refused(tmp_path / "nowhere", "no folder")


def test_f09_a_tensor_of_another_name(folder):
    tensor_only(folder, torch.randn(4, 32), name="lora_A")
    refused(folder, "lora_A.*prompt_embeddings")


# --- F10, F11 numbers and shapes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_f10_not_finite(folder, value, dtype):
    rows = torch.randn(4, 32)
    rows[2, 5] = value
    tensor_only(folder, rows.to(dtype))
    refused(folder, "1 of 128 values", NonFiniteError)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.zeros(4, 32, dtype=torch.int8), "I8, expected F32"),
        (torch.zeros(4, 32, dtype=torch.float64), "F64, expected F32"),
        (torch.zeros(4, 32, dtype=torch.bool), "BOOL, expected F32"),
        (torch.randn(32), "1 dimensions"),
        (torch.randn(1, 4, 32), "3 dimensions"),
        (torch.tensor(1.0), "0 dimensions"),
        (torch.zeros(0, 32), "empty"),
        (torch.zeros(4, 0), "empty"),
    ],
    ids=["int8", "float64", "bool", "1-D", "3-D", "0-D", "no-tokens", "no-width"],
)
def test_f11_wrong_dtype_rank_or_no_tokens(folder, tensor, words):
    tensor_only(folder, tensor)
    refused(folder, words)


@pytest.mark.parametrize(
    ("claimed", "submodules", "words"),
    [(5, 1, "4 rows, but .* says 5"), (4, 2, "says 8"), (2, 2, None), (0, 1, "num_virtual_tokens 0"), (-4, 1, "-4")],
)
def test_f11_rows_that_the_config_does_not_claim(folder, claimed, submodules, words):
    tensor_only(folder, torch.randn(4, 32))
    edit(folder, num_virtual_tokens=claimed, num_transformer_submodules=submodules)
    if words is None:  # an encoder-decoder's file: twice the rows, the first half is read
        assert SoftPrompt.load(folder).n == 2
    else:
        refused(folder, words)


@pytest.mark.parametrize("claimed", [None, "4", 4.0, True, [4], 10**30])
def test_f11_a_number_of_tokens_that_is_none(folder, claimed):
    edit(folder, num_virtual_tokens=claimed)
    refused(folder)


# --- F12 to F15 the wrong model --------------------------------------------------------------------------------------


@pytest.fixture
def trained(backbone, tmp_path):
    """A prompt that remembers the model it was trained on."""
    b = backbone("llama")
    return str(SoftPrompt(torch.randn(4, 32), fingerprint=b.fingerprint).save(tmp_path / "trained"))


def test_f12_wrong_hidden_size(ours, tmp_path):
    narrow = str(SoftPrompt(torch.randn(4, 16)).save(tmp_path / "narrow"))
    for force in (False, True):
        with pytest.raises(BaseModelMismatch, match=r"width 16.*hidden size 32"):
            ours("llama", peft=narrow, force=force)


def test_f13_wrong_weights_of_the_same_size(tiny, trained):
    from lm_eval_softverb.models.softprompt import SoftPromptLM

    other = tiny("llama", seed=7)
    with pytest.raises(BaseModelMismatch, match=r"weights: .*force=true"):
        SoftPromptLM(pretrained=other, peft=trained)
    lm = SoftPromptLM(pretrained=other, peft=trained, force=True)
    (differences,) = json.loads(json.dumps(lm.get_model_info()["softprompt"]["forced_despite"])).values()
    assert any(d.startswith("weights") for d in differences)


def test_f13_an_edited_sidecar(ours, trained):
    sidecar = json.loads((Path(trained) / SIDECAR).read_text())
    sidecar["fingerprint"]["sketch"]["input embedding"][3] += 0.5
    (Path(trained) / SIDECAR).write_text(json.dumps(sidecar))
    with pytest.raises(BaseModelMismatch, match=r"1 of \d+ sampled parameters"):
        ours("llama", peft=trained)


def test_f13_positive_control_the_right_model_in_any_dtype(ours, trained):
    for dtype in ("float32", "bfloat16", "float16"):
        assert ours("llama", peft=trained, dtype=dtype).overrides == {}


def test_f14_tokenizer_changed(tiny, trained, tmp_path):
    import shutil

    from transformers import AutoTokenizer

    from lm_eval_softverb.models.softprompt import SoftPromptLM

    folder = shutil.copytree(tiny("llama"), tmp_path / "other-tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["softverb"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(BaseModelMismatch, match="tokenizer: prompt"):
        SoftPromptLM(pretrained=str(folder), peft=trained)


def test_f15_swapped_tensor(folder, tmp_path):
    other = SoftPrompt(torch.randn(4, 32)).save(tmp_path / "other")
    (folder / WEIGHTS).write_bytes((other / WEIGHTS).read_bytes())
    message = refused(folder, "SHA-256")
    assert f"delete {SIDECAR}" in message
    (folder / SIDECAR).unlink()
    assert SoftPrompt.load(folder).id == SoftPrompt.load(other).id


@pytest.mark.parametrize("hash_", [None, "", 3, ["x"]])
def test_f15_no_hash_is_no_proof(folder, hash_):
    sidecar = json.loads((folder / SIDECAR).read_text())
    (folder / SIDECAR).write_text(json.dumps(sidecar | {"sha256": hash_}))
    refused(folder, "SHA-256")


# --- F16, F17 hostile files ------------------------------------------------------------------------------------------


class Exploit:
    """Unpickling it makes the folder ``canary``."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "prompt.pkl", "model.ckpt", WEIGHTS])
def test_f16_pickles_are_never_opened(folder, name, tmp_path):
    canary = tmp_path / "canary"
    (folder / WEIGHTS).unlink()
    torch.save({"prompt_embeddings": Exploit(canary)}, folder / name)
    message = refused(folder)
    assert not canary.exists()
    assert name == WEIGHTS or (name in message and "never opened" in message)


def test_f16_positive_control_the_exploit_works_where_it_is_opened(tmp_path):
    pickle.loads(pickle.dumps(Exploit(tmp_path / "canary")))
    assert (tmp_path / "canary").is_dir()


def test_f16_a_pickle_beside_good_tensors_is_ignored(folder, tmp_path):
    canary = tmp_path / "canary"
    torch.save(Exploit(canary), folder / "adapter_model.bin")
    assert SoftPrompt.load(folder).n == 4
    assert not canary.exists()


@pytest.mark.parametrize("kind", ["LORA", "PREFIX_TUNING", "IA3", "prompt_tuning", None, 3, ["PROMPT_TUNING"], {}])
def test_f17_another_kind_of_adapter(folder, kind):
    edit(folder, peft_type=kind)
    refused(folder, r"peft_type.*PROMPT_TUNING, P_TUNING.*hf,peft=")


def test_f17_remote_code(folder, tmp_path):
    canary = tmp_path / "canary"
    (folder / "code.py").write_text(f"import os; os.mkdir({str(canary)!r})")
    edit(folder, trust_remote_code=True, auto_mapping={"base_model_class": "X", "parent_library": "code"})
    refused(folder, "trust_remote_code")
    assert not canary.exists()


def test_f17_names_of_code_in_the_config_are_not_imported(folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    (folder / "hostile_module.py").write_text(f"import os; os.mkdir({str(tmp_path / 'canary')!r})")
    edit(folder, auto_mapping={"base_model_class": "X", "parent_library": "hostile_module"}, tokenizer_name_or_path="x/y")
    assert SoftPrompt.load(folder).n == 4
    assert "hostile_module" not in sys.modules
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("file", [ADAPTER_CONFIG, SIDECAR])
def test_f17_huge_json_is_not_read(folder, file, monkeypatch):
    with (folder / file).open("wb") as f:
        f.truncate(64 << 20)
    read = Path.read_bytes

    def guarded(path):
        assert path.name != file, "the huge file was read"
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", guarded)
    refused(folder, "67,108,864 bytes; at most 1,048,576")


@pytest.mark.parametrize("file", [ADAPTER_CONFIG, SIDECAR])
def test_f17_json_that_is_no_utf8(folder, file):
    (folder / file).write_bytes((folder / file).read_bytes().replace(b'"', b'"\xff', 1))
    refused(folder, "UTF-8")


@pytest.mark.parametrize("file", [ADAPTER_CONFIG, SIDECAR])
def test_f17_json_nested_or_numbered_beyond_reason(folder, file):
    for content in (b"[" * 200_000, b'{"a":' * 100_000, b'{"n": ' + b"9" * 10_000 + b"}"):
        (folder / file).write_bytes(content)
        refused(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"schema": None},
        {"frame": None},
        {"frame": {"placement": "above"}},
        {"frame": {"placement": "prefix", "text": "words §"}},
        {"fingerprint": 3},
        {"fingerprint": {}},
        {"info": ["not", "an", "object"]},
    ],
    ids=str,
)
def test_f17_a_sidecar_of_another_shape(folder, change):
    sidecar = json.loads((folder / SIDECAR).read_text())
    (folder / SIDECAR).write_text(json.dumps(sidecar | change))
    with pytest.raises(ArtifactError):
        SoftPrompt.load(folder)


def test_f17_a_name_in_the_config_reaches_no_network_and_no_message_as_code(folder):
    edit(folder, base_model_name_or_path="{{ 1/0 }}; rm -rf /", revision="x")
    assert SoftPrompt.load(folder).n == 4
