"""A translator as files: a standard PEFT LoRA folder plus ``translator.json``.

Delete ``translator.json`` and a working PEFT adapter is left. Everything read is untrusted: JSON and safetensors only, and
nothing of it reaches PEFT but numbers and names that were checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm_eval_softverb import storage
from lm_eval_softverb.errors import ArtifactError, BaseModelMismatch, NonFiniteError
from lm_eval_softverb.prompt import ADAPTER_CONFIG, WEIGHTS, Fingerprint
from lm_eval_softverb.verbalizers import KINDS, Kind
from lm_eval_softverb.verbalizers.translator_config import Between
from lm_eval_softverb.verbalizers.translator_heads import reads

SIDECAR = "translator.json"
SCHEMA = 1
MAX_RANK = 1024
SHIPPED = Path(__file__).with_name("translators")
"""One folder per translator that comes with the package."""
# Entries of adapter_config.json that would change what the weights mean; absent or empty in what we write.
_FOREIGN = (
    *("modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform", "exclude_modules", "layer_replication"),
    *("use_dora", "use_rslora", "lora_bias", "auto_mapping", "trainable_token_indices", "target_parameters"),
)


@dataclass(frozen=True, eq=False)
class TranslatorAdapter:
    """LoRA weights and what they need.

    Attributes:
        tensors: float32, by PEFT's names.
        targets: names of the adapted modules, or the ends of their names.
        fingerprint: the base model they were trained on.
        kind: what they were trained to say.
        between: what stands between a prompt's vectors and its text.
        info: how they were made (settings, losses, prompts, data hash, versions); free-form JSON.
        source: folder they were read from, for messages.
    """

    tensors: Mapping[str, Tensor] = field(repr=False)
    rank: int
    alpha: int
    targets: tuple[str, ...]
    fingerprint: Fingerprint
    kind: Kind
    between: Between
    info: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    @cached_property
    def id(self) -> str:
        """``tr-`` and a hash of all that decides a text."""
        values = {name: storage.sha256_bytes(t.contiguous().numpy().tobytes()) for name, t in self.tensors.items()}
        return f"tr-{storage.sha256_json([values, self.alpha, asdict(self.between), self.targets, *self._reads])[:16]}"

    @property
    def _reads(self) -> list[str]:
        return [reads(self.kind)] if self.between.answers else []

    def save(self, folder: Path) -> Path:
        """Writes the PEFT folder and, last, ``translator.json``, so that its presence means complete."""
        storage.require_writable(folder)
        storage.write_tensors(folder / WEIGHTS, self.tensors)
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.fingerprint.name,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "target_modules": list(self.targets),
            "fan_in_fan_out": transposed(self.targets),
            "bias": "none",
            "inference_mode": True,
        }
        storage.write_json(folder / ADAPTER_CONFIG, config)
        sidecar = {
            "schema": SCHEMA,
            "id": self.id,
            "sha256": storage.sha256_file(folder / WEIGHTS),
            "kind": self.kind,
            **asdict(self.between),
            "reads": self._reads,
            "fingerprint": self.fingerprint.to_json(),
            "info": dict(self.info),
        }
        storage.write_json(folder / SIDECAR, sidecar)
        return folder

    @classmethod
    def load(cls, folder: Path | str) -> TranslatorAdapter:
        """Reads a folder of :meth:`save`, or the shipped translator of that name.

        Raises:
            ArtifactError: anything about the files that does not fit; the message names the file.
        """
        path, known = Path(folder).expanduser(), shipped()
        if not path.exists() and str(folder) in known:
            path = SHIPPED / str(folder)
        if not (path / SIDECAR).exists():
            raise ArtifactError(
                f"{path} is no translator: {SIDECAR} is missing (it is written last, so training is not finished). "
                "Pass the folder that `softverb translate train` wrote, or the name of a shipped translator (there are "
                f"{', '.join(known) or 'none'})."
            )
        rank, alpha, targets = _lora_config(path / ADAPTER_CONFIG)
        sidecar = storage.read_json(path / SIDECAR)
        if not isinstance(sidecar, dict) or sidecar.get("schema") != SCHEMA:
            got = sidecar.get("schema") if isinstance(sidecar, dict) else type(sidecar).__name__
            raise ArtifactError(f"{path / SIDECAR} has schema {got!r}, this version reads {SCHEMA}.")
        tensors = _read(path / WEIGHTS, rank)
        if sidecar.get("sha256") != (actual := storage.sha256_file(path / WEIGHTS)):
            raise ArtifactError(
                f"{path / WEIGHTS} is not the file {SIDECAR} was written for: SHA-256 {actual[:12]}…, expected "
                f"{str(sidecar.get('sha256'))[:12]}…. Restore the tensors, or train again."
            )
        kind, info = sidecar.get("kind"), sidecar.get("info")
        between: dict[str, Any] = {key: sidecar.get(key) for key in asdict(Between())}
        fits = all(type(between[key]) is type(default) for key, default in asdict(Between()).items())
        if kind not in KINDS or not fits or not isinstance(info, dict):
            raise ArtifactError(f"{path / SIDECAR} has kind {kind!r}, {between}, info {type(info).__name__}; train again.")
        fingerprint = Fingerprint.from_json(sidecar.get("fingerprint"))
        found = cls(tensors, rank, alpha, targets, fingerprint, kind, Between(**between), info, str(path))
        if sidecar.get("reads", []) != found._reads:
            raise ArtifactError(
                f"{path / SIDECAR} is of a translator that reads its prompts' answers drawn or shown in another way than this "
                "version does it. Train again, or use the version it was made with."
            )
        return found

    def check_fits(self, model: Fingerprint, *, force: bool = False) -> list[str]:
        """Compares the base model these weights were trained on with the one in use.

        Returns:
            The differences that ``force`` let pass; empty when everything fits.

        Raises:
            BaseModelMismatch: a difference, unless ``force``. Another width is never let pass.
        """
        found, own = self.fingerprint.differences(model), self.fingerprint
        if own.hidden_size != model.hidden_size or (found and not force):
            raise BaseModelMismatch(
                f"Translator {self.source or self.id} was trained on '{own.name}', which is not the model in use, "
                f"'{model.name}': {'; '.join(found).replace('prompt', 'translator')}. Load the right model, train a translator "
                "for this one, or pass force_adapter=true where only the width is the same (the texts will say so)."
            )
        return found


def shipped() -> list[str]:
    """Names of the translators that come with the package."""
    return sorted(file.parent.name for file in SHIPPED.glob(f"*/{SIDECAR}"))


def _lora_config(file: Path) -> tuple[int, int, tuple[str, ...]]:
    """Rank, alpha and targets of ``adapter_config.json``; nothing in it can name code to run."""
    config = storage.read_json(file)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        got = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ArtifactError(f"{file} says peft_type {got!r}, expected LORA: a translator is a LoRA adapter.")
    if config.get("trust_remote_code"):
        raise ArtifactError(f"{file} asks for trust_remote_code. A translator needs no code; remove the entry.")
    foreign = [name for name in _FOREIGN if config.get(name)]
    if foreign or config.get("bias", "none") != "none":
        raise ArtifactError(f"{file} sets {', '.join(foreign) or 'bias'}, which no translator has. Train one again.")
    rank, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    if type(rank) is not int or not 1 <= rank <= MAX_RANK or type(alpha) is not int or alpha < 1:
        raise ArtifactError(f"{file} says r {rank!r} and lora_alpha {alpha!r}, expected whole numbers, r at most {MAX_RANK}.")
    if not isinstance(targets, list) or not targets or not all(isinstance(t, str) for t in targets):
        raise ArtifactError(f"{file} says target_modules {str(targets)[:80]!r}, expected a list of names.")
    names = tuple(sorted(targets))
    if config.get("fan_in_fan_out", False) is not transposed(names):
        raise ArtifactError(f"{file} says fan_in_fan_out {config.get('fan_in_fan_out')!r}, which its targets contradict.")
    return rank, alpha, names


def transposed(targets: tuple[str, ...]) -> bool:
    """Whether the adapted modules keep their weights as [in, out], as GPT-2's do."""
    return any(name.endswith("c_attn") for name in targets)


def _read(path: Path, rank: int) -> dict[str, Tensor]:
    """All matrices of a safetensors file as float32, checked before copying: one side of each is the rank."""
    from safetensors import SafetensorError, safe_open

    found = {}
    try:
        with safe_open(str(path), framework="pt") as f:
            for name in f.keys():  # noqa: SIM118  (not a dict)
                view = f.get_slice(name)
                shape, dtype = list(view.get_shape()), view.get_dtype()
                side = 0 if name.endswith(".lora_A.weight") else 1 if name.endswith(".lora_B.weight") else None
                if side is None or len(shape) != 2 or shape[side] != rank or dtype not in ("F32", "F16", "BF16"):
                    raise ArtifactError(f"{path}: '{name}' is {dtype} {shape}, expected LoRA matrices of rank {rank}.")
                found[name] = f.get_tensor(name).float().contiguous()
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing.") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{path} is not a readable safetensors file ({error}). It may be truncated.") from error
    if bad := [name for name, t in found.items() if not bool(torch.isfinite(t).all())]:
        raise NonFiniteError(f"{path}: {len(bad)} tensors hold NaN or infinity, first '{bad[0]}'. Train again.")
    return found
