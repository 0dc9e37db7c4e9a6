"""Both verbalize tasks through the harness: every number against direct computation, and what reaches files."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lm_eval_softverb.errors import ConfigError
from lm_eval_softverb.metrics import label_scores, phrase_scores, ranks, similarity, tasks
from lm_eval_softverb.metrics.rouge import rouge_l
from lm_eval_softverb.plugin import task_dir

CORPUS = ["mpr_pred", "mpr_gold", "mpr_pred_half", "mpr_gold_half"]
SIMILAR = ["rouge_l", "cosine", "percentile_rank", "cosine_of_cut_text"]
MEANS = {
    "verbalize_labels": ["recall", "precision", "f1", "phrase_f1", "recall_first_part", *SIMILAR],
    "verbalize_instructions": SIMILAR,
}
SETS = [["red", "blue"], ["cat", "guinea pig"], ["up", "down", "left"], ["[a]", "b"], ["one", "two"], ["soup", "tea"]]
INSTRUCTIONS = [
    "[Add the two numbers.]",
    "Say {{ 7*7 }} in French.",
    "Name the city.\n\nOnly one.",
    "word " * 25,
    "Sort the words.",
]
JUNK = ["", "dog | cat " + "hm " * 20, "", "nothing at all, b\na", "", "soup and tea and x"]


@pytest.fixture
def bank(tmp_path):
    rows = [{"prompt_id": f"l{i}", "path": f"l{i}", "labels": labels} for i, labels in enumerate(SETS)]
    rows += [{"prompt_id": f"i{i}", "path": f"i{i}", "instruction": text} for i, text in enumerate(INSTRUCTIONS)]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path)


def answer(doc) -> str:
    """The gold text for documents of even number, junk for the others."""
    i = int(doc["prompt_id"][1:])
    return JUNK[i] if i % 2 else doc["target"]


@pytest.fixture
def run(bank, monkeypatch):
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class Reader(LM):
        def __init__(self):
            super().__init__()
            self.requests = []

        def generate_until(self, requests, disable_tqdm=False):
            self.requests += requests
            return [answer(request.doc) for request in requests]

        def loglikelihood(self, requests, disable_tqdm=False):
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _results: None)  # runs pip

    def go(names=tuple(MEANS), metadata=None, **kw):
        manager = TaskManager(
            include_path=str(task_dir()), include_defaults=False, metadata={"bank": bank} if metadata is None else metadata
        )
        lm = Reader()
        return lm, lm_eval.simple_evaluate(model=lm, tasks=list(names), task_manager=manager, bootstrap_iters=100, **kw)

    return go


def expected(name, pairs) -> dict[str, float]:
    """Every metric from single comparisons, without the tasks' own code."""
    kind = name.removeprefix("verbalize_")

    def cos(a, b):
        x, y = (similarity.embed([t])[0].astype(float) for t in (a, b))
        return round(float(x @ y), 6)

    def rank(gold, text):
        own = cos(gold, text)
        rivals = [cos(p, text) for p in ranks.pool(kind) if p != gold]
        return np.mean([1.0 if own > r else 0.5 if own == r else 0.0 for r in rivals])

    scores = {
        "rouge_l": [rouge_l(text, gold) for gold, text in pairs],
        "cosine": [cos(gold, text) for gold, text in pairs],
        "percentile_rank": [rank(gold, text) for gold, text in pairs],
        "cosine_of_cut_text": [float(max(len(gold.split()), len(text.split())) > 20) for gold, text in pairs],
    }
    if kind == "labels":
        sets = [(text, labels) for (_, text), labels in zip(pairs, SETS, strict=False)]
        for key in ("recall", "precision", "f1"):
            scores[key] = [label_scores(text, labels)[key] for text, labels in sets]
        scores["phrase_f1"] = [phrase_scores(text, labels)["f1"] for text, labels in sets]
        heads = [text.replace("\n", "|").split("|")[0] for text, _ in sets]
        scores["recall_first_part"] = [label_scores(h, labels)["recall"] for h, (_, labels) in zip(heads, sets, strict=True)]
    n = len(pairs)
    c = [[cos(gold, text) for _, text in pairs] for gold, _ in pairs]
    other = [(a, b) for a in range(n) for b in range(n) if a != b]
    corpus = {
        "mpr_pred": np.mean([[c[j][j] >= c[i][j] for i in range(n)] for j in range(n)]),
        "mpr_gold": np.mean([[c[i][i] >= c[i][j] for j in range(n)] for i in range(n)]),
        "mpr_pred_half": np.mean([(c[j][j] > c[i][j]) + 0.5 * (c[j][j] == c[i][j]) for i, j in other]),
        "mpr_gold_half": np.mean([(c[i][i] > c[i][j]) + 0.5 * (c[i][i] == c[i][j]) for i, j in other]),
    }
    errors = {f"{k}_stderr": np.std(v, ddof=1) / np.sqrt(n) for k, v in scores.items()}
    return {k: np.mean(v) for k, v in scores.items()} | corpus | errors


