"""A chat endpoint as a model of the harness: what is sent, what is scored, what it costs, and what is refused."""

from __future__ import annotations

import json
import sqlite3

import pytest
from fault_server import Server, good
from toys import CHOICE_TASK, GENERATE_TASK

pytest.importorskip("openai", reason="needs the extra [api]")

from lm_eval_softverb.errors import ArtifactError, ConfigError, DataError, PlanOnly
from lm_eval_softverb.models.hardprompt_chat import HardPromptChatLM

CANARY = "sk-canary-0123456789"


@pytest.fixture
def chat(monkeypatch, tmp_path):
    """``chat(script, content=text or lines, …)`` → (server, model)."""
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers = []

    def start(script=(), content=None, delay=0.0, **settings):
        servers.append(Server(script, delay))
        if isinstance(content, str):
            (tmp_path / "p.txt").write_text(content, encoding="utf-8")
            settings["prompt_file"] = str(tmp_path / "p.txt")
        elif content is not None:
            (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content), encoding="utf-8")
            settings["prompt_file"] = str(tmp_path / "p.jsonl")
        return servers[-1], HardPromptChatLM(model="asked-model", base_url=servers[-1].url, **settings)

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def prices(tmp_path):
    path = tmp_path / "prices.json"
    path.write_text(json.dumps({"asked-model": {"in": 1000.0, "out": 10000.0}}))
    return str(path)


def sent(server):
    return sorted(server.requests, key=lambda r: r["messages"][-1]["content"])


REVIEWS = sorted(f"Review: {row['text']} Sentiment:" for row in GENERATE_TASK["rows"])


# --- what is sent ----------------------------------------------------------------------------------------------------


def test_without_a_prompt_one_user_message(chat, evaluate):
    server, lm = chat()
    results = evaluate(lm, [GENERATE_TASK])
    assert [r["messages"] for r in sent(server)] == [[{"role": "user", "content": t}] for t in REVIEWS]
    assert {(r["temperature"], r["max_tokens"]) for r in server.requests} == {(0, 6)}
    assert {k: results["config"]["hardprompt"][k] for k in ("template", "n_texts")} == {"template": "none", "n_texts": 0}


@pytest.mark.parametrize("rendered", [False, True])
def test_the_papers_template(rendered, chat, evaluate):
    server, lm = chat(content="Good or bad?\n")
    evaluate(lm, [GENERATE_TASK], apply_chat_template=rendered)
    assert [r["messages"] for r in sent(server)] == [[{"role": "user", "content": f"Good or bad?\n\n{t}"}] for t in REVIEWS]


@pytest.mark.parametrize("rendered", [False, True])
def test_the_system_template_and_prompts_per_document(rendered, chat, evaluate):
    lines = [{"prompt_id": f"p{i}", "text": f"Prompt {i} {{{{7*7}}}}"} for i in range(2)]
    server, lm = chat(content=lines, template="system")
    results = evaluate(lm, [GENERATE_TASK], apply_chat_template=rendered)
    for row in GENERATE_TASK["rows"]:
        system = {"role": "system", "content": f"Prompt {row['label']} {{{{7*7}}}}"}
        user = {"role": "user", "content": f"Review: {row['text']} Sentiment:"}
        assert sum(r["messages"] == [system, user] for r in server.requests) == 1
    assert results["config"]["hardprompt"]["requests_by_prompt"] == {"p0": 4, "p1": 4}


def test_few_shot_turns_and_a_system_message_of_the_task_stay(chat, evaluate):
    server, lm = chat(content="Good or bad?", template="system")
    arguments = {"num_fewshot": 1, "apply_chat_template": True, "fewshot_as_multiturn": True}
    evaluate(lm, [{**GENERATE_TASK, "description": "Be brief."}], **arguments)
    for request in server.requests:
        assert [m["role"] for m in request["messages"]] == ["system", "user", "assistant", "user"]
        assert request["messages"][0]["content"] == "Good or bad?\n\nBe brief."


def test_stop_sequences_cut_the_answer_here(chat, evaluate):
    _, lm = chat([(200, good("positive\nand more"), {})] * 8)
    results = evaluate(lm, [GENERATE_TASK])
    assert results["results"]["toy_gen"]["exact_match,none"] == 0.5


def test_settings_of_the_task_and_of_the_model(chat, evaluate):
    server, lm = chat(temperature=0.5, tokens_field="max_completion_tokens")
    task = {**GENERATE_TASK, "generation_kwargs": {"until": [], "top_p": 0.9, "top_k": 5}}
    results = evaluate(lm, [task])
    assert {(r["temperature"], r["max_completion_tokens"], r["top_p"]) for r in server.requests} == {(0.5, 256, 0.9)}
    assert results["config"]["endpoint"]["ignored_settings"] == ["top_k"]


# --- records ---------------------------------------------------------------------------------------------------------


