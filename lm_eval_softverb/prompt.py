"""Soft prompts as files: a standard PEFT prompt-tuning folder plus ``softprompt.json``.

Delete ``softprompt.json`` and a working PEFT adapter is left; add nothing and any prompt-tuning or p-tuning folder made by
PEFT loads. Everything read here is untrusted: safetensors and JSON only, checked before use, no code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_softverb import storage
from lm_eval_softverb.errors import ArtifactError, BaseModelMismatch, ModelUnavailable, NonFiniteError
from lm_eval_softverb.frame import Frame

if TYPE_CHECKING:
    import torch

SCHEMA = 1
SIDECAR = "softprompt.json"
ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# Both store finished rows [n, d]; p-tuning's encoder is folded into them when PEFT saves.
PEFT_TYPES = ("PROMPT_TUNING", "P_TUNING")


@dataclass(frozen=True)
class Fingerprint:
    """What a soft prompt depends on: one exact set of base weights and one tokenizer.

    Attributes:
        name: hub id, folder name or alias of the base model; for people, not compared.
        revision: hub revision or None; not compared.
        hidden_size: width d of the input embedding.
        vocab_size: rows of the input embedding.
        sketch: values of fixed entries of the weights by parameter name, float32. Compared with a tolerance of 2^-8, the
            rounding of bfloat16: equal for every dtype a model is loaded in, different for other weights of the same width
            (also for a dequantized copy).
        tokenizer_sha256: hash of the vocabulary and of the ids of fixed probe texts.
    """

    name: str
    revision: str | None
    hidden_size: int
    vocab_size: int
    sketch: Mapping[str, tuple[float, ...]] = field(repr=False)
    tokenizer_sha256: str

    def differences(self, other: Fingerprint) -> list[str]:
        """Human-readable differences of ``other`` (the model in use) from this one; empty means they fit."""
        found = []
        if self.hidden_size != other.hidden_size:
            found.append(f"width: prompt {self.hidden_size}, model {other.hidden_size}")
        if self.vocab_size != other.vocab_size:
            found.append(f"embedding rows: prompt {self.vocab_size}, model {other.vocab_size}")
        common = [name for name in self.sketch if name in other.sketch]
        if alone := sorted(self.sketch.keys() ^ other.sketch.keys()):
            found.append(f"parameters: {len(alone)} exist on one side only (first: {alone[0]})")
        unequal = [name for name in common if not _close(self.sketch[name], other.sketch[name])]
        if unequal or not common:
            found.append(
                f"weights: {len(unequal)} of {len(common)} sampled parameters differ"
                + (f" (first: {unequal[0]})" if unequal else "")
            )
        if self.tokenizer_sha256 != other.tokenizer_sha256:
            found.append(f"tokenizer: prompt {self.tokenizer_sha256[:12]}, model {other.tokenizer_sha256[:12]}")
        return found

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "sketch": {name: list(values) for name, values in self.sketch.items()}}

    @classmethod
    def from_json(cls, value: Any) -> Fingerprint:
        try:
            return cls(
                name=str(value["name"]),
                revision=None if value["revision"] is None else str(value["revision"]),
                hidden_size=int(value["hidden_size"]),
                vocab_size=int(value["vocab_size"]),
                sketch={str(k): tuple(float(x) for x in v) for k, v in value["sketch"].items()},
                tokenizer_sha256=str(value["tokenizer_sha256"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise ArtifactError(f"The base-model fingerprint is malformed: {error!r}.") from error


def _close(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return len(a) == len(b) and all(abs(x - y) <= abs(x) / 256 + 1e-6 for x, y in zip(a, b, strict=True))


@dataclass(frozen=True, eq=False)
class SoftPrompt:
    """Vectors tuned in front of (or inside the text of) a frozen language model.

    Attributes:
        embeddings: float32 tensor [n, d], n virtual tokens.
        frame: where they stand.
        fingerprint: the base model they were trained on; None for folders made elsewhere.
        info: how it was made (seed, data hash, losses, versions, settings); free-form JSON.
        source: folder it was read from, for messages.
    """

    embeddings: torch.Tensor
    frame: Frame = Frame()  # noqa: RUF009  (frozen)
    fingerprint: Fingerprint | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    def __post_init__(self) -> None:
        import torch

        if self.embeddings.dim() != 2 or self.embeddings.dtype != torch.float32:
            raise ArtifactError(
                f"A soft prompt is a float32 tensor [n, d], got {self.embeddings.dtype} {list(self.embeddings.shape)}."
            )
        if not torch.isfinite(self.embeddings).all():
            raise NonFiniteError("The soft prompt holds NaN or infinite values; train again with a lower learning rate.")

    @property
    def n(self) -> int:
        """Number of virtual tokens."""
        return int(self.embeddings.shape[0])

    @property
    def hidden_size(self) -> int:
        return int(self.embeddings.shape[1])

    @cached_property
    def id(self) -> str:
        """``sp-`` and a hash of the rows and the frame; the same vectors in another frame are another prompt."""
        digest = hashlib.sha256(self.embeddings.detach().cpu().contiguous().numpy().tobytes())
        digest.update(storage.sha256_json([list(self.embeddings.shape), self.frame.to_json()]).encode())
        return f"sp-{digest.hexdigest()[:16]}"

    # --- files -------------------------------------------------------------------------------------------------------

    def save(self, folder: Path | str) -> Path:
        """Writes the PEFT folder and, last, ``softprompt.json``, so that its presence means complete."""
        folder = Path(folder)
        storage.require_writable(folder)
        storage.write_tensors(folder / WEIGHTS, {"prompt_embeddings": self.embeddings})
        storage.write_json(
            folder / ADAPTER_CONFIG,
            {
                "peft_type": "PROMPT_TUNING",
                "task_type": self.info.get("task_type", "CAUSAL_LM"),
                "base_model_name_or_path": self.fingerprint.name if self.fingerprint else None,
                "num_virtual_tokens": self.n,
                "token_dim": self.hidden_size,
                "num_transformer_submodules": 1,
                "prompt_tuning_init": "RANDOM",
                "inference_mode": True,
            },
        )
        storage.write_json(
            folder / SIDECAR,
            {
                "schema": SCHEMA,
                "id": self.id,
                "sha256": storage.sha256_file(folder / WEIGHTS),
                "frame": self.frame.to_json(),
                "fingerprint": self.fingerprint.to_json() if self.fingerprint else None,
                "info": dict(self.info),
            },
        )
        return folder

    @classmethod
    def load(cls, folder: Path | str, revision: str | None = None) -> SoftPrompt:
        """Reads a folder written by us or by PEFT, or a hub repository of one.

        Raises:
            ArtifactError: anything about the files that does not fit; the message names the file.
        """
        path = Path(folder).expanduser()
        if not path.is_dir():
            path = _from_hub(str(folder), revision)
        config = _adapter_config(path)
        weights = path / WEIGHTS
        if not weights.exists():
            pickles = sorted(p.name for p in path.iterdir() if p.suffix in storage.PICKLE_SUFFIXES)
            raise ArtifactError(
                f"{path} has no {WEIGHTS}"
                + (f", only {', '.join(pickles)}: such files can run code and are never opened. " if pickles else ". ")
                + "Save the adapter again with `model.save_pretrained(folder)` (safetensors is PEFT's default)."
            )
        embeddings = storage.read_embeddings(weights)
        expected = config["num_virtual_tokens"] * config["num_transformer_submodules"]
        if embeddings.shape[0] != expected:
            raise ArtifactError(
                f"{weights} has {embeddings.shape[0]} rows, but {ADAPTER_CONFIG} says {expected} "
                f"({config['num_virtual_tokens']} virtual tokens x {config['num_transformer_submodules']} submodules)."
            )
        # PEFT gives encoder-decoder prompts twice the rows and reads only the first half (before the encoder's input).
        embeddings = embeddings[: config["num_virtual_tokens"]].contiguous()
        if not (path / SIDECAR).exists():
            return cls(embeddings, source=str(path))
        sidecar = storage.read_json(path / SIDECAR)
        if not isinstance(sidecar, dict) or sidecar.get("schema") != SCHEMA:
            got = sidecar.get("schema") if isinstance(sidecar, dict) else type(sidecar).__name__
            raise ArtifactError(f"{path / SIDECAR} has schema {got!r}, this version reads {SCHEMA}.")
        actual = storage.sha256_file(weights)
        if sidecar.get("sha256") != actual:
            raise ArtifactError(
                f"{weights} is not the file {SIDECAR} was written for: SHA-256 {actual[:12]}…, expected "
                f"{str(sidecar.get('sha256'))[:12]}…. Restore the tensor, or delete {SIDECAR} to load it as a bare adapter."
            )
        fingerprint, info = sidecar.get("fingerprint"), sidecar.get("info", {})
        if not isinstance(info, dict):
            raise ArtifactError(f"{path / SIDECAR}: 'info' is {type(info).__name__}, expected an object.")
        return cls(
            embeddings,
            frame=Frame.from_json(sidecar.get("frame")),
            fingerprint=Fingerprint.from_json(fingerprint) if fingerprint is not None else None,
            info=info,
            source=str(path),
        )

    def check_fits(self, model: Fingerprint, *, force: bool = False) -> list[str]:
        """Compares this prompt with the base model in use.

        Returns:
            The differences that ``force`` let pass; empty when everything fits.

        Raises:
            BaseModelMismatch: a difference, unless ``force``. Another width is never let pass.
        """
        where = self.source or self.id
        if self.hidden_size != model.hidden_size:
            raise BaseModelMismatch(
                f"Soft prompt {where} has width {self.hidden_size}, but {model.name} has hidden size "
                f"{model.hidden_size}. It was made for another model."
            )
        differences = self.fingerprint.differences(model) if self.fingerprint else []
        if differences and not force:
            trained_on = self.fingerprint.name if self.fingerprint else "?"
            raise BaseModelMismatch(
                f"Soft prompt {where} was trained on '{trained_on}', which is not the model in use, '{model.name}': "
                f"{'; '.join(differences)}. Load the right model, or pass force=true to score it all the same "
                "(the results will say so)."
            )
        return differences


def _adapter_config(path: Path) -> dict[str, Any]:
    """The checked part of ``adapter_config.json``; nothing in it can name code to run."""
    file = path / ADAPTER_CONFIG
    config = storage.read_json(file)
    if not isinstance(config, dict):
        raise ArtifactError(f"{file} holds {type(config).__name__}, expected an object.")
    kind = config.get("peft_type")
    if kind not in PEFT_TYPES:
        raise ArtifactError(
            f"{file} says peft_type {kind!r}, expected one of {', '.join(PEFT_TYPES)}. "
            "Other adapters change the model itself; score them with `--model hf,peft=…`."
        )
    if config.get("trust_remote_code"):
        raise ArtifactError(f"{file} asks for trust_remote_code. A soft prompt needs no code; remove the entry.")
    n, submodules = config.get("num_virtual_tokens"), config.get("num_transformer_submodules") or 1
    if type(n) is not int or n < 1:
        raise ArtifactError(f"{file} says num_virtual_tokens {n!r}, expected a positive whole number.")
    if submodules not in (1, 2):
        raise ArtifactError(f"{file} says num_transformer_submodules {submodules!r}, expected 1 or 2.")
    return {"num_virtual_tokens": n, "num_transformer_submodules": submodules}


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except (HFValidationError, NotADirectoryError) as error:
        raise ArtifactError(f"There is no folder {name}, and it is no hub repository id either.") from error
    except OSError as error:
        raise ModelUnavailable(
            f"Soft prompt '{name}' is neither a folder nor reachable on the hub. Where there is a network, run "
            f"`hf download {name}` beforehand, or pass the folder of a prompt."
        ) from error
