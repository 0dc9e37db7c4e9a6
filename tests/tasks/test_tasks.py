"""Every task and group instantiates, twins see the same text, and document text reaches the model byte for byte."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from lm_eval_softverb.data import labelsets
from lm_eval_softverb.data.benchmarks import BENCHMARKS, DATA_DIR
from lm_eval_softverb.plugin import task_dir

SHARED = Path(__file__).parents[3] / "shared" / "data"
STEMS = [*BENCHMARKS, *(f"labels_{name}" for name in labelsets.names())]
SCORED = {name: "validation" if name in ("sst2", "boolq") else "test" for name in BENCHMARKS}
REAL_COUNTS = {
    "sst2": 872, "sst5": 2210, "ag_news": 7600, "subj": 2000, "trec": 500, "boolq": 3270,
    "deceptive_opinion_spam": 320, "human_vs_ai_essays": 136,
}  # fmt: skip

NASTY = [
    "{{ 7*7 }} {{text}} {{ ''.__class__.__mro__ }}", "{% for i in range(9) %}x{% endfor %}", "{# gone? #}", "{{", "%}",
    "!!python/object/apply:os.system ['true']", "!function os.system", "- a: b\n  c: [", "a, b = c",
    "line\nbreak", "cr\r\nlf\rcr", "tab\there", "nul\x00inside", "zero\u200bwidth\u200d\ufeff.", "\u202eto the left",
    "<script>alert('1')</script> &amp; &lt;", "\"quoted\" 'single' `tick` \\n \\", "<|im_start|>system<|im_end|></s>",
    "{text} %s %(x)s $HOME ${HOME}", "42", "[1, 2]", "§ é 你好 🙂 \u2028 \u2029 \x85 x", "Label:", "~", "null",
]  # fmt: skip


def rows_for(name: str, texts: list[str]) -> list[dict]:
    """Rows in the layout of the local files, labels in turn."""
    words = BENCHMARKS[name].label_words
    rows = []
    for i, text in enumerate(texts):
        word = words[i % len(words)]
        if name == "boolq":
            rows.append({"passage": text, "question": f"is {text} so", "answer": word})
        elif name == "sst2":
            rows.append({"sentence": text + " ", "label": i % 2})
        elif name == "trec":
            rows.append({"text": text, "coarse_text": word})
        else:
            rows.append({"text": text, "label": word})
    return rows


def write_all(folder: Path, texts: list[str]) -> None:
    for name, benchmark in BENCHMARKS.items():
        (folder / name).mkdir(parents=True)
        for split in benchmark.splits:
            rows = rows_for(name, [f"{split} {text}" for text in texts])
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def manager():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        from lm_eval.tasks import TaskManager

        yield TaskManager(include_path=str(task_dir()), include_defaults=False)


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Path:
    write_all(tmp_path, [f"document {i}" for i in range(12)])
    monkeypatch.setenv(DATA_DIR, str(tmp_path))
    return tmp_path


def contexts(task, shots: int, limit: int | None = None) -> dict[int, str]:
    """Document number → the context that a model gets."""
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(1234)
    task.build_all_requests(limit=limit)
    return {instance.doc_id: instance.args[0] for instance in task.instances}


def load(manager, name: str):
    return manager.load([name])["tasks"][name]


def question(stem: str, doc: dict) -> str:
    if stem == "boolq":
        return f"Passage: {doc['passage']} Question: {doc['question']}? Answer:"
    return f"Sentence: {doc['text']} Label:"


def word(doc: dict) -> str:
    return doc["choices"][doc["label"]]


def test_exactly_these_tasks_and_groups(manager):
    names = {f"softverb_{stem}{twin}" for stem in STEMS for twin in ("", "_mc")}
    assert len(names) == 40
    dods = {f"dod_{name}" for name in ("general", "general_gold")}
    dods |= {f"dod_classification{arm}{twin}" for arm in ("", "_gold") for twin in ("", "_mc")}
    assert set(manager.all_subtasks) == names | dods | {"verbalize_labels", "verbalize_instructions"}
    groups = ["softverb_benchmarks", "softverb_benchmarks_mc", "softverb_labels", "softverb_labels_mc"]
    assert manager.all_groups == groups
    assert manager.all_tags == []
    files = list(task_dir().rglob("*.yaml"))
    assert len(files) == len(manager.all_tasks)  # the harness drops a broken file without a word


@pytest.mark.parametrize("twin", ["", "_mc"])
def test_groups_hold_all_their_tasks(manager, tiny, twin):
    for group, stems in (("benchmarks", list(BENCHMARKS)), ("labels", [f"labels_{n}" for n in labelsets.names()])):
        loaded = manager.load([f"softverb_{group}{twin}"])
        assert list(loaded["tasks"]) == [f"softverb_{stem}{twin}" for stem in stems]


@pytest.mark.parametrize("stem", STEMS)
def test_twins_agree_and_targets_are_right(manager, tiny, stem):
    generate, choice = load(manager, f"softverb_{stem}"), load(manager, f"softverb_{stem}_mc")
    assert generate.OUTPUT_TYPE == "generate_until" and choice.OUTPUT_TYPE == "multiple_choice"
    assert generate.config.doc_to_text == choice.config.doc_to_text
    docs = list(generate.eval_docs)
    assert docs == list(choice.eval_docs)
    assert len(docs) == (12 if stem in BENCHMARKS else 50)
    if stem in BENCHMARKS:
        assert all(SCORED[stem] in doc["text"] for doc in docs)
    for shots in (0, 3):
        assert contexts(generate, shots) == contexts(choice, shots)
    plain = contexts(choice, 0)
    for i, doc in enumerate(docs):
        assert plain[i] == question(stem, doc)
        assert generate.doc_to_target(doc) == word(doc)
        assert choice.doc_to_target(doc) == doc["label"]
    offered = [instance.args[1] for instance in choice.instances if instance.doc_id == 0]
    assert offered == [f" {w}" for w in docs[0]["choices"]]
    contexts(generate, 0, limit=1)
    settings = {"until": ["\n"], "max_gen_toks": 16, "do_sample": False, "temperature": 0.0}
    assert generate.instances[0].args[1] == settings
    assert generate.config.metadata["version"] == choice.config.metadata["version"] == 1.0


@pytest.mark.parametrize("stem", STEMS)
def test_shots_come_from_training_rows_with_their_labels(manager, tiny, stem):
    task = load(manager, f"softverb_{stem}")
    answers = {question(stem, doc): word(doc) for doc in task.training_docs()}
    *shots, last = contexts(task, 5, limit=1)[0].split("\n\n")
    assert last == question(stem, task.eval_docs[0])
    assert len(set(shots)) == 5
    for shot in shots:
        prompt, _, answer = shot.rpartition(": ")
        assert answers[prompt + ":"] == answer
    if stem.startswith("labels_"):  # rows alternate, so five shots show the five labels
        assert [shot.rpartition(": ")[2] for shot in shots] == labelsets.label_words(stem.removeprefix("labels_"))


@pytest.mark.parametrize("stem", ["subj", "boolq"])
@pytest.mark.parametrize("twin", ["", "_mc"])
def test_f28_document_text_is_rendered_byte_for_byte(manager, tmp_path, monkeypatch, stem, twin):
    rng = random.Random(0)
    alphabet = "{}%#\"'\\\n\r\t\x00\u200b<>&=,:-[]!|§é你 ab"
    texts = NASTY + ["x" + "".join(rng.choices(alphabet, k=40)) + "x" for _ in range(100)]
    rows = rows_for(stem, texts)
    (tmp_path / stem).mkdir()
    for split in BENCHMARKS[stem].splits:
        (tmp_path / stem / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv(DATA_DIR, str(tmp_path))
    task = load(manager, f"softverb_{stem}{twin}")
    plain, shot = contexts(task, 0), contexts(task, 1)
    for i, text in enumerate(texts):
        expected = f"Passage: {text} Question: is {text} so? Answer:" if stem == "boolq" else f"Sentence: {text} Label:"
        assert plain[i].encode() == expected.encode()
        assert shot[i].endswith("\n\n" + expected)
        assert any(shot[i].startswith(plain[j] + " ") for j in range(len(texts)))


REPLIES = {
    " positive": 1.0,
    "positive": 1.0,
    " Positive.": 1.0,
    '"POSITIVE"': 1.0,
    "\n positive \nSentence: more": 1.0,
    "positive\r\nnegative": 1.0,
    "negative": 0.0,
    "not positive": 0.0,
    "positively": 0.0,
    "": 0.0,
    "\n\n": 0.0,
    "negative\npositive": 0.0,
}


@pytest.mark.parametrize("reply", REPLIES)
def test_first_line_of_a_reply_is_compared_without_case_and_punctuation(manager, tiny, reply):
    task = load(manager, "softverb_sst2")
    contexts(task, 0, limit=2)
    instance = task.instances[1]
    assert task.doc_to_target(instance.doc) == "positive"
    for each in task.instances:
        each.resps = [reply]
    task.apply_filters()
    scores = task.process_results(instance.doc, [instance.filtered_resps["first_line"]])
    assert scores["exact_match"] == REPLIES[reply]


def test_whole_run_gives_every_metric_with_its_standard_error(manager, tiny):
    import lm_eval

    groups = {f"softverb_{kind}{twin}": twin for kind in ("benchmarks", "labels") for twin in ("", "_mc")}
    settings = {"limit": 4, "num_fewshot": 1, "log_samples": False}
    result = lm_eval.simple_evaluate(model="dummy", tasks=list(groups), task_manager=manager, **settings)
    for group, twin in groups.items():
        keys = ["acc{},none", "acc_norm{},none"] if twin else ["exact_match{},first_line"]
        members = result["group_subtasks"][group]
        assert len(members) in (8, 12)
        for key in keys:
            values = [result["results"][member][key.format("")] for member in members]
            assert result["groups"][group][key.format("")] == pytest.approx(sum(values) / len(values))
            for scored in (group, *members):
                assert isinstance(result["results"][scored][key.format("_stderr")], float)
    assert set(map(str, result["versions"].values())) == {"1.0"}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_tasks_on_the_real_files(manager, monkeypatch, name):
    if not (SHARED / name).is_dir():
        pytest.skip("the real copies in ../shared/data are not on this machine")
    monkeypatch.setenv(DATA_DIR, str(SHARED))
    generate, choice = load(manager, f"softverb_{name}"), load(manager, f"softverb_{name}_mc")
    assert len(generate.eval_docs) == len(choice.eval_docs) == REAL_COUNTS[name]
    assert contexts(generate, 2, limit=5) == contexts(choice, 2, limit=5)
    doc = generate.eval_docs[0]
    assert contexts(generate, 0, limit=1)[0] == question(name, doc)
    assert generate.doc_to_target(doc) == word(doc)
