"""The tasks dod_* through the harness with a model that answers by rule: every number against direct computation."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from toy_dods import SMALL, PlainDod, task, tasks, write_clone

from lm_eval_softverb.data import dod_classification
from lm_eval_softverb.data.dod import DodTask
from lm_eval_softverb.data.dod_general import GeneralDod
from lm_eval_softverb.data.rows import Row
from lm_eval_softverb.errors import ArtifactError, ConfigError, DataError, ModelUnavailable
from lm_eval_softverb.metrics import dod as metrics
from lm_eval_softverb.metrics.dod import exact_match
from lm_eval_softverb.metrics.rouge import rouge_l
from lm_eval_softverb.plugin import task_dir

GENERAL = ["dod_general", "dod_general_gold"]
CLASSIFICATION = ["dod_classification", "dod_classification_gold"]
CHOICE = ["dod_classification_mc", "dod_classification_gold_mc"]


def answer(doc) -> str:
    """Right, right but for form, half right, or nothing, by the input's length and target."""
    kind = sum(map(ord, doc["input"] + doc["target"])) % 4
    target = doc["target"]
    return [target, f" {target.upper()}. ", f"{target.split()[0]} and more\n{target}", ""][kind]


def loglikelihood(context: str, continuation: str) -> float:
    return -float(sum(map(ord, context)) * 7 % (3 + sum(map(ord, continuation))))


@pytest.fixture
def run(monkeypatch):
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class Rule(LM):
        def __init__(self):
            super().__init__()
            self.requests = []

        def generate_until(self, requests, disable_tqdm=False):
            self.requests += requests
            return [answer(request.doc) for request in requests]

        def loglikelihood(self, requests, disable_tqdm=False):
            self.requests += requests
            return [(loglikelihood(*request.args), False) for request in requests]

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            raise NotImplementedError

    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _results: None)  # runs pip

    def go(names, metadata, **kw):
        manager = TaskManager(include_path=str(task_dir()), include_defaults=False, metadata=metadata)
        lm = Rule()
        return lm, lm_eval.simple_evaluate(model=lm, tasks=list(names), task_manager=manager, bootstrap_iters=100, **kw)

    return go


@pytest.fixture
def general(tmp_path, monkeypatch):
    """Folder of a bank over a tiny clone, and its DoD; one test task has fewer rows than the others."""
    monkeypatch.setenv("SOFTVERB_CACHE", str(tmp_path / "cache"))
    given = tasks()
    given["task4_black_four"] = task("black", "test", Instances=given["task4_black_four"]["Instances"][:12])
    for instance in given["task4_black_four"]["Instances"]:
        del instance["output"][1:]
    given["task4_black_four"]["Definition"] = ["{{ 7*7 }}\nSay [black]."]
    settings = {**SMALL, "rows": 15, "heldout": 9}
    dod = GeneralDod.open(write_clone(tmp_path / "ni", given), **settings)
    write_bank(tmp_path / "bank", dod)
    return tmp_path / "bank", dod


def write_bank(folder, dod, /, **changes):
    folder.mkdir(exist_ok=True)
    lines = [
        {
            "prompt_id": f"p-{name}",
            "path": name,
            "task": name,
            "split": dod.task(name).split,
            "dod": dod.reference(),
            "heldout_sha256": dod.task(name).info["heldout_sha256"],
            **changes,
        }
        for name in dod.names()
    ]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def mean_error(values):
    return pytest.approx(np.mean(values)), pytest.approx(np.std(values, ddof=1) / np.sqrt(len(values)))


def check(results, name, scored, filtered="none"):
    """Micro, macro and per-task numbers of one harness task from ``scored``: (DoD task, {metric: score}) per document."""
    found = results["results"][name]
    metrics_ = list(scored[0][1])
    by_task = {record["task"]: record for record in found[f"by_task,{filtered}"]}
    assert list(by_task) == list(dict.fromkeys(task for task, _ in scored))
    for metric in metrics_:
        values = [scores[metric] for _, scores in scored]
        assert (found[f"{metric},{filtered}"], found[f"{metric}_stderr,{filtered}"]) == mean_error(values)
        assert 0 < found[f"{metric},{filtered}"] < 1
        groups = {each: [s[metric] for t, s in scored if t == each] for each in by_task}
        assert found[f"macro_{metric},{filtered}"] == pytest.approx(np.mean([np.mean(v) for v in groups.values()]))
        for each, values in groups.items():
            assert by_task[each]["n"] == len(values)
            assert (by_task[each][metric], by_task[each][f"{metric}_stderr"]) == mean_error(values)
    names = {*metrics_, *(f"macro_{m}" for m in metrics_), "by_task"}
    keys = {f"{m}{error},{filtered}" for m in names for error in ("", "_stderr")}
    assert set(found) == {*keys, "name", "alias", "sample_len"}
    assert set(results["higher_is_better"][name]) == names


