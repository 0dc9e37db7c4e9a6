"""The tasks dod_* through the harness with a model that answers by rule: every number against direct computation."""

from __future__ import annotations

import json

import numpy as np
import pytest
from toy_dods import PlainDod, general_bank

from lm_eval_softverb.data.dod import DodTask
from lm_eval_softverb.data.dod import classification as dod_classification
from lm_eval_softverb.data.rows import Row
from lm_eval_softverb.errors import DataError
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
    monkeypatch.setenv("SOFTVERB_CACHE", str(tmp_path / "cache"))
    return general_bank(tmp_path)


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
        assert request.args[1] == {
            "until": ["\nInput:", "\nOutput:"],
            "max_gen_toks": 64,
            "do_sample": False,
            "temperature": 0.0,
        }
        assert request.doc["prompt_id"] == f"p-{request.doc['task']}"


def test_arms_have_the_same_documents_and_samples_are_plain(run, general):
    from lm_eval.utils import make_table

    bank, _ = general
    _, results = run(GENERAL, {"bank": str(bank), "pretrained": "x", "dtype": "float32"})
    samples = json.loads(json.dumps(results["samples"], allow_nan=False))  # no default=: plain types only
    hashes = [[s["doc_hash"] for s in samples[name]] for name in GENERAL]
    assert hashes[0] == hashes[1] and len(set(hashes[0])) == len(hashes[0])
    scored = [{m for m in s["metrics"] if isinstance(s[m], float)} for s in samples["dod_general"]]
    assert all(metrics == {"rouge_l", "exact_match"} for metrics in scored) and len(scored) == len(hashes[0])
    table = make_table(results)
    assert table.count("2 tasks") == 2 and len(table.splitlines()) == 2 + 2 * 5
    assert len(json.loads(json.dumps(results["results"]))["dod_general"]["by_task,none"]) == 2


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
