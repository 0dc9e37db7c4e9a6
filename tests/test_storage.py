"""Files: atomic writes, JSON that is checked before it is used, hashes that do not depend on order."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lm_eval_softverb import storage
from lm_eval_softverb.errors import ArtifactError, DataError


def left_over(folder):
    """Files that a failed or finished write must not leave."""
    return [p.name for p in folder.iterdir() if p.name.endswith((".tmp", ".probe"))]


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "deep" / "er" / "a.txt"
    storage.write_text(path, "one")
    storage.write_text(path, "zwei ü 🙂")
    assert path.read_bytes() == "zwei ü 🙂".encode()
    assert left_over(path.parent) == []


def test_a_write_that_is_interrupted_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    storage.write_text(path, "old")

    def interrupted(_descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(storage.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        storage.write_text(path, "new")
    assert path.read_text() == "old"
    assert left_over(tmp_path) == []


def test_json_round_trip(tmp_path):
    value = {"a": [1, 2.5, None, True], "ü": "🙂\n"}
    storage.write_json(tmp_path / "a.json", value)
    assert storage.read_json(tmp_path / "a.json") == value


def test_json_that_others_could_not_read_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="nan"):
        storage.write_json(tmp_path / "a.json", {"loss": math.nan})
    assert list(tmp_path.iterdir()) == []


def test_tensors_round_trip_also_from_views_and_gradients(tmp_path):
    base = torch.arange(12.0, requires_grad=True)
    view = base.view(3, 4).t()
    storage.write_tensors(tmp_path / "t.safetensors", {"x": view}, {"made": "here"})
    assert torch.equal(load_file(tmp_path / "t.safetensors")["x"], view.detach())


def test_require_writable_makes_the_folder_and_leaves_no_probe(tmp_path):
    storage.require_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "valid JSON"),
        (b'{"a": ', "truncated"),
        (b"[" * 100_000, "valid JSON"),
        (b"1" * 5000, "valid JSON"),
        (b'{"a": "\xff\xfe"}', "UTF-8"),
        ("﻿{}".encode(), "valid JSON"),
        (b"\x80\x04\x95", "UTF-8"),
    ],
    ids=["empty", "truncated", "deeply-nested", "number-of-5000-digits", "latin", "byte-order-mark", "pickle"],
)
def test_json_that_cannot_be_read_is_an_artifact_error(tmp_path, content, words):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=words) as caught:
        storage.read_json(tmp_path / "a.json")
    assert str(tmp_path / "a.json") in str(caught.value)


def test_missing_json_is_an_artifact_error(tmp_path):
    with pytest.raises(ArtifactError, match="missing"):
        storage.read_json(tmp_path / "a.json")


# --- JSONL -----------------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), json_values, max_size=4)))
@settings(max_examples=60, deadline=None)
def test_jsonl_round_trip(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    storage.write_jsonl(path, rows)
    assert [row for _, row in storage.read_jsonl(path)] == rows
    assert [n for n, _ in storage.read_jsonl(path)] == list(range(1, len(rows) + 1))


def test_jsonl_skips_blank_lines_and_a_byte_order_mark_and_keeps_numbers(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": 2}')
    assert list(storage.read_jsonl(tmp_path / "a.jsonl")) == [(1, {"a": 1}), (4, {"a": 2})]


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (b'{"a": 1', "truncated"),
        (b"[1, 2]", "got list"),
        (b'"text"', "got str"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b"[" * 100_000, "valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "valid JSON"),
    ],
    ids=["truncated", "list", "string", "latin", "deeply-nested", "number-of-5000-digits"],
)
def test_a_bad_jsonl_line_is_named_with_file_and_line(tmp_path, second, words):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + second)
    with pytest.raises(DataError, match=words) as caught:
        list(storage.read_jsonl(path))
    assert f"{path}:2" in str(caught.value)


def test_a_missing_jsonl_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="Cannot read"):
        list(storage.read_jsonl(tmp_path / "a.jsonl"))


# --- hashes ----------------------------------------------------------------------------------------------------------


@given(st.dictionaries(st.text(), json_values, max_size=6))
@settings(max_examples=60, deadline=None)
def test_json_hashes_do_not_depend_on_the_order_of_keys(value):
    turned = dict(reversed(list(value.items())))
    assert storage.sha256_json(value) == storage.sha256_json(turned)
    assert storage.sha256_json(value) == storage.sha256_json(json.loads(json.dumps(value)))


def test_json_hashes_tell_values_apart_and_take_lone_surrogates():
    values = [None, 0, 1, "", "0", [], [0], {}, {"a": 0}, {"a": [0]}, "\ud800", "\ud801"]
    assert len({storage.sha256_json(v) for v in values}) == len(values)


def test_file_hashes_are_sha256(tmp_path):
    data = b"x" * (3 << 20)
    (tmp_path / "a").write_bytes(data)
    assert storage.sha256_file(tmp_path / "a") == storage.sha256_bytes(data)


def test_a_seed_is_that_of_its_parts():
    assert storage.seed_from(0, "sp-1", 2) == int(storage.sha256_json([0, "sp-1", 2])[:15], 16)
    assert len({storage.seed_from(0, "a"), storage.seed_from("a", 0), storage.seed_from("0", "a")}) == 3
    assert 0 <= storage.seed_from() < 2**60
