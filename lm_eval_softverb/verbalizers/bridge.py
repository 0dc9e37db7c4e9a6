"""A linear bridge: soft prompts of one base model as vectors of another, for a translator of another width (section 5).

The map W [d1, d2] is a ridge regression of the second model's input embeddings on the first's, over the tokens that both
tokenizers have: argmin |E1 W - E2|^2 + r |W|^2. It is a guess about how vectors correspond, hence never used unasked.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm_eval_softverb import storage
from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.errors import ArtifactError, BaseModelMismatch, ConfigError
from lm_eval_softverb.prompt import Fingerprint, SoftPrompt
from lm_eval_softverb.verbalizers.nearest import text_ids

SCHEMA = 1
SIDECAR = "bridge.json"
TENSORS = "bridge.safetensors"
HELD_OUT = 0.1  # share of the common tokens that only measure the fit


@dataclass(frozen=True, eq=False)
class Bridge:
    """A map between the input embeddings of two base models.

    Attributes:
        weight: W, float32 [d1, d2].
        source, target: the models it leads from and to.
        info: common tokens, ridge, share of the variance explained on held-out tokens; free-form JSON.
        folder: where it was read from, for messages.
    """

    weight: Tensor
    source: Fingerprint
    target: Fingerprint
    info: Mapping[str, Any] = field(default_factory=dict)
    folder: str = ""

    @cached_property
    def id(self) -> str:
        """``br-`` and a hash of the map."""
        return f"br-{storage.sha256_bytes(self.weight.cpu().contiguous().numpy().tobytes())[:16]}"

    def cross(self, prompt: SoftPrompt) -> SoftPrompt:
        """The prompt as vectors [n, d2] of the target model.

        Raises:
            BaseModelMismatch: a prompt of another width than the source model's.
        """
        if prompt.hidden_size != self.weight.shape[0]:
            raise BaseModelMismatch(
                f"Bridge {self.folder or self.id} starts at '{self.source.name}' of width {self.weight.shape[0]}; soft prompt "
                f"{prompt.source or prompt.id} has width {prompt.hidden_size}. Fit a bridge from the prompt's own model."
            )
        rows = prompt.embeddings.cpu() @ self.weight
        return replace(prompt, embeddings=rows, fingerprint=self.target, info={"bridge": self.id, "prompt": prompt.id})

    def check_fits(self, model: Fingerprint, *, force: bool = False) -> list[str]:
        """Compares the model it leads to with the one in use.

        Returns:
            The differences that ``force`` let pass.

        Raises:
            BaseModelMismatch: a difference, unless ``force``. Another width is never let pass.
        """
        found = self.target.differences(model)
        if self.target.hidden_size != model.hidden_size or (found and not force):
            raise BaseModelMismatch(
                f"Bridge {self.folder or self.id} leads to '{self.target.name}', which is not the model in use, "
                f"'{model.name}': {'; '.join(found).replace('prompt', 'bridge')}. Fit one with --to {model.name}."
            )
        return found

    def save(self, folder: Path) -> Path:
        """Writes the map and, last, ``bridge.json``."""
        storage.require_writable(folder)
        storage.write_tensors(folder / TENSORS, {"weight": self.weight})
        value = {
            "schema": SCHEMA,
            "id": self.id,
            "sha256": storage.sha256_file(folder / TENSORS),
            "source": self.source.to_json(),
            "target": self.target.to_json(),
            "info": dict(self.info),
        }
        storage.write_json(folder / SIDECAR, value)
        return folder

    @classmethod
    def load(cls, folder: Path | str) -> Bridge:
        """Reads a folder of :meth:`save`.

        Raises:
            ArtifactError: anything about the files that does not fit.
        """
        path = Path(folder).expanduser()
        if not (path / SIDECAR).exists():
            raise ArtifactError(f"{path} is no bridge: {SIDECAR} is missing; `softverb translate bridge` writes one.")
        value = storage.read_json(path / SIDECAR)
        if not isinstance(value, dict) or value.get("schema") != SCHEMA or not isinstance(value.get("info"), dict):
            raise ArtifactError(f"{path / SIDECAR} is no description of a bridge of schema {SCHEMA}; fit it again.")
        weight = storage.read_embeddings(path / TENSORS, "weight")
        if value.get("sha256") != (actual := storage.sha256_file(path / TENSORS)):
            raise ArtifactError(
                f"{path / TENSORS} is not the file {SIDECAR} was written for: SHA-256 {actual[:12]}…, expected "
                f"{str(value.get('sha256'))[:12]}…. Fit the bridge again."
            )
        found = cls(
            weight,
            Fingerprint.from_json(value.get("source")),
            Fingerprint.from_json(value.get("target")),
            value["info"],
            str(path),
        )
        if list(weight.shape) != [found.source.hidden_size, found.target.hidden_size]:
            raise ArtifactError(
                f"{path / TENSORS}: the map is {list(weight.shape)}, expected "
                f"{[found.source.hidden_size, found.target.hidden_size]}, the widths of its models. Fit the bridge again."
            )
        return found


def fit_bridge(source: Backbone, target: Backbone, *, ridge: float = 1e-3, seed: int = 0) -> Bridge:
    """Fits the map on nine tenths of the common tokens, in float64, and measures it on the rest.

    Args:
        ridge: r, as a share of the mean squared size of a column of E1; 0 is least squares.
        seed: of the held-out tokens.

    Raises:
        ConfigError: a negative ridge, or too few common tokens.
    """
    if not ridge >= 0:
        raise ConfigError(f"ridge is {ridge}, expected 0 or more.")
    ids = common_ids(source, target)
    random.Random(seed).shuffle(ids)
    held = max(1, round(HELD_OUT * len(ids)))
    needed = source.hidden_size if ridge == 0 else 1
    if len(ids) - held < needed:
        raise ConfigError(
            f"{source.name} and {target.name} have {len(ids)} text tokens in common, expected at least {needed + held} "
            f"for width {source.hidden_size} and ridge {ridge}. Use models with more alike tokenizers, or a larger ridge."
        )
    first, second = (_rows(b, [pair[side] for pair in ids]) for side, b in enumerate((source, target)))
    x, y = first[held:], second[held:]
    gram = x.T @ x
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram, x.T @ y) if ridge else torch.linalg.lstsq(x, y, driver="gelsd").solution
    unexplained = (first[:held] @ weight - second[:held]).square().sum() / second[:held].square().sum()
    info = {
        "common_tokens": len(ids),
        "held_out_tokens": held,
        "ridge": ridge,
        "seed": seed,
        "held_out_explained": 1 - float(unexplained),
    }
    return Bridge(weight.float(), source.fingerprint, target.fingerprint, info)


def common_ids(source: Backbone, target: Backbone) -> list[tuple[int, int]]:
    """Ids in both vocabularies of the text tokens that both have; a leading blank is one thing in all tokenizers."""
    first, second = _tokens(source), _tokens(target)
    return [(first[token], second[token]) for token in sorted(first.keys() & second.keys())]


def _tokens(backbone: Backbone) -> dict[str, int]:
    ids = text_ids(backbone).tolist()
    tokens = backbone.tokenizer.convert_ids_to_tokens(ids)
    return {str(t).replace("▁", "Ġ"): i for t, i in zip(tokens, ids, strict=True)}


def _rows(backbone: Backbone, ids: list[int]) -> Tensor:
    with torch.no_grad():  # through the module: some models scale there
        return backbone.embedding(torch.tensor(ids, device=backbone.device)).double().cpu()  # type: ignore[no-any-return]
