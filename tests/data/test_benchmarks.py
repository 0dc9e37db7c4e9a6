"""The benchmark loader: hub and files give the same rows, splits are fixed, and every label means its word."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lm_eval_softverb.data import benchmarks
from lm_eval_softverb.data.benchmarks import BENCHMARKS, DATA_DIR
from lm_eval_softverb.errors import ConfigError, DataError, ModelUnavailable

SHARED = Path(__file__).parents[3] / "shared" / "data"
REAL_COUNTS = {
    "sst2": {"train": 67349, "validation": 872},
    "sst5": {"train": 8544, "validation": 1101, "test": 2210},
    "ag_news": {"train": 22699, "test": 7600},
    "subj": {"train": 8000, "test": 2000},
    "trec": {"train": 5452, "test": 500},
    "boolq": {"train": 2000, "validation": 3270},
    "deceptive_opinion_spam": {"train": 1280, "test": 320},
    "human_vs_ai_essays": {"train": 116, "test": 136},
}

# One row each as the hub and as local files have it, and the (text, label word) both must give.
LAYOUTS = {
    "sst2": (
        [{"idx": 0, "sentence": "dull . ", "label": 0}, {"idx": 1, "sentence": "fine . ", "label": 1}],
        [{"idx": 5, "sentence": "dull .", "label": "negative"}, {"idx": 6, "sentence": "fine .", "label": 1}],
        [("dull .", "negative"), ("fine .", "positive")],
    ),
    "sst5": (
        [{"text": "ugh", "label": 0, "label_text": "very negative"}, {"text": "wow", "label": 4, "label_text": "x"}],
        [{"text": "ugh", "label": "terrible"}, {"text": "wow", "label": "Great"}],
        [("ugh", "terrible"), ("wow", "great")],
    ),
    "ag_news": (
        [{"text": "a war", "label": 0}, {"text": "a chip", "label": 3}],
        [{"text": "a war", "label": 0, "origin": "x"}, {"text": "a chip", "label": 3, "label_text": "Sci/Tech"}],
        [("a war", "world"), ("a chip", "technology")],
    ),
    "subj": (  # the numbers contradict each other, the names do not
        [
            {"text": "lovely", "label": 1, "label_text": "subjective"},
            {"text": "he ran", "label": 0, "label_text": "objective"},
        ],
        [
            {"text": "lovely", "label": 0, "label_text": "subjective"},
            {"text": "he ran", "label": 1, "label_text": "objective"},
        ],
        [("lovely", "subjective"), ("he ran", "objective")],
    ),
    "trec": (  # `label` is the fine class, in an order of its own
        [
            {"text": "How ?", "label": 3, "label_original": "DESC:manner", "label_coarse_original": "DESC"},
            {"text": "Who ?", "label": 0, "label_original": "HUM:ind", "label_coarse_original": "HUM"},
        ],
        [
            {"text": "How ?", "coarse_label": 2, "coarse_text": "description", "fine_label": 26},
            {"text": "Who ?", "coarse_label": 3, "coarse_text": "human", "fine_label": 29},
        ],
        [("How ?", "description"), ("Who ?", "human")],
    ),
    "boolq": (
        [{"question": "is it", "answer": True, "passage": "A"}, {"question": "was", "answer": False, "passage": "B"}],
        [{"question": "is it", "answer": "yes", "passage": "A"}, {"question": "was", "answer": 0, "passage": "B"}],
        [("A Question: is it?", "yes"), ("B Question: was?", "no")],
    ),
    "human_vs_ai_essays": (
        [{"text": "mine", "generated": 0.0}, {"text": "its", "generated": 1.0}],
        [{"text": "mine", "label": 0, "label_text": "human"}, {"text": "its", "label": 1, "label_text": "chatgpt"}],
        [("mine", "human"), ("its", "machine")],
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv(DATA_DIR, raising=False)


def serve(monkeypatch, splits: dict[str, list[dict]], calls: list[str] | None = None) -> None:
    """Stands in for the hub: load_dataset returns these rows."""
    import datasets

    def load_dataset(path: str) -> datasets.DatasetDict:
        if calls is not None:
            calls.append(path)
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import datasets

        datasets.Dataset.from_list(rows).to_pandas().to_parquet(path)


def pairs(dataset) -> list[tuple[str, str]]:
    return [(row["text"], row["choices"][row["label"]]) for row in dataset]


@pytest.mark.parametrize("name", LAYOUTS)
def test_hub_and_files_give_the_same_rows(name, monkeypatch, tmp_path):
    hub, local, expected = LAYOUTS[name]
    calls: list[str] = []
    hidden = [{**row, "label": -1} for row in hub]  # GLUE's test split; nobody may read it as a split of ours
    splits = dict.fromkeys(BENCHMARKS[name].splits, hub) | ({"test": hidden} if name == "sst2" else {})
    serve(monkeypatch, splits, calls)
    from_hub = benchmarks.load(name=name, pretrained="gpt2", version=1.0)
    assert calls == [BENCHMARKS[name].hub]
    for split in BENCHMARKS[name].splits:
        write(tmp_path / name / f"{split}.jsonl", local)
    monkeypatch.setenv(DATA_DIR, str(tmp_path))
    from_files = benchmarks.load(name=name)
    assert list(from_hub) == list(from_files) == list(BENCHMARKS[name].splits)
    for split, dataset in from_hub.items():
        assert pairs(dataset) == expected
        assert dataset.to_list() == from_files[split].to_list()
        extra = ["passage", "question"] if name == "boolq" else []
        assert dataset.column_names == ["text", *extra, "label", "choices"]
        assert dataset[0]["choices"] == list(BENCHMARKS[name].label_words)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_all_file_formats_give_the_same_rows(suffix, monkeypatch, tmp_path):
    rows = [
        {"text": 'He said "no, never",\nthen left', "label": 0},
        {"text": "naïve – 你好 \u200b\x00end", "label": 3},
        {"text": "{{ 7*7 }}", "label": 1},
    ]
    for split in ("train", "test"):
        write(tmp_path / "ag_news" / f"{split}{suffix}", rows)
    monkeypatch.setenv(DATA_DIR, str(tmp_path))
    assert [(r["text"], r["label"]) for r in benchmarks.load("ag_news")["test"]] == [
        (row["text"], row["label"]) for row in rows
    ]


def test_subj_with_numbers_only_follows_the_documented_order(monkeypatch, tmp_path):
    for split in ("train", "test"):
        write(tmp_path / "subj" / f"{split}.csv", [{"text": "lovely", "label": 0}, {"text": "he ran", "label": 1}])
    monkeypatch.setenv(DATA_DIR, str(tmp_path))
    assert pairs(benchmarks.load("subj")["test"]) == [("lovely", "subjective"), ("he ran", "objective")]


def test_fold_five_of_the_spam_corpus_is_the_test_split(monkeypatch, tmp_path):
    rows = [{"text": f"{fold} {label}", "label": label, "fold": fold} for fold in range(1, 6) for label in (0, 1)]
    write(tmp_path / "deceptive_opinion_spam" / "all.csv", rows)
    monkeypatch.setenv(DATA_DIR, str(tmp_path))
    data = benchmarks.load("deceptive_opinion_spam")
    assert data["test"]["text"] == ["5 0", "5 1"]
    assert len(data["train"]) == 8


def test_essay_pairs_stay_together_and_the_split_does_not_depend_on_order(monkeypatch, tmp_path):
    rows = [{"text": f"{pair} by {who}", "label": who, "pair_id": pair} for pair in range(60) for who in (0, 1)]
    monkeypatch.setenv(DATA_DIR, str(tmp_path))
    seen = []
    for ordered in (rows, rows[::-1], [row for row in rows if row["pair_id"] < 50]):
        write(tmp_path / "human_vs_ai_essays" / "all.jsonl", ordered)
        data = benchmarks.load("human_vs_ai_essays")
        train, test = ({text.split()[0] for text in data[split]["text"]} for split in ("train", "test"))
        assert not train & test
        assert all(len(data[split]) == 2 * len(part) for split, part in (("train", train), ("test", test)))
        assert 0.3 < len(train) / len(train | test) < 0.7
        seen.append((train, test))
    assert seen[0] == seen[1]
    assert seen[2][0] <= seen[0][0] and seen[2][1] <= seen[0][1]


def test_essays_with_a_training_split_only_on_the_hub_are_split_by_text(monkeypatch):
    rows = [{"text": f"essay {i}", "generated": i % 2} for i in range(40)]
    serve(monkeypatch, {"train": rows})
    data = benchmarks.load("human_vs_ai_essays")
    assert len(data["train"]) + len(data["test"]) == 40
    assert not set(data["train"]["text"]) & set(data["test"]["text"])


def test_split_files_win_over_one_file(monkeypatch, tmp_path):
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    for stem in ("train", "test", "all"):
        write(tmp_path / "human_vs_ai_essays" / f"{stem}.jsonl", [{**row, "text": stem + row["text"]} for row in rows])
    monkeypatch.setenv(DATA_DIR, str(tmp_path))
    assert benchmarks.load("human_vs_ai_essays")["test"]["text"] == ["testa", "testb"]


def test_corpus_without_a_hub_copy_says_to_set_the_folder():
    with pytest.raises(ModelUnavailable, match=r"not on the hub.*SOFTVERB_DATA_DIR.*deceptive_opinion_spam/<split>"):
        benchmarks.load("deceptive_opinion_spam")


@pytest.mark.parametrize("name", [name for name, b in BENCHMARKS.items() if b.hub])
def test_f34_hub_unreachable_says_what_to_download_and_how(name, monkeypatch):
    import datasets

    def load_dataset(path: str) -> None:
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ModelUnavailable) as caught:
        benchmarks.load(name)
    message = str(caught.value)
    assert f"load_dataset('{BENCHMARKS[name].hub}')" in message
    assert DATA_DIR in message and f"{name}/<split>" in message and "OfflineModeIsEnabled" in message


def test_f34_the_real_library_offline_gives_the_same_error(tmp_path):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    code = "from lm_eval_softverb.data.benchmarks import load; load('sst5')"
    root = Path(benchmarks.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True, check=False)
    assert "ModelUnavailable: The dataset SetFit/sst5 is neither" in done.stderr


def test_unknown_name_and_missing_folder(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'sst2'"):
        benchmarks.load("sst-2")
    monkeypatch.setenv(DATA_DIR, str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"nowhere.sst2 has no split train or validation"):
        benchmarks.load("sst2")


def test_importing_the_loader_imports_neither_datasets_nor_lm_eval():
    code = "import sys, lm_eval_softverb.data.benchmarks; print({'datasets', 'lm_eval', 'pyarrow'} & set(sys.modules))"
    root = Path(benchmarks.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", REAL_COUNTS)
def test_real_files_have_the_counts_of_their_provenance(name, monkeypatch):
    if not (SHARED / name).is_dir():
        pytest.skip("the real copies in ../shared/data are not on this machine")
    monkeypatch.setenv(DATA_DIR, str(SHARED))
    data = benchmarks.load(name)
    assert {split: len(dataset) for split, dataset in data.items()} == REAL_COUNTS[name]
    for dataset in data.values():
        assert set(dataset["label"]) == set(range(len(BENCHMARKS[name].label_words)))
        assert all(text == text.strip() for text in dataset["text"])