def test_every_number_of_the_general_tasks(run, general):
    bank, dod = general
    lm, results = run(GENERAL, {"bank": str(bank)})
    names = dod.names("test")
    rows = {name: dod.task(name).heldout for name in names}
    assert len(set(map(len, rows.values()))) == 2  # so that micro and macro differ
    turns = [(name, rows[name][i]) for i in range(9) for name in names if i < len(rows[name])]
    docs = [{"input": row.input, "target": row.output} for _, row in turns]
    texts = [answer(doc) for doc in docs]
    scored = [
        (name, {"rouge_l": rouge_l(text, row.output), "exact_match": exact_match(text, row.output)})
        for (name, row), text in zip(turns, texts, strict=True)
    ]
    for name in GENERAL:
        check(results, name, scored)
        assert results["n-samples"][name]["effective"] == len(turns)
    assert results["results"]["dod_general"]["macro_rouge_l,none"] != results["results"]["dod_general"]["rouge_l,none"]
    asked = {name: [r for r in lm.requests if r.task_name == name] for name in GENERAL}
    assert [r.args[0] for r in asked["dod_general"]] == [doc["input"] for doc in docs]
    definitions = [dod.task(name).instruction for name, _ in turns]
    assert "{{ 7*7 }}\nSay [black]." in definitions
    gold = [f"{definition}\n\n{doc['input']}" for definition, doc in zip(definitions, docs, strict=True)]
    assert [r.args[0] for r in asked["dod_general_gold"]] == gold
    for request in lm.requests:
        assert request.args[1] == {"until": [], "max_gen_toks": 64, "do_sample": False, "temperature": 0.0}
        assert request.doc["prompt_id"] == f"p-{request.doc['task']}"


def test_arms_have_the_same_documents_and_samples_are_plain(run, general):
    from lm_eval.utils import make_table

    from lm_eval_softverb.compare.report import sample_scores

    bank, _ = general
    _, results = run(GENERAL, {"bank": str(bank), "pretrained": "x", "dtype": "float32"})
    samples = json.loads(json.dumps(results["samples"], allow_nan=False))  # no default=: plain types only
    hashes = [[s["doc_hash"] for s in samples[name]] for name in GENERAL]
    assert hashes[0] == hashes[1] and len(set(hashes[0])) == len(hashes[0])
    scores = sample_scores(results)
    assert {metric for _, metric in scores} == {"rouge_l", "exact_match"}
    assert len(scores["dod_general", "rouge_l"]) == len(hashes[0])
    table = make_table(results)
    assert table.count("2 tasks") == 2 and len(table.splitlines()) == 2 + 2 * 5
    assert len(json.loads(json.dumps(results["results"]))["dod_general"]["by_task,none"]) == 2


def test_which_documents(general):
    bank, dod = general

    def docs(**metadata):
        found = metrics.general(**metadata)["test"].to_list()
        return found, Counter(doc["task"] for doc in found)

    test, train = dod.names("test"), dod.names("train")
    assert set(docs(bank=bank)[1]) == set(test)
    assert set(docs(bank=bank, split="train")[1]) == set(train)
    assert docs(bank=bank, rows=2)[1] == dict.fromkeys(test, 2)
    assert docs(bank=bank, rows="1", split="train", version=1.0)[1] == dict.fromkeys(train, 1)
    first = docs(bank=bank, rows=1)[0]
    assert [(d["target"], d["label"], d["choices"]) for d in first] == [
        (dod.task(name).heldout[0].output, -1, []) for name in test
    ]
    # The DoD named directly: stock settings, under which no toy task passes.
    with pytest.raises(DataError, match="holds none"):
        metrics.general(dod=f"general:{dod.path}")
    for bad in (0, "x", -1, True):
        with pytest.raises(ConfigError, match="expected how many held-out rows"):
            metrics.general(bank=bank, rows=bad)


