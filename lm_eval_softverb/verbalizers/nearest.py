"""The naive baseline: each virtual token is read as the real token whose input embedding is nearest to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.errors import ConfigError, did_you_mean
from lm_eval_softverb.prompt import SoftPrompt
from lm_eval_softverb.verbalizers import Kind
from lm_eval_softverb.verbalizers.base import Verbalization

DISTANCES = ("cosine", "euclidean")
CHUNK = 1 << 24  # float32 values at a time, of the embedding matrix and of the scores: 64 MiB each
ROUNDING = 2e-6  # scores closer than this part of the best one are equal


@dataclass(frozen=True)
class Nearest:
    """Nearest tokens, decoded together; both kinds get the same text.

    A prompt of n rows gives n tokens whatever ``max_new_tokens`` is: the text is a projection, nothing is generated, and
    nothing is cut. Special tokens and padded rows of the embedding matrix are never chosen. The confidence is the mean
    cosine similarity of the rows to their tokens, clipped to [0, 1], for both distances.

    Attributes:
        distance: ``cosine`` or ``euclidean``.
    """

    method: ClassVar[str] = "nearest"

    distance: str = "cosine"

    def __post_init__(self) -> None:
        _check(self.distance)

    def verbalize(
        self, backbone: Backbone, prompts: Sequence[SoftPrompt], *, kind: Kind, max_new_tokens: int
    ) -> list[list[Verbalization]]:
        """One text per prompt."""
        if not prompts:
            return []
        rows = torch.cat([p.embeddings for p in prompts]).to(backbone.device)  # not stacked in the model's dtype: float32
        ids, distances = nearest_ids(backbone, rows, self.distance)
        similarity = functional.cosine_similarity(rows, _embeddings(backbone, ids), dim=-1)
        parts = zip(*(values.cpu().split([p.n for p in prompts]) for values in (ids, distances, similarity)), strict=True)
        return [[self._verbalization(backbone, *part)] for part in parts]

    def _verbalization(self, backbone: Backbone, ids: Tensor, distances: Tensor, similarity: Tensor) -> Verbalization:
        chosen = ids.tolist()
        return Verbalization(
            str(backbone.tokenizer.decode(chosen, clean_up_tokenization_spaces=False)).strip(),
            float(similarity.mean().clamp(0.0, 1.0)),
            {
                "distance": self.distance,
                "tokens": backbone.tokenizer.convert_ids_to_tokens(chosen),
                "mean_distance": float(distances.mean()),
            },
        )


@torch.no_grad()
def nearest_ids(backbone: Backbone, rows: Tensor, distance: str = "cosine") -> tuple[Tensor, Tensor]:
    """The token whose input embedding is nearest to each of ``rows`` [n, d], and how far it is.

    Computed in float32, a part of the vocabulary at a time. Ids the tokenizer does not know (rows a matrix is padded with)
    and special tokens are left out. Of equally near tokens the smallest id is taken; distances that differ by rounding
    only are equal, so that nothing depends on which rows are worked on together.

    Returns:
        ids [n] and distances [n]: 1 - cosine similarity, in [0, 2], or the Euclidean distance.

    Raises:
        ConfigError: an unknown distance, or rows of another width than the model's.
    """
    _check(distance)
    if rows.dim() != 2 or rows.shape[1] != backbone.hidden_size:
        raise ConfigError(
            f"Rows of shape {list(rows.shape)} cannot be compared with the tokens of {backbone.name}, expected "
            f"[n, {backbone.hidden_size}]. Pass rows of a prompt that was made for this model."
        )
    rows = rows.to(backbone.device, torch.float32)
    directions = functional.normalize(rows, dim=-1)
    known = text_ids(backbone)
    best = torch.full_like(rows[:, 0], -torch.inf)
    ids = torch.zeros_like(best, dtype=torch.long)
    for part in known.split(max(1, CHUNK // max(rows.shape))):
        tokens = _embeddings(backbone, part)
        if distance == "cosine":
            scores = directions @ functional.normalize(tokens, dim=-1).T
        else:  # |r - e|^2 = |r|^2 - 2 (r e - |e|^2 / 2); without |r|^2, the same for all e, far-away rows lose no digits
            scores = rows @ tokens.T - tokens.square().sum(-1) / 2
        top = scores.amax(-1)
        slack = ROUNDING * top.abs()
        first = (scores >= (top - slack)[:, None]).int().argmax(-1)
        better = top > best + slack
        best, ids = torch.where(better, top, best), torch.where(better, part[first], ids)
    chosen = _embeddings(backbone, ids)
    if distance == "cosine":
        return ids, (1 - functional.cosine_similarity(rows, chosen, dim=-1)).clamp(min=0)
    return ids, (rows - chosen).norm(dim=-1)


def text_ids(backbone: Backbone) -> Tensor:
    """Ascending ids [K] of all tokens that stand for text: known to the tokenizer, with an embedding, not special."""
    known = set(backbone.tokenizer.get_vocab().values()) - special_ids(backbone)
    return torch.tensor(sorted(i for i in known if i < backbone.vocab_size), device=backbone.device)


def special_ids(backbone: Backbone) -> frozenset[int]:
    """Ids of all tokens that steer a model rather than stand for text, reserved ones too."""
    tokenizer = backbone.tokenizer
    added = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset(tokenizer.all_special_ids).union(added)


def _embeddings(backbone: Backbone, ids: Tensor) -> Tensor:
    """What the model reads for ``ids`` [K], float32 [K, d]: some models scale inside the module, so not its weight."""
    with torch.no_grad():
        return backbone.embedding(ids).float()  # type: ignore[no-any-return]


def _check(distance: str) -> None:
    if distance not in DISTANCES:
        raise ConfigError(f"Unknown distance {distance!r}. {did_you_mean(str(distance), list(DISTANCES))}")
