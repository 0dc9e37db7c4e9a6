"""Embeddings: unit rows, each text once, cut texts counted; the real model equals its parts put together by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_eval_softverb.metrics import similarity
from lm_eval_softverb.metrics.similarity import WORD_PIECES, Encoder, cosines


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_rows_are_unit_float32_in_the_order_of_the_texts(hashing, hashed_rows):
    texts = ["b c", "a", "", "b c", "d"]
    rows = similarity.embed(texts)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, unit(hashed_rows(texts)), atol=1e-6)


def test_each_text_is_encoded_once(hashing):
    similarity.embed(["a", "b", "a"])
    similarity.embed(["b", "c"])
    assert hashing.cut("c") is False
    assert hashing.seen == [["a", "b"], ["c"]]


def test_no_texts_give_no_rows(hashing):
    assert len(similarity.embed([])) == 0
    assert hashing.seen == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=6), max_size=8), st.integers(1, 5))
def test_remembering_few_texts_changes_no_row(hashed_rows, calls, kept):
    """Also when one call brings more texts than are kept."""
    encoder = Encoder(hashed_rows, lambda text: False, kept=kept)
    for texts in calls:
        np.testing.assert_allclose(encoder.embed(texts), unit(hashed_rows(texts)), atol=1e-6)
        assert len(encoder._kept) <= kept


def test_the_oldest_texts_are_forgotten_first(hashed_rows):
    seen = []
    encoder = Encoder(lambda texts: seen.append(texts) or hashed_rows(texts), lambda text: False, kept=2)
    for text in ("a", "b", "a", "c", "a", "b"):
        encoder.embed([text])
    assert seen == [["a"], ["b"], ["c"], ["b"]]


def test_cut_texts_are_counted(hashing):
    long = "word " * 21
    similarity.embed([long, "short", long])
    assert hashing.n_cut == 1
    assert hashing.cut(long) is True
    assert hashing.cut("short") is False
    assert hashing.n_cut == 1


def test_cosines_against_a_loop_and_equal_texts_tie(hashing):
    a, b = similarity.embed(["a b", "c"]), similarity.embed(["b", "a b", "d e f"])
    found = cosines(a, b)
    assert found.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            assert found[i, j] == pytest.approx(sum(float(x) * float(y) for x, y in zip(a[i], b[j], strict=True)), abs=2e-6)
    assert found[0, 1] == cosines(a + np.float32(1e-8), b)[0, 1] == 1.0


# --- the real model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm():
    return Encoder.load()


@pytest.mark.real_model
def test_the_real_model_equals_mean_pooling_by_hand(minilm):
    """Oracle: transformers alone, without sentence-transformers."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    from lm_eval_softverb.pretrained import ENCODER, locate

    folder = locate(ENCODER)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    long = "A long list of words: " + " ".join(f"number {i}," for i in range(200))
    texts = ["Name the feeling in the sentence.", "joy, anger, fear", "", long, "Is the café open? ☕"]
    rows = minilm.embed(texts)
    assert rows.shape == (5, 384)
    for text, row in zip(texts, rows, strict=True):
        ids = tokenizer(text, truncation=True, max_length=WORD_PIECES, return_tensors="pt")
        with torch.no_grad():
            mean = model(**ids).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(row, torch.nn.functional.normalize(mean, dim=0).numpy(), atol=2e-6)
    assert minilm.n_cut == 1
    assert [minilm.cut(text) for text in texts] == [False, False, False, True, False]


@pytest.mark.real_model
def test_the_real_model_knows_what_is_alike(minilm):
    rows = minilm.embed(
        ["Decide whether a film review is good or bad.", "Tell the sentiment of a movie review.", "Add two numbers."]
    )
    found = cosines(rows, rows)
    assert found[0, 1] > 0.6 > 0.3 > found[0, 2]


@pytest.mark.real_model
def test_exactly_256_word_pieces_fit(minilm):
    """Two of them are the special ones at the ends."""
    assert not minilm.cut("the " * 254)
    assert minilm.cut("the " * 255)