def test_a_dod_named_directly_gives_the_documents_of_its_bank_but_for_the_name(general, monkeypatch):
    bank, dod = general
    monkeypatch.setattr(metrics, "open_dod", lambda source, **kw: dod)
    direct = metrics.general(dod="general:somewhere")["test"].to_list()
    ours = metrics.general(bank=bank)["test"].to_list()
    assert [d["prompt_id"] for d in direct] == [d["task"] for d in ours]
    assert [{**d, "prompt_id": f"p-{d['task']}"} for d in direct] == ours


def test_the_dod_may_have_moved(general, tmp_path):
    bank, _ = general
    wanted = metrics.general(bank=bank)["test"].to_list()
    moved = tmp_path / "elsewhere"
    (tmp_path / "ni").rename(moved)
    with pytest.raises(ModelUnavailable, match="ni is neither a folder here"):
        metrics.general(bank=bank)
    assert metrics.general(bank=bank, dod=f"general:{moved}")["test"].to_list() == wanted


def test_f26_manifests_that_cannot_be_used_say_so(general, tmp_path):
    bank, dod = general
    with pytest.raises(ConfigError, match=r"dod_general got neither a bank nor a DoD.*--metadata"):
        metrics.general()
    with pytest.raises(ArtifactError, match="is no bank"):
        metrics.general(bank=tmp_path)
    with pytest.raises(DataError, match=r"no prompts of a classification DoD; it holds 4 of kind 'general'"):
        metrics.classification(bank=bank)
    with pytest.raises(ConfigError, match="is a general DoD; run the task dod_general"):
        metrics.classification(dod=f"general:{dod.path}")
    with pytest.raises(DataError, match=r"no prompts in split dev; it holds 2 in train, 2 in test"):
        metrics.general(bank=bank, split="dev")
    for changes, message in {
        "heldout_sha256": ("f" * 64, r"manifest\.jsonl:3: the rows held out of task3_green_three are not those"),
        "task": ("task9", r"manifest\.jsonl:1: .*'task9' is not in this DoD|manifest\.jsonl:3: Task 'task9'"),
        "prompt_id": (7, r"manifest\.jsonl:1: 'prompt_id' is 7"),
        "dod": (None, "it holds 4 without 'dod'"),
    }.items():
        value, pattern = message
        write_bank(tmp_path / "bad", dod, **{changes: value})
        with pytest.raises(DataError, match=pattern):
            metrics.general(bank=tmp_path / "bad")
    write_bank(tmp_path / "bad", dod, dod={**dod.reference(), "kind": "general", "source": 3})
    with pytest.raises(DataError, match=r"jsonl:1: 'dod' is"):
        metrics.general(bank=tmp_path / "bad")
    write_bank(tmp_path / "bad", dod, prompt_id="same")
    with pytest.raises(DataError, match=r"jsonl:2: a second prompt is named 'same'"):
        metrics.general(bank=tmp_path / "bad")


def test_a_manifest_does_not_choose_where_verdicts_are_written(general, tmp_path):
    bank, dod = general
    reference = dod.reference()
    reference["settings"]["cache"] = str(tmp_path / "canary")
    write_bank(bank, dod, dod=reference)
    assert metrics.general(bank=bank) and not (tmp_path / "canary").exists()
    assert (tmp_path / "cache" / "dod").is_dir()


# --- classification --------------------------------------------------------------------------------------------------


SETS = {"set1": ("red", "dark blue", "green"), "set2": ("up", "down"), "set3": ("[a]", "{{b}}")}


@pytest.fixture
def classification(tmp_path, monkeypatch):
    given = []
    for number, (name, labels) in enumerate(SETS.items()):
        rows = [Row(f"Sentence: {name} says {i} {'x' * i} Label:", labels[i % len(labels)]) for i in range(9 + 3 * number)]
        given.append(DodTask(name, "train" if name == "set1" else "test", tuple(rows[:2]), tuple(rows[2:]), labels))
    dod = PlainDod(given, "classification")

    class Standin:
        @classmethod
        def open(cls, path, *reading):
            assert str(path) == "some.sqlite"
            return dod

    monkeypatch.setattr(dod_classification, "ClassificationDod", Standin)
    folder = tmp_path / "bank"
    folder.mkdir()
    reference = {"kind": "classification", "source": "some.sqlite"}
    lines = [{"prompt_id": f"p{t.name}", "path": t.name, "task": t.name, "split": t.split, "dod": reference} for t in given]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder, dod


