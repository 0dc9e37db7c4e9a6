"""The audit finds what is planted, nothing in a clean DoD, and agrees with brute force."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
from toy_dods import PlainDod

from lm_eval_softverb.data.benchmarks import BENCHMARKS
from lm_eval_softverb.data.dod import DodTask
from lm_eval_softverb.data.dod.audit import audit, summary
from lm_eval_softverb.data.dod.general import GeneralDod
from lm_eval_softverb.data.rows import Row

REAL = Path(__file__).parents[3] / "shared" / "data" / "natural_instructions"


def plain(name, split, instruction, inputs, outputs=("a", "b"), labels=(), **info) -> DodTask:
    rows = tuple(Row(text, outputs[i % len(outputs)]) for i, text in enumerate(inputs))
    half = len(rows) // 2
    return DodTask(name, split, rows[:half], rows[half:], labels, instruction, info)


def texts(word, n=10):
    return [f"{word} {i}" for i in range(n)]


def clean() -> list[DodTask]:
    return [
        plain("task1_red", "train", "Count the red birds in a sentence.", texts("red")),
        plain("task2_blue", "train", "Say which city lies further north.", texts("blue"), texts("out")),
        plain("task3_green", "test", "Write a title for this news story.", texts("green"), texts("title")),
    ]


def test_a_clean_dod_has_no_findings():
    report = audit(PlainDod(clean()))
    assert report["tasks"] == {"train": 2, "test": 1} and report["kind"] == "general"
    near, rows, corpora = report["near_duplicates"], report["shared_inputs"], report["corpora"]
    assert (near["pairs"], near["identical"], near["test_tasks_with_one_in_train"], near["list"]) == (0, 0, 0, [])
    assert (rows["pairs"], rows["inputs_across_splits"], rows["test_tasks_with_some"], rows["list"]) == (0, 0, 0, [])
    assert (corpora["known_by"], corpora["corpora"], corpora["across_splits"]) == ("task name", 3, 0)
    assert all(found["all"] == found["some"] == 0 for found in report["benchmark_labels"].values())


def test_planted_faults_are_found_and_counted():
    twin = "Count the RED birds, in a sentence"
    copied = [" Red  1", "red 2", *texts("own", 8)]
    given = [
        *clean(),
        plain("task4_copy", "test", twin, copied, sources=["Reds"]),
        plain("task5_new", "train", "Something else entirely, as far as words go.", texts("new"), sources=["reds", "other"]),
        plain("task6_mood", "train", "Is the mood good or bad here, do you think?", texts("mood"), ("Positive", "negative")),
        plain("task9_half", "train", "How does the writer feel about this, overall?", texts("f"), ("positive", "mixed")),
        plain("task7_yes", "test", "Answer the question with one of two words.", texts("q"), ("yes", "no")),
        plain("task8_no", "train", "Decide whether the claim holds for the text.", texts("c"), ("yes", "no", "maybe")),
    ]
    report = audit(PlainDod(given))
    near = report["near_duplicates"]
    assert near["list"] == [{"tasks": ["task1_red", "task4_copy"], "splits": ["train", "test"], "jaccard": 1.0}]
    assert (near["pairs"], near["pairs_across_splits"], near["identical_across_splits"]) == (1, 1, 1)
    assert near["test_tasks_with_one_in_train"] == 1
    rows = report["shared_inputs"]
    assert rows["list"] == [{"tasks": ["task1_red", "task4_copy"], "splits": ["train", "test"], "inputs": 2}]
    assert (rows["inputs_across_splits"], rows["test_tasks_with_some"], rows["test_tasks_with_ten_percent"]) == (2, 1, 1)
    corpora = report["corpora"]
    assert corpora["list"] == {"reds": {"train": ["task5_new"], "test": ["task4_copy"]}}
    assert (corpora["known_by"], corpora["test_tasks_with_one_in_train"]) == ("source field and task name", 1)
    labels = report["benchmark_labels"]
    assert labels.keys() == BENCHMARKS.keys()
    assert labels["sst2"]["some"] == 2
    assert (labels["sst2"]["all"], labels["sst2"]["tasks_with_all"]) == (1, ["task6_mood"])
    assert (labels["boolq"]["tasks_with_all"], labels["boolq"]["some"]) == (["task8_no"], 1)  # the test task does not count
    text = summary(report)
    assert "of them identical" in text and "1, 1 across splits" in text and len(text.splitlines()) == 10 + len(BENCHMARKS)
    json.dumps(report, allow_nan=False)


def test_label_sets_are_compared_by_their_labels():
    sets = [("a b c d e", "train"), ("E d c B a", "test"), ("a b c d x", "test"), ("v w x y z", "train")]
    given = [
        plain(f"labels_{i}", split, "", texts(f"s{i}"), labels.split(), tuple(labels.split()))
        for i, (labels, split) in enumerate(sets)
    ]
    report = audit(PlainDod(given, "classification"), near=0.6)
    found = {(*pair["tasks"], pair["jaccard"]) for pair in report["near_duplicates"]["list"]}
    assert found == {("labels_0", "labels_1", 1.0), ("labels_0", "labels_2", 0.6667), ("labels_1", "labels_2", 0.6667)}
    assert report["near_duplicates"]["measure"] == "Jaccard index of labels"
    assert report["corpora"]["known_by"] == "nothing"


def test_pairs_equal_brute_force():
    rng = random.Random(0)
    given = [
        plain(f"task{i}_x", rng.choice(["train", "test"]), "", [f"i{rng.randrange(60)}" for _ in range(8)],
              labels=tuple(dict.fromkeys(rng.choices("abcdefgh", k=5))), outputs=("a",))
        for i in range(40)
    ]  # fmt: skip
    report = audit(PlainDod(given), near=0.5)
    near, rows = set(), set()
    for a, b in itertools.combinations(given, 2):
        one, two = set(a.labels), set(b.labels)
        if (jaccard := len(one & two) / len(one | two)) >= 0.5:
            near.add((a.name, b.name, round(jaccard, 4)))
        ours, theirs = ({r.input for r in (*t.train, *t.heldout)} for t in (a, b))
        if common := len(ours & theirs):
            rows.add((a.name, b.name, common))
    assert near and {(*p["tasks"], p["jaccard"]) for p in report["near_duplicates"]["list"]} == near
    assert rows and {(*p["tasks"], p["inputs"]) for p in report["shared_inputs"]["list"]} == rows
    for part in ("near_duplicates", "shared_inputs"):
        crossing = [len(set(pair["splits"])) > 1 for pair in report[part]["list"]]
        assert crossing == sorted(crossing, reverse=True) and sum(crossing) == report[part]["pairs_across_splits"]


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data/natural_instructions is not on this machine")
def test_findings_on_some_real_tasks():
    names = ["task1385_anli_r1_entailment", "task1387_anli_r3_entailment", "task1356_xlsum_title_generation"]
    names += ["task1290_xsum_summarization", "task1341_msr_text_classification"]
    dod = GeneralDod.open(str(REAL))
    report = audit(GeneralDod.open(str(REAL), tasks=[name for name in names if name in dod.names()]))
    assert report["near_duplicates"]["identical"] == 1
    pairs = [pair["tasks"] for pair in report["shared_inputs"]["list"]]
    assert ["task1290_xsum_summarization", "task1356_xlsum_title_generation"] in [sorted(pair) for pair in pairs]
