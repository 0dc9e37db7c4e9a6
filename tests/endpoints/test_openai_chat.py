"""F18 to F22: an OpenAI-compatible endpoint on the loopback device that fails in every known way."""

from __future__ import annotations

import time

import pytest
from fault_server import Server, error, good

pytest.importorskip("openai", reason="needs the extra [api]")

from lm_eval_softverb.endpoints.backends import ChatRequest
from lm_eval_softverb.endpoints.openai_chat import OpenAIChat, retry_after
from lm_eval_softverb.errors import BackendError, ConfigError

CANARY = "sk-canary-0123456789"


@pytest.fixture
def serve(monkeypatch):
    """``serve(script, …)`` → (server, backend with short waits)."""
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers = []

    def start(script=(), delay=0.0, **settings):
        server = Server(script, delay)
        servers.append(server)
        settings = {"backoff": 0.01, "timeout": 5.0, "attempts": 3, **settings}
        return server, OpenAIChat("asked-model", server.url, **settings)

    yield start
    for server in servers:
        server.close()


def ask(backend, *texts):
    return backend.complete([ChatRequest.of(t, max_tokens=5, seed=i) for i, t in enumerate(texts or ["hello"])])


def test_a_healthy_reply(serve):
    server, backend = serve()
    [reply] = ask(backend)
    assert (reply.text, reply.refusal, reply.finish, reply.model, reply.attempts) == ("hello", "", "stop", "served-model", 1)
    assert (reply.prompt_tokens, reply.completion_tokens) == (7, 3)
    body = server.requests[0]
    assert body["model"] == "asked-model" and body["max_tokens"] == 5 and body["temperature"] == 0
    assert server.keys == [f"Bearer {CANARY}"]


def test_f18_retry_after_is_honoured(serve):
    server, backend = serve([(429, error("rate_limit_exceeded"), {"Retry-After": "0.4"})])
    [reply] = ask(backend)
    assert reply.text == "hello" and reply.attempts == 2
    assert server.times[1] - server.times[0] >= 0.4


def test_f18_without_retry_after_waits_grow(serve):
    server, backend = serve([(429, error(), {}), (429, error(), {})], backoff=0.1)
    [reply] = ask(backend)
    assert reply.text == "hello" and reply.attempts == 3
    first, second = server.times[1] - server.times[0], server.times[2] - server.times[1]
    assert first >= 0.1 and second >= 0.2


@pytest.mark.parametrize("fault", [(500, error(), {}), (503, error(), {}), "reset", "truncated"])
def test_f18_f20_passing_faults_are_tried_again(fault, serve):
    server, backend = serve([fault, fault])
    [reply] = ask(backend)
    assert reply.text == "hello" and reply.attempts == 3 == len(server.requests)


def test_f18_a_timeout_is_tried_again(serve):
    _, backend = serve(["hang"], timeout=0.4)
    [reply] = ask(backend)
    assert reply.text == "hello" and reply.attempts == 2


MALFORMED = {
    "no_choices": [good(choices=[]), good(choices=None), {"id": "x"}],
    "null_content": [good(None)],
    "empty": [good("  ")],
    "content_filter": [good(choices=[{"index": 0, "finish_reason": "content_filter", "message": {"content": "half"}}])],
}


@pytest.mark.parametrize(("reason", "body"), [(r, b) for r, bodies in MALFORMED.items() for b in bodies])
def test_f20_a_malformed_reply_is_tried_again_then_refused_never_used(reason, body, serve):
    server, backend = serve([(200, body, {})] * 3)
    [reply] = ask(backend)
    assert (reply.text, reply.refusal, reply.attempts) == (None, reason, 3)
    assert len(server.requests) == 3
    if "usage" in body:  # what was paid for counts
        assert reply.completion_tokens == 9


def test_f20_truncated_json_that_never_heals(serve):
    _, backend = serve(["truncated"] * 3)
    [reply] = ask(backend)
    assert (reply.text, reply.refusal) == (None, "malformed")


def test_f20_an_answer_cut_by_its_length_says_so(serve):
    choice = {"index": 0, "finish_reason": "length", "message": {"content": "half a"}}
    _, backend = serve([(200, good(choices=[choice]), {})])
    assert ask(backend)[0].finish == "length"


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, error("bad", "temperature is wrong")),
        (401, error("invalid_api_key", f"Incorrect API key provided: {CANARY}.")),
        (403, error("forbidden")),
        (404, error("model_not_found")),
        (429, error("insufficient_quota", kind="insufficient_quota")),
    ],
)
def test_f19_what_cannot_get_better_stops_at_once(status, body, serve, capsys):
    server, backend = serve([(status, body, {"Retry-After": "1"})])
    with pytest.raises(BackendError) as stop:
        ask(backend)
    assert len(server.requests) == 1
    assert CANARY not in str(stop.value) + repr(stop.value) + str(capsys.readouterr()) + str(backend.identity())
    assert stop.value.__cause__ is None or CANARY not in str(stop.value.__cause__)


@pytest.mark.parametrize("place", ["detail", "error", "oops"])
def test_f19_the_servers_reason_is_told_in_whatever_shape_it_comes(place, serve):
    _, backend = serve([(400, {place: f"pinned to another, {CANARY}"}, {})])
    with pytest.raises(BackendError, match=r"status 400.*pinned to another") as stop:
        ask(backend)
    assert CANARY not in str(stop.value)


def test_f21_nothing_listens(serve):
    server, backend = serve(attempts=2)
    server.close()
    with pytest.raises(BackendError, match="last reason: connection"):
        ask(backend)


def test_f19_requests_that_wait_are_not_sent_and_answers_before_are_reported(serve):
    server, backend = serve([(200, good("first"), {}), (401, error(), {})], concurrency=1)
    with pytest.raises(BackendError) as stop:
        ask(backend, *"abcdef")
    assert len(server.requests) == 2
    assert [r.text for r in stop.value.replies] == ["first"]


def test_f21_nothing_but_failures_is_an_error(serve):
    _, backend = serve([(500, error(), {})] * 6, concurrency=1)
    with pytest.raises(BackendError, match="All 2 requests"):
        ask(backend, "a", "b")


def test_f21_control_one_success_is_enough(serve):
    _, backend = serve([(500, error(), {})] * 3, concurrency=1)
    assert [r.refusal for r in ask(backend, "a", "b")] == ["server", ""]


def test_f22_replies_are_aligned_and_concurrency_is_bounded(serve):
    server, backend = serve(delay=0.05, concurrency=3)
    texts = [f"text {i}" for i in range(12)]
    assert [r.text for r in ask(backend, *texts)] == texts
    assert 1 < server.most_open <= 3


def test_a_wait_that_is_too_long_ends_the_run(serve):
    _, backend = serve([(429, error(), {"Retry-After": "3600"})], max_wait=2)
    began = time.monotonic()
    with pytest.raises(BackendError, match="3600 s"):
        ask(backend)
    assert time.monotonic() - began < 2


def test_keys_come_from_the_environment_only(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        OpenAIChat("m")
    OpenAIChat("m", "http://127.0.0.1:1/v1")  # a server of one's own
    with pytest.raises(ConfigError, match="credentials"):
        OpenAIChat("m", f"http://user:{CANARY}@127.0.0.1/v1")


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [({"retry-after": "3"}, 3), ({"retry-after-ms": "250"}, 0.25), ({}, None), ({"retry-after": "soon"}, None)],
)
def test_retry_after(headers, seconds):
    assert retry_after(headers) == seconds


def test_retry_after_as_a_date():
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert retry_after({"retry-after": "Wed, 21 Oct 2065 07:28:00 GMT"}) > 1e9