def test_usage_cost_and_the_served_model(chat, evaluate, prices):
    _, lm = chat([(500, {}, {"Retry-After": "0"})], prices=prices, concurrency=2)
    facts = evaluate(lm, [GENERATE_TASK])["config"]["endpoint"]
    assert facts["usage"] == {"prompt_tokens": 56, "completion_tokens": 24}
    assert facts["cost"] == pytest.approx((56 * 1000 + 24 * 10000) / 1e6)
    assert (facts["requests"], facts["retries"], facts["unscored"], facts["served_model"]) == (8, 1, 0, "served-model")
    assert facts["seconds"] > 0 and facts["median_latency"] > 0
    json.dumps(facts)


def test_without_prices_the_cost_is_unknown(chat, evaluate):
    assert evaluate(chat()[1], [GENERATE_TASK])["config"]["endpoint"]["cost"] is None


def test_a_plan_sends_nothing(chat, evaluate, prices):
    server, lm = chat(plan=True, prices=prices)
    with pytest.raises(PlanOnly, match=r"8 requests.*at most 48 completion.*\$.*Nothing was sent") as stop:
        evaluate(lm, [GENERATE_TASK])
    assert server.requests == [] and stop.value.plan.requests == 8
    _, lm = chat(plan=True)
    with pytest.raises(PlanOnly) as stop:
        evaluate(lm, [GENERATE_TASK])
    assert "$" not in str(stop.value)


# --- cache -----------------------------------------------------------------------------------------------------------


def test_the_cache_goes_by_what_is_sent(chat, evaluate, tmp_path):
    server, _ = chat()

    def run(content=None, cached=0, **settings):
        if content:
            (tmp_path / "q.txt").write_text(content)
            settings["prompt_file"] = str(tmp_path / "q.txt")
        lm = HardPromptChatLM(model="m", base_url=server.url, **settings)
        assert evaluate(lm, [GENERATE_TASK], use_cache=str(tmp_path / "c"))["config"]["endpoint"]["n_from_cache"] == cached

    run()
    run(cached=8, concurrency=2, timeout=9)
    run("Good or bad?")
    run("Good or bad?", template="system")
    run("Good or bad?", cached=8)
    assert len(server.requests) == 24


def test_repeats_are_answers_of_their_own_and_are_cached_too(chat, evaluate, tmp_path):
    task = {**GENERATE_TASK, "repeats": 2, "generation_kwargs": {"until": ["\n"], "do_sample": True, "temperature": 0.7}}
    server, lm = chat()
    evaluate(lm, [task], use_cache=str(tmp_path / "c"))
    assert len(server.requests) == 16 and {r["seed"] for r in server.requests} == {0, 1}
    again = evaluate(HardPromptChatLM(model="asked-model", base_url=server.url), [task], use_cache=str(tmp_path / "c"))
    assert len(server.requests) == 16 and again["config"]["endpoint"]["n_from_cache"] == 16


@pytest.mark.parametrize("value", ['"text"', "{}", '{"text": 3}'])
def test_a_cache_with_something_else_inside_is_refused(value, chat, evaluate, tmp_path):
    server, lm = chat()
    evaluate(lm, [GENERATE_TASK], use_cache=str(tmp_path / "c"))
    lm.ledger.close()
    with sqlite3.connect(tmp_path / "c_rank0.db") as db:
        db.execute("UPDATE softverb_answers_v1 SET answer = ?", (value,))
    with pytest.raises(ArtifactError, match="cache"):
        evaluate(HardPromptChatLM(model="asked-model", base_url=server.url), [GENERATE_TASK], use_cache=str(tmp_path / "c"))
    assert len(server.requests) == 8


# --- refused ---------------------------------------------------------------------------------------------------------


def test_log_likelihoods_name_the_twin(chat, evaluate):
    server, lm = chat()
    with pytest.raises(ConfigError, match=r"toy_mc need; use the generation tasks toy\."):
        evaluate(lm, [CHOICE_TASK])
    assert server.requests == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"api_key": "abc"}, "secret"),
        ({"OPENAI_API_KEY": "abc"}, "secret"),
        ({"base_url": "http://127.0.0.1/sk-0123456789abc"}, "secret"),
        ({"prompt": "a"}, "commas"),
        ({"concurency": 3}, "Did you mean"),
        ({"max_dollars": 1.0}, "prices"),
        ({"template": "system"}, "control"),
        ({"concurrency": 0}, "positive"),
    ],
)
def test_refused_arguments(arguments, reason, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    with pytest.raises(ConfigError, match=reason) as stop:
        HardPromptChatLM(**arguments)
    assert "abc" not in str(stop.value)


def test_a_document_without_a_prompt_is_found_before_anything_is_sent(chat, evaluate):
    server, lm = chat(content=[{"prompt_id": "p0", "text": "a"}])
    with pytest.raises(DataError, match="'p1'"):
        evaluate(lm, [GENERATE_TASK])
    assert server.requests == []
