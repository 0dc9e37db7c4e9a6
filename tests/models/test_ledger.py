"""``--use_cache`` for our models: a second run computes nothing, and no answer is ever another prompt's or model's."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import torch
from toys import (
    CHOICE_TASK,
    GENERATE_TASK,
    assert_same_scores,
    exported,
    generate_until,
    logged,
    loglikelihood,
    make_instances,
    rolling,
)

from lm_eval_softverb.bank import Bank
from lm_eval_softverb.models.ledger import Ledger, answered
from lm_eval_softverb.prompt import SoftPrompt

TASKS = [CHOICE_TASK, GENERATE_TASK]


def forwards(lm):
    """A counter of the model's forward passes."""
    calls = []
    lm.model.register_forward_pre_hook(lambda _m, _i: calls.append(1))
    return calls


@pytest.fixture
def cached(ours, tmp_path):
    """``cached(name, …)`` → a model whose requests go to one ledger file."""

    def build(name, **kwargs):
        lm = ours(name, batch_size=4, **kwargs)
        lm.ledger = Ledger(tmp_path / "answers.db")
        return lm

    return build


def answers(results):
    return [logged(results, t["task"]) for t in TASKS]


# --- through the harness ---------------------------------------------------------------------------------------------


def test_a_second_run_calls_the_model_for_nothing(ours, random_prompt, evaluate, tmp_path):
    prompt, cache = random_prompt(), str(tmp_path / "cache")
    plain = evaluate(ours("llama", peft=prompt, batch_size=4), TASKS)
    first = evaluate(ours("llama", peft=prompt, batch_size=4), TASKS, use_cache=cache)
    lm = ours("llama", peft=prompt, batch_size=4)
    calls = forwards(lm)
    second = evaluate(lm, TASKS, use_cache=cache)
    assert calls == []
    assert answers(second) == answers(first) == answers(plain)
    assert second["results"] == first["results"] == plain["results"]
    assert second["config"]["softprompt"]["n_from_cache"] == 24
    assert first["config"]["softprompt"]["n_from_cache"] == 0
    assert (tmp_path / "cache_rank0.db").exists()


def test_other_models_keep_the_harness_cache(stock, evaluate, tmp_path):
    hflm = stock("llama")
    first = evaluate(hflm, [CHOICE_TASK], use_cache=str(tmp_path / "cache"))
    second = evaluate(hflm, [CHOICE_TASK], use_cache=str(tmp_path / "cache"))
    assert logged(first, "toy_mc") == logged(second, "toy_mc")
    with sqlite3.connect(tmp_path / "cache_rank0.db") as db:
        (count,) = db.execute("SELECT COUNT(*) FROM unnamed").fetchone()
    assert count == 16


