"""F26: files that cannot be used end in a DataError that names the file, and the line where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest

from lm_eval_softverb.data import benchmarks
from lm_eval_softverb.errors import DataError

GOOD = b'{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n'

CASES = {
    "empty jsonl": ("test.jsonl", b"", r"split test has no rows"),
    "blank lines only": ("test.jsonl", b"\n \n", r"split test has no rows"),
    "empty csv": ("test.csv", b"", r"split test has no rows"),
    "csv with a header only": ("test.csv", b"text,label\n", r"split test has no rows"),
    "one class": ("test.jsonl", b'{"text": "a", "label": 2}\n' * 3, r"only rows of one class, 'business'"),
    "text column missing": ("test.jsonl", GOOD + b'{"txt": "c", "label": 1}\n', r"jsonl:3: column 'text' is missing"),
    "label column missing": ("test.csv", b"text,class\na,0\n", r"test.csv:2: the label is missing.*'class'"),
    "null text": ("test.jsonl", GOOD + b'{"text": null, "label": 1}\n', r"test.jsonl:3: column 'text' holds NoneType"),
    "unknown label": ("test.jsonl", GOOD + b'{"text": "c", "label": 9}\n', r"test.jsonl:3: 'label' is 9, expected one"),
    "hidden label": ("test.jsonl", b'{"text": "c", "label": -1}\n', r"test.jsonl:1: 'label' is -1"),
    "truncated jsonl": ("test.jsonl", GOOD + b'{"text": "c", "la', r"test.jsonl:3: not valid JSON"),
    "jsonl of lists": ("test.jsonl", GOOD + b"[1, 2]\n", r"test.jsonl:3: expected one JSON object"),
    "latin-1 jsonl": ("test.jsonl", GOOD + b'{"text": "caf\xe9", "label": 1}\n', r"test.jsonl:3: not UTF-8"),
    "latin-1 csv": ("test.csv", b"text,label\na,0\ncaf\xe9,1\n", r"test.csv:3: not UTF-8"),
    "utf-16 csv": ("test.csv", "text,label\na,0\n".encode("utf-16"), r"test.csv:1: not UTF-8"),
    "half a surrogate pair": ("test.jsonl", GOOD + b'{"text": "\\ud83d", "label": 1}\n', r"test.jsonl:3: .*surrogate"),
    "csv row too long": ("test.csv", b"text,label\na,0\nb,c,1\n", r"test.csv:3: 3 fields, expected 2"),
    "csv row too short": ("test.csv", b"text,label\na,0\nb\n", r"test.csv:3: 1 fields, expected 2"),
    "truncated csv": ("test.csv", b'text,label\na,0\n"b', r"test.csv:3: not valid CSV"),
    "truncated parquet": ("test.parquet", b"PAR1\x00\x01", r"test.parquet is not a readable parquet file"),
    "duplicate id": (
        "test.jsonl",
        b'{"id": "x", "text": "a", "label": 0}\n{"id": "x", "text": "b", "label": 1}\n',
        r"test.jsonl:2: id 'x' was used before, at .*test.jsonl:1",
    ),
    "duplicate idx": ("test.csv", b"idx,text,label\n0,a,0\n0,b,1\n", r"test.csv:3: id '0' was used before, at .*csv:2"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(benchmarks.DATA_DIR, str(tmp_path))
    folder = tmp_path / "ag_news"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(GOOD)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_bad_file_is_a_named_error(case, folder):
    name, content, message = CASES[case]
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        benchmarks.load("ag_news")
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["test.jsonl", "test.csv"])
def test_byte_order_mark_is_accepted(name, folder):
    content = GOOD if name.endswith("jsonl") else b"text,label\r\na,0\r\nb,1\r\n"
    (folder / name).write_bytes(b"\xef\xbb\xbf" + content)
    assert benchmarks.load("ag_news")["test"]["text"] == ["a", "b"]


def test_missing_split_names_the_files_expected(folder):
    with pytest.raises(DataError, match=r"ag_news has no split test\. Expected <split>\.parquet"):
        benchmarks.load("ag_news")


def test_two_files_for_one_split_are_refused(folder):
    (folder / "test.jsonl").write_bytes(GOOD)
    (folder / "test.csv").write_bytes(b"text,label\na,0\nb,1\n")
    with pytest.raises(DataError, match=r"test\.jsonl and test\.csv; keep one"):
        benchmarks.load("ag_news")


@pytest.mark.parametrize("fold", [0, 6, None])
def test_row_outside_the_five_folds_is_refused(fold, tmp_path, monkeypatch):
    monkeypatch.setenv(benchmarks.DATA_DIR, str(tmp_path))
    (tmp_path / "deceptive_opinion_spam").mkdir()
    row = '{"text": "a", "label": 0}' if fold is None else f'{{"text": "a", "label": 0, "fold": {fold}}}'
    (tmp_path / "deceptive_opinion_spam" / "all.jsonl").write_text(row + "\n")
    with pytest.raises(DataError, match=r"all.jsonl:1: 'fold' is"):
        benchmarks.load("deceptive_opinion_spam")