def test_every_number_of_the_classification_tasks(run, classification):
    bank, dod = classification
    lm, results = run([*CLASSIFICATION, *CHOICE], {"bank": str(bank)})
    rows = {name: dod.task(name).heldout for name in ("set2", "set3")}
    turns = [(name, rows[name][i]) for i in range(20) for name in rows if i < len(rows[name])]
    written = []
    for name, row in turns:
        first = (answer({"input": row.input, "target": row.output}).strip().splitlines() or [""])[0]
        written.append((name, {"exact_match": exact_match(first, row.output)}))
    for name in CLASSIFICATION:
        check(results, name, written)
    for name in CHOICE:
        scored = []
        for each, row in turns:
            labels = SETS[each]
            text = f"Classify the sentence as one of: {', '.join(labels)}.\n\n{row.input}" if "gold" in name else row.input
            lls = [loglikelihood(text, f" {label}") for label in labels]
            norm = [value / len(label) for value, label in zip(lls, labels, strict=True)]
            hits = [labels[int(np.argmax(v))] == row.output for v in (lls, norm)]
            scored.append((each, {"acc": float(hits[0]), "acc_norm": float(hits[1])}))
        check(results, name, scored)
    for request in lm.requests:
        labels = SETS[request.doc["task"]]
        gold = f"Classify the sentence as one of: {', '.join(labels)}.\n\n" if "gold" in request.task_name else ""
        assert request.args[0] == gold + request.doc["input"]
        if request.task_name in CHOICE:
            assert request.args[1] in [f" {label}" for label in labels]
        else:
            assert request.args[1] == {"until": ["\n"], "max_gen_toks": 16, "do_sample": False, "temperature": 0.0}
    names = [*CLASSIFICATION, *CHOICE]
    assert len({tuple(s["doc_hash"] for s in results["samples"][name]) for name in names}) == 1


def test_a_row_with_a_label_outside_its_set_is_an_error(classification):
    bank, dod = classification
    odd = DodTask("set2", "test", (), (Row("Sentence: s Label:", "left"),), ("up", "down"))
    dod.given[1] = odd
    with pytest.raises(DataError, match=r"jsonl:2: a held-out row of set2 has label 'left'"):
        metrics.classification(bank=bank)
    dod.given[1] = DodTask("set2", "test", (), (), ("up", "down"))
    with pytest.raises(DataError, match="set2 has no held-out rows"):
        metrics.classification(bank=bank)


@pytest.mark.parametrize(
    ("text", "target", "same"),
    [
        (" Paris. ", "paris", 1.0),
        ("New\n york", "new York", 1.0),
        ("a-b", "ab", 1.0),
        ("Paris, France", "paris", 0.0),
        ("", "paris", 0.0),
        ("", "?", 0.0),
        (" ? ", "?", 1.0),
        ("!", "?", 0.0),
    ],
)
def test_exact_match_forgives_form_only(text, target, same):
    assert exact_match(text, target) == same


def test_one_document_has_no_standard_error():
    (record,) = metrics.by_task([("t", {"acc": 1.0})])
    assert record == {"task": "t", "n": 1, "acc": 1.0, "acc_stderr": None}


def test_one_run_scores_a_whole_bank_as_each_prompt_alone_would(general, ours, random_prompt, monkeypatch):
    import lm_eval
    from lm_eval.tasks import TaskManager

    from lm_eval_softverb.bank import Bank
    from lm_eval_softverb.prompt import SoftPrompt

    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _results: None)  # runs pip
    folder, dod = general
    names = dod.names("test")
    prompts = {name: random_prompt(seed) for seed, name in enumerate(names)}
    entries = [{"prompt_id": f"p-{n}", "task": n, "split": "test", "dod": dod.reference()} for n in names]
    Bank.save(folder, [(SoftPrompt.load(prompts[n]), entry) for n, entry in zip(names, entries, strict=True)])

    def answers(**arguments) -> dict[str, list[str]]:
        manager = TaskManager(include_path=str(task_dir()), include_defaults=False, metadata={"bank": str(folder), "rows": 3})
        lm = ours("llama", batch_size=4, **arguments)
        out = lm_eval.simple_evaluate(model=lm, tasks=["dod_general"], task_manager=manager, gen_kwargs={"max_gen_toks": 5})
        found: dict[str, list[str]] = {}
        for s in out["samples"]["dod_general"]:
            found.setdefault(s["doc"]["task"], []).append(s["filtered_resps"][0])
        return found

    whole = answers(bank=str(folder))
    alone = {name: answers(peft=prompts[name])[name] for name in names}
    assert whole == alone and all(len(texts) == 3 for texts in whole.values())
    assert answers() != whole  # the prompts do change what is answered