def test_every_number_of_both_tasks(hashing, run):
    _, results = run(num_fewshot=0)
    texts = {"verbalize_labels": [", ".join(s) for s in SETS], "verbalize_instructions": INSTRUCTIONS}
    for name, golds in texts.items():
        pairs = [(gold, JUNK[i] if i % 2 else gold) for i, gold in enumerate(golds)]
        found = {k.removesuffix(",none"): v for k, v in results["results"][name].items() if k.endswith(",none")}
        corpus_errors = {k: found.pop(f"{k}_stderr") for k in CORPUS}
        assert set(corpus_errors.values()) == {"N/A"}
        assert set(found) == {*CORPUS, *MEANS[name], *(f"{m}_stderr" for m in MEANS[name])}
        assert found == pytest.approx(expected(name, pairs))
        assert all(type(value) in (float, np.float64) for value in found.values())
        assert found["percentile_rank_stderr"] > 0
        assert results["n-samples"][name] == {"original": len(golds), "effective": len(golds)}
        assert results["configs"][name]["metadata"]["rank_pool"] == ranks.pool_version()
        assert results["higher_is_better"][name] == {m: m != "cosine_of_cut_text" for m in [*MEANS[name], *CORPUS]}
    assert results["results"]["verbalize_labels"]["recall,none"] not in (0.0, 1.0)
    assert results["results"]["verbalize_instructions"]["cosine_of_cut_text,none"] == pytest.approx(2 / 5)


def test_what_a_model_is_asked(hashing, run):
    """The prompt's name, greedy, no stop sequences of the harness's own."""
    lm, _ = run()
    assert [r.args[0] for r in lm.requests] == [r.doc["prompt_id"] for r in lm.requests]
    for request in lm.requests:
        limit = 40 if request.task_name == "verbalize_labels" else 100
        assert request.args[1] == {"until": [], "max_gen_toks": limit, "do_sample": False, "temperature": 0.0}


def test_samples_and_tables_are_plain_json(hashing, run):
    from lm_eval.utils import make_table

    _, results = run()
    back = json.loads(json.dumps(results["samples"], allow_nan=False))  # no default=: plain types only
    for name, samples in back.items():
        for sample in samples:
            assert set(sample["metrics"]) == {*MEANS[name], *CORPUS}
            assert sample["target"] == sample["doc"]["target"]  # also with brackets, braces and empty lines
            assert sample["mpr_pred"] == [sample["doc"]["target"], answer(sample["doc"])]
            assert all(isinstance(sample[metric], float) for metric in MEANS[name])
    assert json.loads(json.dumps(results["results"], allow_nan=False))
    assert " at 0x" not in json.dumps(results["configs"], default=str), "a function without source code in the results"
    table = make_table(results)
    assert "mpr_pred_half" in table and "percentile_rank" in table


@pytest.mark.parametrize("limit", [1, 3])
def test_a_limit_takes_the_first_documents(hashing, run, limit):
    _, results = run(limit=limit)
    full = run()[1]["samples"]
    for name, samples in results["samples"].items():
        assert len(samples) == limit
        for one, same in zip(samples, full[name], strict=False):
            assert {m: one[m] for m in MEANS[name]} == {m: same[m] for m in MEANS[name]}, "no score depends on other documents"
    if limit == 1:
        assert results["results"]["verbalize_labels"]["mpr_pred_half,none"] == 0.5


def test_a_corpus_is_encoded_in_one_batch(hashing):
    pairs = [(f"gold {i}", f"text {i}") for i in range(9)]
    for metric in CORPUS:
        getattr(tasks, metric)(pairs)
    assert [len(texts) for texts in hashing.seen] == [18]


def test_few_shot_is_not_for_these_tasks(hashing, run):
    lm, results = run(num_fewshot=3)
    assert [r.args[0] for r in lm.requests] == [r.doc["prompt_id"] for r in lm.requests]
    assert set(results["n-shot"].values()) == {0}


def test_without_a_bank_the_task_says_what_to_pass(hashing, run):
    with pytest.raises(ConfigError, match="--model_args bank=DIR"):
        run(metadata={"peft": "prompts/one"})