def test_sampled_answers_are_not_cached(ours, evaluate, tmp_path):
    task = {**GENERATE_TASK, "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0}}
    for _ in range(2):
        lm = ours("llama", batch_size=4)
        calls = forwards(lm)
        evaluate(lm, [task], use_cache=str(tmp_path / "cache"))
        assert calls


# --- what an answer depends on ---------------------------------------------------------------------------------------


def test_every_kind_of_request_is_restored_as_it_was(cached, pairs, texts):
    first, second = cached("llama"), cached("llama")
    expected = loglikelihood(first, pairs), rolling(first, texts), generate_until(first, texts)
    calls = forwards(second)
    got = loglikelihood(second, pairs), rolling(second, texts), generate_until(second, texts)
    assert calls == []
    assert got == expected
    assert all(isinstance(a, tuple) and isinstance(a[1], bool) for a in got[0])
    assert second.counters.from_cache == len(pairs) + 2 * len(texts)


def variants(ours, random_prompt, tiny):
    """Models that must never share an answer, by what tells them apart."""
    a, b = random_prompt(1), random_prompt(2)
    same_rows = SoftPrompt.load(a).embeddings
    return {
        "no prompt": {},
        "prompt a": {"peft": a},
        "prompt b": {"peft": b},
        "a after bos": {"peft": random_prompt(1, placement="after_bos")},
        "part of a": {"peft": str(SoftPrompt(same_rows[:4]).save(Path(a).parent / "part"))},
        "other weights": {"seed": 7},
        "bfloat16": {"dtype": "bfloat16"},
        "mixed precision": {"mixed_precision_dtype": "bfloat16"},
        "short context": {"max_length": 12},
        "no bos": {"add_bos_token": False},
    }


def test_no_two_settings_share_answers(tiny, ours, random_prompt, tmp_path, pairs, texts):
    from lm_eval_softverb.models.softprompt import SoftPromptLM

    requests = [p for p in pairs if p[0]][:10]
    for name, arguments in variants(ours, random_prompt, tiny).items():
        arguments = dict(arguments)
        folder = tiny("llama", seed=arguments.pop("seed", 0))
        clean = SoftPromptLM(pretrained=folder, batch_size=4, **arguments)
        lm = SoftPromptLM(pretrained=folder, batch_size=4, **arguments)
        lm.ledger = Ledger(tmp_path / "answers.db")
        for _ in range(2):
            assert loglikelihood(lm, requests) == loglikelihood(clean, requests), name
            assert rolling(lm, texts[:3]) == rolling(clean, texts[:3]), name
        assert lm.counters.from_cache == 13, name
        lm.ledger.close()


def test_a_bank_keeps_the_answers_of_its_prompts_apart(cached, ours, tmp_path):
    """Documents with the same text but another prompt: the harness's own key cannot tell them apart."""
    prompts = [SoftPrompt(torch.randn(3, 32, generator=torch.Generator().manual_seed(i))) for i in range(2)]
    folder = str(Bank.save(tmp_path / "bank", [(p, {"prompt_id": f"p{i}"}) for i, p in enumerate(prompts)]))
    docs = [{"prompt_id": f"p{i % 2}"} for i in range(4)]
    requests = [("Review: a joy. Sentiment:", " positive")] * 4
    expected = loglikelihood(ours("llama", bank=folder), requests, docs=docs)
    assert expected[0] != expected[1]
    for _ in range(2):
        lm = cached("llama", bank=folder)
        assert_same_scores(loglikelihood(lm, requests, docs=docs), expected)
    assert lm.counters.from_cache == 4
    alone = cached("llama", peft=exported(folder, "p0"))  # the same prompt outside its bank
    assert_same_scores(loglikelihood(alone, requests[:1]), expected[:1])


def test_settings_of_a_generation_are_part_of_its_key(cached, ours, texts):
    lm = cached("llama")
    for settings in ({"max_gen_toks": 3}, {"max_gen_toks": 6}, {"until": ["e"]}, {"repetition_penalty": 2.0}):
        assert generate_until(lm, texts, settings) == generate_until(ours("llama", batch_size=4), texts, settings)
    assert lm.counters.from_cache == 0


def test_repeats_of_a_request_are_kept_apart(tmp_path):
    ledger, computed = Ledger(tmp_path / "a.db"), []

    def compute(part, done):
        for i in range(len(part)):
            computed.append(1)
            done(i, len(computed))
        return list(range(len(computed) - len(part) + 1, len(computed) + 1))

    requests = make_instances("generate_until", ["x", "x", "y", "x"])

    def key(request, repeat):
        return f"{request.args[0]}-{repeat}"

    first = answered(ledger, requests, key, compute)
    assert first == ([1, 2, 3, 4], 0)
    assert answered(ledger, requests, key, compute) == (first[0], 4)
    assert answered(ledger, requests[::-1], key, compute) == ([1, 3, 2, 4], 4)
    assert len(computed) == 4


def test_only_missing_requests_are_computed_and_order_is_kept(cached, ours, pairs):
    loglikelihood(cached("llama"), pairs[::2])
    lm = cached("llama")
    assert_same_scores(loglikelihood(lm, pairs), loglikelihood(ours("llama", batch_size=4), pairs))
    assert 0 < lm.counters.from_cache <= len(pairs[::2])


def test_answers_are_stored_as_they_come_not_at_the_end(cached, texts):
    """What was finished before a crash is there afterwards."""
    lm = cached("llama")
    lm.batch_size_per_gpu = 1
    calls = 0

    def crash(_module, _inputs):
        nonlocal calls
        calls += 1
        if calls > 20:
            raise RuntimeError("crash")

    with lm.model.register_forward_pre_hook(crash), pytest.raises(RuntimeError, match="crash"):
        generate_until(lm, texts)
    again = cached("llama")
    generate_until(again, texts)
    assert 0 < again.counters.from_cache < len(texts)


# --- the file --------------------------------------------------------------------------------------------------------


def test_values_survive_closing_and_are_plain_json(tmp_path):
    ledger = Ledger(tmp_path / "deep" / "a.db")
    values = [[-1.25, True], "text ü\x00\ud800", 0.1, [], ""]
    for i, value in enumerate(values):
        ledger.put(str(i), value)
    ledger.close()
    again = Ledger(tmp_path / "deep" / "a.db")
    assert [again.get(str(i)) for i in range(len(values))] == values
    assert again.get("missing") is None
    assert again.quarantined is None


def test_two_processes_may_share_a_file(tmp_path):
    a, b = Ledger(tmp_path / "a.db"), Ledger(tmp_path / "a.db")
    a.put("x", 1)
    b.put("y", 2)
    assert (a.get("y"), b.get("x")) == (2, 1)


def test_an_answer_that_is_no_json_is_counted_and_computed_again(cached, pairs):
    lm = cached("llama")
    expected = loglikelihood(lm, pairs)
    lm.ledger._db.execute("UPDATE softverb_answers_v1 SET answer = '[1.0, tr' WHERE rowid % 2")
    again = cached("llama")
    assert_same_scores(loglikelihood(again, pairs), expected)
    assert again.get_model_info()["softprompt"]["n_cache_unreadable"] == len(pairs) - again.counters.from_cache > 0
    assert cached("llama").ledger.unreadable == 0
