"""The shipped label sets: what labelsets.md promises, read through the loader."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from lm_eval_softverb.data import labelsets
from lm_eval_softverb.errors import ConfigError

NAMES = [
    "weather", "emotion", "transport", "meal", "profession", "music",
    "animal", "room", "sport", "material", "message", "finance",
]  # fmt: skip


def test_names_are_the_documented_ones_in_order():
    assert labelsets.names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_balanced_interleaved_and_apart(name):
    data = labelsets.load(labelset=name, pretrained="ignored", version=1.0)
    assert list(data) == ["train", "test"]
    words = labelsets.label_words(name)
    assert len(set(words)) == 5
    for split, each in (("train", 14), ("test", 10)):
        rows = data[split]
        assert rows.column_names == ["text", "label", "choices"]
        assert Counter(rows["label"]) == dict.fromkeys(range(5), each)
        assert rows["label"][:5] == list(range(5))  # so that five shots show each label once
        assert all(choices == words for choices in rows["choices"])
        for text, label in zip(rows["text"], rows["label"], strict=True):
            assert not re.search(rf"\b{words[label]}", text, re.IGNORECASE)
    assert not set(data["train"]["text"]) & set(data["test"]["text"])


def test_unknown_label_set_lists_close_names():
    with pytest.raises(ConfigError, match="Did you mean 'weather'"):
        labelsets.load(labelset="wether")
