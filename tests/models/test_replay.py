"""Recorded outputs score as if a model had just given them; what is missing is an error, what is null is unscored."""

from __future__ import annotations

import json

import pytest
from toys import CHOICE_TASK, GENERATE_TASK, generate_until

from lm_eval_softverb.compare.runs import read_run
from lm_eval_softverb.errors import BackendError, ConfigError, DataError
from lm_eval_softverb.models.replay import ReplayLM


@pytest.fixture
def replay(tmp_path):
    def build(lines):
        path = tmp_path / "outputs.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return ReplayLM(file=str(path))

    return build


def outputs(**changes):
    return [{"doc_id": i, "text": ["positive", "negative"][i % 2] + "\nmore", **changes} for i in range(8)]


def test_a_models_run_replayed_scores_the_same(replay, ours, evaluate):
    first = evaluate(ours("llama", batch_size=4), [GENERATE_TASK])
    samples = first["samples"]["toy_gen"]
    recorded = [{"task": "toy_gen", "doc_hash": s["doc_hash"], "text": s["resps"][0][0]} for s in samples]
    again = evaluate(replay(recorded), [GENERATE_TASK])
    assert again["results"] == first["results"]
    assert [s["filtered_resps"] for s in again["samples"]["toy_gen"]] == [s["filtered_resps"] for s in samples]


def test_by_number_with_counts(replay, evaluate):
    results = evaluate(replay([*outputs(), {"doc_id": 99, "text": "x"}]), [GENERATE_TASK])
    assert results["results"]["toy_gen"]["exact_match,none"] == 1.0
    facts = results["config"]["replay"]
    assert (facts["n_lines"], facts["n_used"], facts["n_unused"], facts["n_cut_at_stop"]) == (9, 8, 1, 8)


def test_null_is_unscored_and_left_out_of_every_metric(replay, evaluate):
    lines = outputs()
    lines[2]["text"] = None
    lines[3]["text"] = "wrong"
    results = evaluate(replay(lines), [GENERATE_TASK])
    found = results["results"]["toy_gen"]
    assert found["exact_match,none"] == pytest.approx(6 / 7) and found["sample_len"] == 7
    sample = next(s for s in results["samples"]["toy_gen"] if s["doc_id"] == 2)
    assert sample["metrics"] == [] and sample["resps"] == [["[unscored: recorded as null]"]]
    assert results["config"]["replay"]["unscored_by_task"] == {"toy_gen": 1}


def test_a_filter_cannot_make_an_answer_of_none(replay, evaluate):
    chain = [{"name": "x", "filter": [{"function": "regex", "regex_pattern": "(unscored|\\w+)"}, {"function": "take_first"}]}]
    lines = outputs()
    lines[0]["text"] = None
    results = evaluate(replay(lines), [{**GENERATE_TASK, "filter_list": chain}])
    assert results["results"]["toy_gen"]["exact_match,x"] == 1.0
    assert results["results"]["toy_gen"]["sample_len"] == 7


def test_compare_reads_unscored_documents(replay, evaluate, tmp_path):
    from lm_eval.loggers import EvaluationTracker

    lines = outputs()
    lines[5]["text"] = None
    results = evaluate(replay(lines), [GENERATE_TASK])
    tracker = EvaluationTracker(output_path=str(tmp_path / "out"))
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    tracker.save_results_samples("toy_gen", samples["toy_gen"])
    task = read_run(tmp_path / "out").tasks["toy_gen"]
    assert len(task.scores["exact_match"]) == 7 and [k.split("/")[1] for k in task.unscored] == ["5"]


def test_nothing_but_null_is_an_error(replay, evaluate):
    with pytest.raises(BackendError, match="not one of 8"):
        evaluate(replay(outputs(text=None)), [GENERATE_TASK])


def test_missing_documents_are_listed(replay, evaluate):
    with pytest.raises(DataError, match=r"2 of 8 documents: toy_gen/6, toy_gen/7\."):
        evaluate(replay(outputs()[:6]), [GENERATE_TASK])


def test_by_prompt_id(replay):
    lm = replay([{"prompt_id": "p0", "text": "zero"}, {"prompt_id": "p1", "task": "toy", "text": "one"}])
    assert generate_until(lm, ["a", "b"], docs=[{"prompt_id": "p1"}, {"prompt_id": "p0"}]) == ["one", "zero"]


def test_numbers_without_a_task_do_not_serve_two_tasks(replay, evaluate):
    other = {**GENERATE_TASK, "task": "other"}
    with pytest.raises(DataError, match="'task'"):
        evaluate(replay(outputs()), [GENERATE_TASK, other])
    both = [line for t in ("toy_gen", "other") for line in outputs(task=t)]
    assert evaluate(replay(both), [GENERATE_TASK, other])["results"]["other"]["exact_match,none"] == 1.0


def test_log_likelihoods_and_repeats_are_refused(replay, evaluate):
    with pytest.raises(ConfigError, match="_mc"):
        evaluate(replay(outputs()), [CHOICE_TASK])
    with pytest.raises(ConfigError, match="one answer"):
        evaluate(replay(outputs()), [{**GENERATE_TASK, "repeats": 2}])


@pytest.mark.parametrize(
    "line",
    [{"text": "a"}, {"doc_id": "0", "text": "a"}, {"doc_id": True, "text": "a"}, {"doc_id": 0}, {"doc_hash": 1, "text": "a"}],
)
def test_bad_lines(line, replay):
    with pytest.raises(DataError, match=r"outputs\.jsonl:1"):
        replay([line])


def test_two_outputs_of_one_document(replay):
    with pytest.raises(DataError, match=":9: a second output"):
        replay([*outputs(), {"doc_id": 0, "text": "b"}])
    with pytest.raises(ConfigError, match="file="):
        ReplayLM()
