"""F18 to F23 through the harness: a run over an endpoint that fails, runs out of budget, is killed, or repeats the key."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from fault_server import Server, error, good
from toys import GENERATE_TASK, ROOT

pytest.importorskip("openai", reason="needs the extra [api]")

from lm_eval_softverb.errors import BackendError, BudgetExceeded
from lm_eval_softverb.models import hardprompt_chat
from lm_eval_softverb.models.hardprompt_chat import HardPromptChatLM

CANARY = "sk-canary-0123456789"
ROWS = [{"text": f"text number {i}", "label": i % 2} for i in range(24)]
TASK = {**GENERATE_TASK, "rows": ROWS}


@pytest.fixture
def serve(monkeypatch):
    """``serve(script, …)`` → (server, function that makes a model of it)."""
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers = []

    def start(script=(), delay=0.0):
        server = Server(script, delay)
        servers.append(server)

        def model(**settings):
            lm = HardPromptChatLM(model="m", base_url=server.url, **{"attempts": 3, "concurrency": 1} | settings)
            lm.backend._backoff = 0.01
            return lm

        return server, model

    yield start
    for server in servers:
        server.close()


def facts(results):
    return results["config"]["endpoint"]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ((200, good(choices=[]), {}), "no_choices"),
        ((200, good(None), {}), "null_content"),
        ((200, good(""), {}), "empty"),
        ((400, error("content_filter"), {}), "content_filter"),
        ("truncated", "malformed"),
    ],
)
def test_f20_no_usable_reply_is_unscored_counted_and_asked_again_next_time(fault, reason, serve, evaluate, tmp_path):
    server, model = serve([(200, good("positive"), {}), *[fault] * 3])
    results = evaluate(model(), [TASK], use_cache=str(tmp_path / "cache"))
    assert results["results"]["toy_gen"]["sample_len"] == 23
    sample = next(s for s in results["samples"]["toy_gen"] if s["metrics"] == [])
    assert sample["doc_id"] == 1 and sample["resps"] == [[f"[unscored: {reason}]"]] and "exact_match" not in sample
    assert facts(results)["unscored"] == 1 and facts(results)["unscored_by_task"] == {"toy_gen": 1}
    assert facts(results)["refused"] == {reason: 1} and facts(results)["retries"] == 2
    again = evaluate(model(), [TASK], use_cache=str(tmp_path / "cache"))
    assert len(server.requests) == 26 + 1 and facts(again)["unscored"] == 0 and facts(again)["n_from_cache"] == 23


@pytest.mark.parametrize(
    "final", [(401, error("invalid_api_key", f"bad {CANARY}"), {}), (429, error("insufficient_quota"), {})]
)
def test_f19_what_cannot_get_better_ends_the_run_and_keeps_what_is_finished(final, serve, evaluate, tmp_path):
    server, model = serve([(200, good("positive"), {})] * 5 + [final])
    with pytest.raises(BackendError) as stop:
        evaluate(model(), [TASK], use_cache=str(tmp_path / "cache"))
    assert len(server.requests) == 6 and CANARY not in str(stop.value)
    results = evaluate(model(), [TASK], use_cache=str(tmp_path / "cache"))
    assert len(server.requests) == 6 + 19 and facts(results)["n_from_cache"] == 5


def test_f19_answers_under_way_are_kept_too(serve, evaluate, tmp_path):
    server, model = serve([(404, error("model_not_found"), {})], delay=0.1)
    with pytest.raises(BackendError):
        evaluate(model(concurrency=4), [TASK], use_cache=str(tmp_path / "cache"))
    sent = len(server.requests)
    assert sent <= 8
    evaluate(model(concurrency=4), [TASK], use_cache=str(tmp_path / "cache"))
    assert len(server.requests) == 24 + 1  # the refused one twice, no other


def test_f21_all_requests_fail(serve, evaluate):
    _, model = serve([(500, error(), {})] * 99)
    with pytest.raises(BackendError, match="not one of 24"):
        evaluate(model(concurrency=8), [TASK])


def test_f21_a_dead_endpoint_is_given_up_early(serve, evaluate, monkeypatch):
    monkeypatch.setattr(hardprompt_chat, "HOPELESS", 4)
    server, model = serve([(500, error(), {})] * 99)
    with pytest.raises(BackendError, match="last 4 requests"):
        evaluate(model(), [TASK])
    assert len(server.requests) <= 15


def test_f22_answers_belong_to_their_documents(serve, evaluate):
    server, model = serve(delay=0.02)
    results = evaluate(model(concurrency=6), [TASK])
    for sample in results["samples"]["toy_gen"]:
        assert sample["resps"] == [[f"Review: {sample['doc']['text']} Sentiment:"]]
    assert 1 < server.most_open <= 6


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("limit", [{"max_tokens_total": 100}, {"max_dollars": 0.0001}])
def test_f23_a_budget_is_never_passed_and_the_run_goes_on(limit, concurrency, serve, evaluate, tmp_path):
    prices = tmp_path / "prices.json"
    prices.write_text(json.dumps({"m": {"in": 1.0, "out": 1.0}}))
    server, model = serve()
    settings = {"prices": str(prices), "concurrency": concurrency}
    cache = {"use_cache": str(tmp_path / "cache")}
    with pytest.raises(BudgetExceeded, match="limit"):
        evaluate(model(**settings, **limit), [TASK], **cache)
    sent = len(server.requests)  # ten tokens each
    assert 7 <= sent <= 10
    with pytest.raises(BudgetExceeded):  # what the cached answers cost counts
        evaluate(model(**settings, **limit), [TASK], **cache)
    assert len(server.requests) == sent
    results = evaluate(model(**settings), [TASK], **cache)
    assert len(server.requests) == 24
    assert facts(results)["usage"] == {"prompt_tokens": 7 * 24, "completion_tokens": 3 * 24}
    assert facts(results)["cost"] == pytest.approx(240 / 1e6)


SCRIPT = """
import json, sys
import datasets, lm_eval, lm_eval.evaluator
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval_softverb.models.hardprompt_chat import HardPromptChatLM

