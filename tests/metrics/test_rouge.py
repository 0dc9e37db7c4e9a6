"""ROUGE-L: against a longest common subsequence spelled out, and what stemming and scripts do."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_eval_softverb.metrics.rouge import rouge_l

WORDS = st.lists(st.sampled_from(["cat", "dog", "hen", "cow"]), max_size=7)


def longest(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + longest(a[1:], b[1:])
    return max(longest(a[1:], b), longest(a, b[1:]))


@settings(deadline=None)
@given(WORDS, WORDS)
def test_f_measure_of_the_longest_common_subsequence(a, b):
    both = len(a) + len(b)
    expected = 2 * longest(a, b) / both if both else 0.0
    assert rouge_l(" ".join(a), " ".join(b)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("Classify the text.", "classify, the text!", 1.0),
        ("positive, negative", "positivity negativity", 1.0),  # stems posit and neg
        ("translating sentences", "translate sentence", 1.0),
        ("b a", "a b", 0.5),
        ("", "a", 0.0),
        ("你好", "你好", 0.0),
    ],
)
def test_words_are_stemmed_and_latin(prediction, reference, score):
    assert rouge_l(prediction, reference) == pytest.approx(score)
