"""Nearest tokens: against plain loops, on real tokens, and what must never be chosen."""

from __future__ import annotations

import math

import pytest
import torch
from toys import KINDS, SPECIAL, hard_rows

from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.errors import ConfigError
from lm_eval_softverb.prompt import SoftPrompt
from lm_eval_softverb.verbalizers import nearest
from lm_eval_softverb.verbalizers.base import create, settings_of
from lm_eval_softverb.verbalizers.nearest import DISTANCES, Nearest, nearest_ids, text_ids

TEXT = "The film is a joy"


def random_rows(n: int = 6, seed: int = 0, scale: float = 0.5) -> torch.Tensor:
    return torch.randn(n, 32, generator=torch.Generator().manual_seed(seed)) * scale


def plain_nearest(backbone: Backbone, row: list[float], distance: str) -> tuple[int, float]:
    """One row against one token at a time, in double precision."""
    known = set(backbone.tokenizer.get_vocab().values()) - {backbone.tokenizer.convert_tokens_to_ids(s) for s in SPECIAL}

    def away(token: int) -> float:
        e = backbone.embedding(torch.tensor(token)).double().tolist()
        if distance == "euclidean":
            return math.dist(row, e)
        return 1 - sum(a * b for a, b in zip(row, e, strict=True)) / (math.hypot(*row) * math.hypot(*e))

    return min(((t, away(t)) for t in sorted(known)), key=lambda pair: pair[1])


def verbalize(backbone, prompts, **settings):
    return Nearest(**settings).verbalize(backbone, prompts, kind="labels", max_new_tokens=1)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("name", [*KINDS, "llama_padded", "t5"])
def test_same_as_plain_loops(backbone, name, distance):
    b, rows = backbone(name), random_rows()
    ids, distances = nearest_ids(b, rows, distance)
    expected = [plain_nearest(b, row, distance) for row in rows.double().tolist()]
    assert ids.tolist() == [token for token, _ in expected]
    torch.testing.assert_close(distances, torch.tensor([far for _, far in expected]), rtol=1e-4, atol=1e-5)


def test_the_two_distances_differ(backbone):
    rows = random_rows(20)
    assert (
        nearest_ids(backbone("llama"), rows, "cosine")[0].tolist()
        != nearest_ids(backbone("llama"), rows, "euclidean")[0].tolist()
    )


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("name", KINDS)
def test_rows_of_real_tokens_give_their_text(backbone, name, distance):
    b = backbone(name)
    ids = b.tokenizer.encode(TEXT, add_special_tokens=False)
    [[found]] = verbalize(b, [SoftPrompt(hard_rows(b, ids))], distance=distance)
    assert found.text == TEXT
    assert found.confidence == pytest.approx(1.0)
    assert found.details["distance"] == distance
    assert found.details["tokens"] == b.tokenizer.convert_ids_to_tokens(ids)
    assert 0 <= found.details["mean_distance"] < 1e-6


def test_scaled_rows_keep_their_direction_but_not_their_place(backbone):
    b, rows = backbone("llama"), random_rows(20)
    cosine, euclidean = (nearest_ids(b, rows, d)[0].tolist() for d in DISTANCES)
    for scale in (1e-3, 0.3, 1e3):
        assert nearest_ids(b, rows * scale, "cosine")[0].tolist() == cosine
    assert nearest_ids(b, rows * 1e-3, "euclidean")[0].tolist() != euclidean


@pytest.mark.parametrize("distance", DISTANCES)
def test_padded_rows_and_special_tokens_are_never_chosen(backbone, distance):
    b = backbone("llama_padded")
    size = len(b.tokenizer)
    forbidden = [*range(size, size + 37), *b.tokenizer.convert_tokens_to_ids(SPECIAL)]
    assert b.vocab_size == size + 37
    ids, distances = nearest_ids(b, hard_rows(b, forbidden), distance)
    assert not set(ids.tolist()) & set(forbidden)
    assert distances.min() > 0.01
    assert len(text_ids(b)) == size - len(SPECIAL)


@pytest.mark.parametrize("distance", DISTANCES)
def test_of_equal_tokens_the_smallest_id_is_taken_in_any_company(tiny, distance):
    b = Backbone.load(tiny("llama"), dtype="float32", device="cpu")
    twins = [40, 111, 200, 333]
    with torch.no_grad():
        b.embedding.weight[twins] = b.embedding.weight[111].clone()
    row = hard_rows(b, [200])
    for others in range(0, 40, 3):
        assert nearest_ids(b, torch.cat([random_rows(others), row]), distance)[0][-1] == 40


@pytest.mark.parametrize("distance", DISTANCES)
def test_distances_that_differ_by_rounding_are_equal(tiny, distance):
    b = Backbone.load(tiny("llama"), dtype="float32", device="cpu")
    token = hard_rows(b, [200])[0]
    noise = random_rows(1)[0]
    noise -= token * (noise @ token) / (token @ token)
    row = token + 0.8 * noise * token.norm() / noise.norm()
    for away, taken in ((1e-6, 40), (1e-4, 200)):
        with torch.no_grad():
            b.embedding.weight[40] = token - away * row
        assert plain_nearest(b, row.double().tolist(), distance)[0] == 200
        assert nearest_ids(b, row[None], distance)[0].tolist() == [taken]


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_part_of_the_vocabulary_worked_on_changes_nothing(backbone, monkeypatch, distance):
    b, rows = backbone("gpt2"), random_rows(20)
    whole = nearest_ids(b, rows, distance)[0]
    for chunk in (1, 7 * 32, 100 * 32):
        monkeypatch.setattr(nearest, "CHUNK", chunk)
        assert torch.equal(nearest_ids(b, rows, distance)[0], whole)


def test_prompts_together_are_prompts_alone(backbone):
    b = backbone("llama")
    prompts = [SoftPrompt(random_rows(n, seed)) for seed, n in enumerate((3, 1, 8))]
    together = verbalize(b, prompts)
    assert [v.text for [v] in together] == [verbalize(b, [p])[0][0].text for p in prompts]
    assert [len(v.details["tokens"]) for [v] in together] == [3, 1, 8]  # not cut to max_new_tokens=1
    assert all(0 <= v.confidence <= 1 for [v] in together)
    assert verbalize(b, []) == []


def test_confidence_is_the_clipped_mean_cosine_for_both_distances(backbone):
    b, rows = backbone("llama"), random_rows(4)
    for distance in DISTANCES:
        [[found]] = verbalize(b, [SoftPrompt(rows)], distance=distance)
        similar = torch.cosine_similarity(rows, hard_rows(b, nearest_ids(b, rows, distance)[0].tolist()), dim=-1)
        assert found.confidence == pytest.approx(float(similar.mean()), abs=1e-6)
        assert 0 < found.confidence < 1


def test_both_kinds_get_the_same_text(backbone):
    prompts = [SoftPrompt(random_rows())]
    both = [Nearest().verbalize(backbone("llama"), prompts, kind=k, max_new_tokens=60) for k in ("labels", "instructions")]
    assert both[0] == both[1]


def test_settings():
    assert settings_of(create("nearest")) == {"method": "nearest", "distance": "cosine"}
    assert create("nearest", distance="euclidean") == Nearest("euclidean")
    with pytest.raises(ConfigError, match="Did you mean 'euclidean'"):
        Nearest("euclid")


def test_rows_of_another_width_are_refused(backbone):
    with pytest.raises(ConfigError, match=r"\[2, 16\].*\[n, 32\]"):
        nearest_ids(backbone("llama"), torch.zeros(2, 16))