lm_eval.evaluator.add_env_info = lambda _results: None
url, cache, out, task = sys.argv[1:]
config = json.loads(task)
rows = config.pop("rows")
config["custom_dataset"] = lambda **_kw: {"test": datasets.Dataset.from_list(rows)}
lm = HardPromptChatLM(model="m", base_url=url, concurrency=3)
results = lm_eval.simple_evaluate(
    model=lm, tasks=[ConfigurableTask(config={"test_split": "test", "fewshot_split": "test", **config})],
    task_manager=TaskManager(include_defaults=False), bootstrap_iters=0, use_cache=cache,
)
print(lm, lm.__dict__, lm.backend.__dict__ and lm.backend.identity())
with open(out, "w") as f:
    json.dump({"results": results["results"], "config": results["config"], "samples": results["samples"]}, f, default=str)
"""


def test_kill_9_and_rerun_asks_nothing_again_and_the_key_is_nowhere(serve, tmp_path):
    server, _ = serve(delay=0.12)
    echo = (200, good(f"your key is {CANARY}", model=f"model {CANARY}"), {})
    server.script = [echo]
    whole, _ = serve([echo])

    def start(url, name):
        arguments = [url, str(tmp_path / name), str(tmp_path / f"{name}.json"), json.dumps(TASK)]
        log = (tmp_path / f"{name}.log").open("ab")
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *arguments],
            cwd=ROOT,
            env={**os.environ, "OPENAI_API_KEY": CANARY, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "hf")},
            stdout=log,
            stderr=log,
        )

    uninterrupted = start(whole.url, "whole")
    run = start(server.url, "killed")
    deadline = time.monotonic() + 100
    while len(server.requests) < 10:
        assert time.monotonic() < deadline and run.poll() is None, (tmp_path / "killed.log").read_text()
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    time.sleep(0.3)
    before = len(server.requests)
    assert before < 24
    assert start(server.url, "killed").wait(100) == 0, (tmp_path / "killed.log").read_text()
    assert uninterrupted.wait(100) == 0, (tmp_path / "whole.log").read_text()
    asked = [r["messages"][0]["content"] for r in server.requests]
    assert len(set(asked)) == 24
    assert len(asked) <= 24 + 3  # at most those that were under way
    first, second = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("whole", "killed"))
    assert second["config"]["endpoint"]["n_from_cache"] >= before - 3
    assert first["results"] == second["results"]
    assert first["config"]["endpoint"]["usage"] == second["config"]["endpoint"]["usage"]
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(written) >= 6
    assert [p.name for p in written if CANARY.encode() in p.read_bytes()] == []
    assert any(b"[key]" in p.read_bytes() for p in written)  # the echo did arrive
