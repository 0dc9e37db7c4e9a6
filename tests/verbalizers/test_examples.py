"""The example task descriptions of InSPEcT's target prompt, and that no task we measure on is among them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import lm_eval_softverb
from lm_eval_softverb.data import labelsets
from lm_eval_softverb.data.benchmarks import BENCHMARKS
from lm_eval_softverb.storage import read_jsonl
from lm_eval_softverb.verbalizers import KINDS

PACKAGE = Path(lm_eval_softverb.__file__).parent
EXAMPLES = [row for _, row in read_jsonl(PACKAGE / "verbalizers" / "examples.jsonl")]
POOL = [row for _, row in read_jsonl(PACKAGE / "metrics" / "pool.jsonl")]
SHIPPED = {word for name in labelsets.names() for word in labelsets.label_words(name)}
MEASURED = SHIPPED | {word for benchmark in BENCHMARKS.values() for word in benchmark.label_words}


def of_kind(rows, kind):
    return [row for row in rows if row["kind"] == kind]


def words_of(rows):
    return [label for row in of_kind(rows, "labels") for label in row["labels"]]


def test_examples_come_in_equal_numbers_of_each_kind():
    assert Counter(row["kind"] for row in EXAMPLES) == dict.fromkeys(KINDS, 12)
    assert all(row.keys() == {"kind", "name", "text"} | ({"labels"} if row["kind"] == "labels" else set()) for row in EXAMPLES)


@pytest.mark.parametrize("key", ["name", "text"])
def test_examples_are_unique(key):
    assert len({row[key] for row in EXAMPLES}) == len(EXAMPLES)


def test_label_examples_have_one_format_that_shows_their_labels():
    for row in of_kind(EXAMPLES, "labels"):
        assert row["text"] == f"Name the {row['name']} that the note is about: {', '.join(row['labels'])}"
    assert len(set(words_of(EXAMPLES))) == len(words_of(EXAMPLES)) == 48


def test_examples_are_short_and_cannot_be_mistaken_for_a_boundary():
    for row in EXAMPLES:
        assert 3 <= len(row["text"].split()) <= 20
        assert row["text"][0].isupper() and row["text"] == row["text"].strip(" .")
        assert row["text"].isascii() and not set("|\n") & set(row["text"])


def test_no_label_of_an_example_is_measured_or_in_the_pool():
    assert not set(words_of(EXAMPLES)) & MEASURED
    assert not set(words_of(EXAMPLES)) & set(words_of(POOL))


def test_no_subject_of_an_example_is_measured_or_in_the_pool():
    names = {row["name"] for row in EXAMPLES}
    assert not names & (MEASURED | set(labelsets.names()) | set(BENCHMARKS) | set(words_of(POOL)))
    texts = {row["text"].casefold() for row in EXAMPLES}
    assert not texts & {row["text"].strip(".").casefold() for row in of_kind(POOL, "instructions")}


def test_the_pool_shares_no_label_with_what_is_measured():
    assert not set(words_of(POOL)) & MEASURED


def test_the_pool_is_complete_and_without_repeats():
    assert Counter(row["kind"] for row in POOL) == dict.fromkeys(KINDS, 100)
    assert len(set(words_of(POOL))) == len(words_of(POOL))
    for row in of_kind(POOL, "labels"):
        assert row.keys() == {"kind", "labels"} and 3 <= len(row["labels"]) <= 6
        assert all(label == label.strip().lower() for label in row["labels"])
    instructions = [row["text"] for row in of_kind(POOL, "instructions")]
    assert len({text.casefold() for text in instructions}) == 100
    assert all(row.keys() == {"kind", "text"} for row in of_kind(POOL, "instructions"))
