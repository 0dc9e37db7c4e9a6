"""The general DoD from its three layouts: filters, unwinding, the draw, what is held out, caches, and the real copies."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest
from toy_dods import SMALL, instances, task, tasks, write_clone, write_hub, write_rebuilt

from lm_eval_softverb.data import labelsets
from lm_eval_softverb.data.benchmarks import DATA_DIR
from lm_eval_softverb.data.dod import classification as dod_classification
from lm_eval_softverb.data.dod.draw import hold_out
from lm_eval_softverb.data.dod.general import GeneralDod
from lm_eval_softverb.data.dod.opening import open_dod, source_of
from lm_eval_softverb.data.dod.sources import CloneSource, RebuiltSource
from lm_eval_softverb.data.dod.tokens import PIECES, TokenCounter
from lm_eval_softverb.data.rows import Row, data_sha256
from lm_eval_softverb.errors import ConfigError, DataError, ModelUnavailable

REAL = Path(__file__).parents[3] / "shared" / "data" / "natural_instructions"
WRITE = {"clone": write_clone, "hub": write_hub, "rebuilt": write_rebuilt}
CHARACTERS = TokenCounter("characters", lambda texts: [len(text) for text in texts])


def inputs(rows) -> set[str]:
    return {row.input.casefold() for row in rows}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def clone(tmp_path):
    def make(given=None, name="clone", **settings):
        return GeneralDod.open(write_clone(tmp_path / name, given or tasks()), **{**SMALL, **settings})

    return make


@pytest.mark.parametrize("layout", WRITE)
def test_every_layout_gives_the_same_tasks(tmp_path, clone, layout):
    reference = clone(name="reference")
    dod = GeneralDod.open(WRITE[layout](tmp_path / layout, tasks()), **SMALL)
    assert dod.kind == "general" and len(dod.sha256) == 64
    assert dod.names() == list(tasks())
    assert dod.names("test") == ["task3_green_three", "task4_black_four"]
    for name in dod.names():
        ours, same = dod.task(name), reference.task(name)
        assert (ours.name, ours.split, ours.instruction, ours.labels) == (name, tasks()[name]["split"], same.instruction, ())
        assert (ours.train, ours.heldout) == (same.train, same.heldout)
        assert ours.info["heldout_sha256"] == data_sha256(ours.heldout)


def test_rows_are_unwound_and_everything_left_out_is_counted(clone):
    own = instances("red", 16)  # 20 rows
    own[1]["output"] = [" padded  ", "padded", "  ", "half \ud800"]
    dod = clone({"task1_red": task("red", Instances=own)}, rows=100)
    got = dod.task("task1_red")
    rows = [*got.train, *got.heldout]
    expected = {(f"Input: {i['input']}\nOutput:", o) for i in own for o in i["output"]} - {
        (f"Input: {own[1]['input']}\nOutput:", bad) for bad in (" padded  ", "  ", "half \ud800")
    }
    assert {(r.input, r.output) for r in rows} == expected and len(rows) == len(expected) == 20
    assert {r.delimiter for r in rows} == {" "}
    wanted = {"n_instances": 16, "n_unwound": 23, "n_unusable": 2, "n_duplicates": 1, "n_too_long": 0, "n_not_drawn": 0}
    assert {k: got.info[k] for k in wanted} == wanted
    assert (got.info["n_train"], got.info["n_heldout"]) == (len(got.train), len(got.heldout))
    assert (got.instruction, got.info["sources"], got.info["domains"]) == ("Answer with red.", ["red_corpus"], ["News"])


def test_verdicts_name_the_reason(clone, tmp_path):
    given = tasks() | {
        "task5_missing": {"split": "train"},
        "task6_few": task("few", Instances=instances("few", 11)),
        "task7_long": task("long", "test", Instances=instances("long", 11) + instances("long", 9, words=300)),
        "task8_french": task("french", Output_language=["French"]),
        "task9_alike": task("alike", Instances=[{"id": str(i), "input": "x", "output": [str(i)]} for i in range(20)]),
        "task10_broken": task("broken"),
        "task11_odd": task("odd", Instances=[{"id": "1", "input": 7, "output": ["x"]}] * 20),
        "task12_excluded": task("excluded", "excluded"),
    }
    root = Path(write_clone(tmp_path / "c", given))
    (root / "tasks" / "task10_broken.json").write_text('{"Definition": [')
    dod = GeneralDod.open(str(root), **SMALL)
    reasons = {v.name: (v.reason, v.instances, v.short) for v in dod.verdicts()}
    assert reasons == {
        **dict.fromkeys(tasks(), ("", 16, 12)),
        "task5_missing": ("no data", 0, 0),
        "task6_few": ("too few instances", 11, 0),
        "task7_long": ("too few instances that are short enough", 20, 11),
        "task8_french": ("not English", 16, 0),
        "task9_alike": ("one input only", 20, 12),
        "task10_broken": ("unreadable", 0, 0),
        "task11_odd": ("unreadable", 0, 0),
    }
    assert dod.names() == list(tasks())
    with pytest.raises(ConfigError, match=r"task8_french.*not English"):
        dod.task("task8_french")
    with pytest.raises(ConfigError, match=r"task1_red_on'.*Did you mean 'task1_red_one'"):
        dod.task("task1_red_on")
    with pytest.raises(DataError, match=r"task10_broken\.json is not valid JSON"):
        dod.source.read("task10_broken")


def test_nothing_held_out_is_trained_on(clone):
    dod = clone(rows=16)
    for name in dod.names():
        got = dod.task(name)
        assert len(got.train) + len(got.heldout) == 16
        assert 4 <= len(got.heldout) <= 5  # the last input may bring its second output
        assert not inputs(got.train) & inputs(got.heldout)


@pytest.mark.parametrize("seed", range(30))
def test_inputs_stay_on_one_side_whatever_the_rows(seed):
    rng = random.Random(seed)
    some = [
        rng.choice(["a b", "A  B", "c", "d", "é", "e\u0301", "f g", *map(str, range(rng.randint(1, 60)))]) for _ in range(80)
    ]
    rows = [Row(text, str(i)) for i, text in enumerate(some)]
    train, held = hold_out(rows, 20, seed)
    sides = [{" ".join(r.input.split()).casefold().replace("e\u0301", "é") for r in side} for side in (train, held)]
    assert train and held and not sides[0] & sides[1]
    assert sorted(train + held, key=lambda r: int(r.output)) == rows
    assert train == [r for r in rows if r in train] and len(held) <= 40


def test_held_out_rows_where_there_are_few_or_one_input_has_many():
    rows = [Row(str(i), "y") for i in range(10)]
    train, held = hold_out(rows, 100, 0)
    assert (len(train), len(held)) == (5, 5)
    many = [Row("same", str(i)) for i in range(90)] + [Row(str(i), "y") for i in range(10)]
    for seed in range(10):
        train, held = hold_out(many, 10, seed)
        assert {r.input for r in train} == {"same"} and len(held) == 10
    assert hold_out([Row("same", "1"), Row("Same ", "2")], 1, 0)[1] == []


def test_the_draw_depends_on_texts_and_seed_only(clone):
    given = tasks()
    first = clone(given).task("task1_red_one")
    for i in given["task1_red_one"]["Instances"]:
        i["id"] = "other" + i["id"]
    random.Random(1).shuffle(given["task1_red_one"]["Instances"])
    assert clone(given, "again").task("task1_red_one").heldout == first.heldout
    assert clone(given, "b", seed=1).task("task1_red_one").heldout != first.heldout
    small = clone(given, "c", max_rows=3).task("task1_red_one")
    assert small.heldout == first.heldout and small.train == first.train[:3]
    assert small.info["n_train_over_max_rows"] == len(first.train) - 3
    assert first.info["n_not_drawn"] == 8


def test_small_versions_cap_the_tokens_of_a_row(clone):
    own = instances("red", 12) + instances("long", 40, words=30)
    dod = clone({"task1_red": task("red", Instances=own), "task2_long": task("l", Instances=own[12:])}, max_tokens=20)
    assert [v.reason for v in dod.verdicts()] == ["", "too few instances that are short enough"]
    got = dod.task("task1_red")
    assert {r.output.split()[0] for r in (*got.train, *got.heldout)} == {"red"} and got.info["n_too_long"] > 0
    assert max(sum(PIECES.count([r.input, r.output])) for r in (*got.train, *got.heldout)) <= 20 + 4  # the frame's own pieces


def test_the_tokenizer_decides_and_is_recorded(clone, tmp_path):
    plain = clone()
    dod = GeneralDod.open(plain.path, tokenizer=CHARACTERS, limit_tokens=16, **SMALL)
    # "red w1 w1" and "red out 1" have 18 characters, so nothing is left; pieces are few.
    assert dod.names() == [] and len(plain.names()) == 4
    assert dod.sha256 != plain.sha256 and dod.reference()["settings"]["tokenizer"] == "characters"
    again = GeneralDod.open(plain.path, **SMALL)
    assert again.reference() == plain.reference() == {
        "kind": "general", "source": plain.path, "settings": SMALL, "sha256": plain.sha256
    }  # fmt: skip


def test_a_tokenizer_by_name_counts_as_it_encodes(tiny):
    from transformers import AutoTokenizer

    folder = tiny("llama")
    counter, tokenizer = TokenCounter.load("ours", folder), AutoTokenizer.from_pretrained(folder)
    texts = ["A film.", "", "naïve café 🙂"]
    assert counter.name == "ours"
    assert counter.count(texts) == [len(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    with pytest.raises(ModelUnavailable, match="The tokenizer no/such"):
        TokenCounter.load("no/such")


def test_rebuilt_copies_keep_their_counts_and_scale_them_for_other_outputs(tmp_path):
    given = {"task1_red": task("red")}
    given["task1_red"]["Instances"][0]["output"] = ["red out 0", "very long " * 300]
    dod = GeneralDod.open(write_rebuilt(tmp_path / "r", given), **{**SMALL, "rows": 100})
    got = dod.task("task1_red")
    assert got.info["n_too_long"] == 1 and len(got.train) + len(got.heldout) == 19
    assert dod.verdicts()[0].instances == 16


def test_nothing_is_read_before_it_is_asked_for(tmp_path, monkeypatch):
    reads = []
    dod = GeneralDod.open(write_rebuilt(tmp_path / "r", tasks()), **SMALL)
    stock = RebuiltSource.read
    monkeypatch.setattr(RebuiltSource, "read", lambda self, name: reads.append(name) or stock(self, name))
    assert len(dod.names()) == 4 and reads == []
    dod.task("task2_blue_two")
    assert reads == ["task2_blue_two"]


def test_verdicts_are_cached_until_the_file_changes(tmp_path, monkeypatch):
    root, cache = Path(write_clone(tmp_path / "c", tasks())), tmp_path / "cache"
    reads = []
    stock = CloneSource.read
    monkeypatch.setattr(CloneSource, "read", lambda self, name: reads.append(name) or stock(self, name))

    def names(**settings):
        reads.clear()
        return GeneralDod.open(str(root), cache=cache, **{**SMALL, **settings}).names()

    assert names() == list(tasks()) and len(reads) == 4
    assert names() == list(tasks()) and reads == []
    few = json.dumps(task("red", Instances=instances("red", 5)))
    (root / "tasks" / "task1_red_one.json").write_text(few)
    assert names() == list(tasks())[1:] and reads == ["task1_red_one"]
    assert names(min_instances=5) == list(tasks()) and len(reads) == 4  # another question, another file
    for path in cache.iterdir():
        path.write_text("{")
    assert names() == list(tasks())[1:] and len(reads) == 4


def test_only_tasks_asked_for_are_judged_and_none_is_dropped(tmp_path, monkeypatch):
    given = tasks() | {"task6_few": task("few", Instances=instances("few", 11))}
    root = write_clone(tmp_path / "c", given)
    reads = []
    stock = CloneSource.read
    monkeypatch.setattr(CloneSource, "read", lambda self, name: reads.append(name) or stock(self, name))
    dod = GeneralDod.open(root, tasks=["task3_green_three", "task1_red_one"], **SMALL)
    assert dod.names() == ["task3_green_three", "task1_red_one"] == reads
    assert dod.sha256 == GeneralDod.open(root, **SMALL).sha256
    with pytest.raises(ConfigError, match=r"1 of the 2 tasks asked for do not pass \(task6_few: too few instances\)"):
        GeneralDod.open(root, tasks=["task1_red_one", "task6_few"], **SMALL).names()
    with pytest.raises(ConfigError, match="no task 'task1_red'"):
        GeneralDod.open(root, tasks=["task1_red"], **SMALL)


def test_hub_rows_in_any_order_and_split(tmp_path):
    given = tasks()
    root = Path(write_hub(tmp_path / "h", given))
    ours = GeneralDod.open(str(root), **SMALL).task("task3_green_three")
    lines = (root / "train.jsonl").read_text().splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    (root / "train.jsonl").write_text("".join(lines[: len(lines) // 2]))
    (root / "validation.jsonl").write_text("".join(lines[len(lines) // 2 :]))
    dod = GeneralDod.open(str(root), **SMALL)
    assert Counter(dod.source.splits().values()) == {"train": 2, "test": 2}
    assert sorted(dod.names()) == sorted(given)
    assert dod.task("task3_green_three").heldout == ours.heldout
    assert dod.source.read("task1_red_one").info["hub_splits"].keys() == {"train", "validation"}


def test_f26_sources_that_cannot_be_used_say_so(tmp_path, monkeypatch):
    monkeypatch.setenv(DATA_DIR, str(tmp_path))
    with pytest.raises(ConfigError, match=r"no such setting.*Settings: seed, rows"):
        GeneralDod.open(write_clone(tmp_path / "natural_instructions", tasks()), row=3)
    for bad in ({"rows": 0}, {"heldout": -1}, {"max_rows": "x"}):
        with pytest.raises(ConfigError, match="expected a whole number of at least 1"):
            GeneralDod.open(None, **bad)
    assert open_dod("general", **SMALL).names() == list(tasks())
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no Super-NaturalInstructions"):
        GeneralDod.open(str(tmp_path / "empty"))
    monkeypatch.delenv(DATA_DIR)
    with pytest.raises(ModelUnavailable, match=r"Muennighoff/natural-instructions is neither .* SOFTVERB_DATA_DIR"):
        GeneralDod.open()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "train.jsonl").write_text('{"task_name": "a", "text": "b"}\n')
    with pytest.raises(DataError, match="no column id, definition, inputs, targets"):
        GeneralDod.open(str(tmp_path / "odd"))
    root = Path(write_rebuilt(tmp_path / "r", tasks()))
    (root / "ni_all_pass_500.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="Copy the files again"):
        GeneralDod.open(str(root))
    root = Path(write_clone(tmp_path / "both", tasks()))
    (root / "splits" / "default" / "test_tasks.txt").write_text("task1_red_one\n")
    with pytest.raises(DataError, match="task1_red_one is a train task, too"):
        GeneralDod.open(str(root))


def test_one_string_opens_either_kind(tmp_path, monkeypatch):
    class Standin:
        opened = None

        @classmethod
        def open(cls, path, *reading):
            cls.opened = path
            return cls()

    assert open_dod("classification").names() == labelsets.names()  # the shipped ones
    monkeypatch.setattr(dod_classification, "ClassificationDod", Standin)
    for source in ("classification:some/file.sqlite", "some/file.sqlite", "some/file.db", "some/file.sqlite.gz"):
        assert isinstance(open_dod(source), Standin)
        assert Standin.opened == source.removeprefix("classification:")
    with pytest.raises(ConfigError, match="no such setting"):
        open_dod("a.sqlite", nothing=1)
    root = write_clone(tmp_path / "c", tasks())
    for source in (root, f"general:{root}"):
        assert open_dod(source, **SMALL).names() == list(tasks())
    with pytest.raises(ConfigError, match="expected general, general:PATH"):
        open_dod("")
    assert source_of({"kind": "general", "source": "a"}) == "general:a" and source_of({"kind": "general"}) == "general"
    with pytest.raises(ConfigError, match="expected kind"):
        source_of({"kind": "other", "source": "a"})


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data/natural_instructions is not on this machine")
def test_the_real_copies():
    dod = GeneralDod.open(str(REAL))
    counts = Counter((v.split, v.reason) for v in dod.verdicts())
    assert counts == {
        ("train", ""): 416, ("test", ""): 88, ("train", "no data"): 237, ("test", "no data"): 16,
        ("train", "too few instances"): 101, ("test", "too few instances"): 14,
        ("train", "too few instances that are short enough"): 3, ("test", "too few instances that are short enough"): 1,
    }  # fmt: skip
    verdicts = json.loads((REAL / "ni_filter.json").read_text())
    assert dod.names("train") == verdicts["pass_train"] and dod.names("test") == verdicts["pass_test"]
    for name in dod.names()[:: 25 if not os.environ.get("SOFTVERB_LONG") else 1]:
        got = dod.task(name)
        assert len(got.train) + len(got.heldout) == 500 and 100 <= len(got.heldout) <= 110
        assert not inputs(got.train) & inputs(got.heldout)
        assert got.instruction and all(r.input.startswith("Input: ") and r.input.endswith("\nOutput:") for r in got.train)
