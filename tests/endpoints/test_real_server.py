"""``--model hardprompt-chat`` against a real OpenAI-compatible server: the packaged default behind ``transformers serve``."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("openai", reason="needs the extra [api]")
pytest.importorskip("fastapi", reason="transformers serve needs: pip install 'transformers[serving]'")
pytest.importorskip("uvicorn", reason="transformers serve needs: pip install 'transformers[serving]'")

from lm_eval_softverb.data import labelsets
from lm_eval_softverb.errors import BackendError
from lm_eval_softverb.plugin import task_dir
from lm_eval_softverb.pretrained import DEFAULT, locate

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(900)]  # a busy machine; all take 50 s of CPU time
CANARY = "sk-canary-0123456789"
TASK, ROWS = "softverb_labels_emotion", 3
CHAT = ("--apply_chat_template",)
SHOTS = (*CHAT, "--num_fewshot", "2", "--fewshot_as_multiturn", "true")
# It ends with the tests however they end: nothing comes through this pipe but its closing.
SERVE = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
from transformers.cli.transformers import main
main()
"""


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("server") / "server.log"


@pytest.fixture(scope="module")
def url(log):
    """Base URL of a server with the packaged default in float32."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["serve", locate(DEFAULT), "--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_healthy(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def _wait_until_healthy(address: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 600) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + seconds
    while True:
        try:
            with direct.open(address, timeout=5) as answer:
                assert answer.status == 200
                return
        except OSError:
            assert process.poll() is None, f"the server ended:\n{log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"no server after {seconds} s:\n{log.read_text()[-3000:]}"
            time.sleep(0.1)


@pytest.fixture
def run(url, command, monkeypatch, tmp_path):
    """``run(name, kind, *flags, prompt_file=…)`` → (what the results say about the model, its answers)."""
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def start(name: str, kind: str, *flags: str, limit: int = ROWS, cache: str = "cache", **settings: str):
        common = ["--tasks", TASK, "--include_path", str(task_dir()), "--limit", str(limit), "--device", "cpu", *flags]
        if kind == "hardprompt-chat":
            settings = {"model": locate(DEFAULT), "base_url": url, "timeout": "600"} | settings
            common += ["--use_cache", str(tmp_path / cache)]
        else:
            settings = {"pretrained": DEFAULT, "dtype": "float32"} | settings
        given = ",".join(f"{k}={v}" for k, v in settings.items())
        results, samples = command(name, "--model", kind, "--model_args", given, *common)
        return results["config"], [s["resps"][0][0] for s in samples[TASK]]

    return start


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(locate(DEFAULT))


@pytest.fixture
def prompt(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("Which feeling is in the sentence? Answer with one of: joy, anger, fear, sadness, surprise.\n")
    return path


def cached(tmp_path):
    """The replies in the cache."""
    with sqlite3.connect(tmp_path / "cache_rank0.db") as db:
        return [json.loads(answer) for (answer,) in db.execute("SELECT answer FROM softverb_answers_v1")]


ARMS = {
    "none": (CHAT, {}),
    "text": (CHAT, {"prompt_file": "prompt.txt"}),
    "system": (CHAT, {"prompt_file": "prompt.txt", "template": "system"}),
    "shots": (SHOTS, {"prompt_file": "prompt.txt"}),
}


@pytest.mark.parametrize("arm", ARMS)
def test_the_endpoint_answers_as_the_local_model_does_and_the_key_is_nowhere(arm, run, prompt, log, tmp_path, capfd):
    flags, settings = ARMS[arm]
    settings = settings | ({"prompt_file": str(prompt)} if settings else {})
    config, said = run("chat", "hardprompt-chat", *flags, **settings)
    facts = config["endpoint"]
    assert (facts["requests"], facts["retries"], facts["unscored"], facts["n_from_cache"]) == (ROWS, 0, 0, 0)
    assert locate(DEFAULT) in facts["served_model"]
    assert run("local", "hardprompt" if settings else "softprompt", *flags, **settings)[1] == said
    assert all(text.strip() for text in said)
    out, err = capfd.readouterr()
    written = [log, *(p for p in tmp_path.rglob("*") if p.is_file())]
    assert len(written) > 5
    assert CANARY not in out + err
    assert [p.name for p in written if CANARY.encode() in p.read_bytes()] == []


def test_tokens_are_those_of_the_tokenizer(run, prompt, tokenizer, tmp_path):
    config, _ = run("usage", "hardprompt-chat", prompt_file=str(prompt))
    texts = labelsets.load("emotion")["test"]["text"][:ROWS]
    asked = [f"{prompt.read_text().strip()}\n\nSentence: {text} Label:" for text in texts]
    chats = [[{"role": "user", "content": text}] for text in asked]
    expected = [len(tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False)) for c in chats]
    replies = cached(tmp_path)
    assert sorted(r["prompt_tokens"] for r in replies) == sorted(expected)
    for reply in replies:
        extra = reply["completion_tokens"] - len(tokenizer(reply["text"], add_special_tokens=False).input_ids)
        # The end of the turn is a token too; this server calls it "length" where it is the last token allowed.
        assert extra == 1 if reply["finish"] == "stop" else extra in (0, 1), reply
    assert config["endpoint"]["usage"] == {
        "prompt_tokens": sum(expected),
        "completion_tokens": sum(r["completion_tokens"] for r in replies),
    }
    assert config["endpoint"]["n_cut_by_length"] == sum(r["finish"] == "length" for r in replies)


def test_many_at_a_time_answer_as_one_at_a_time_and_the_cache_asks_nothing(run, monkeypatch):
    one, answers = run("one", "hardprompt-chat", concurrency="1", limit=4)
    again, kept = run("again", "hardprompt-chat", limit=4)
    assert (one["endpoint"]["n_from_cache"], again["endpoint"]["n_from_cache"]) == (0, 4)
    monkeypatch.delenv("OPENAI_API_KEY")  # a server without keys needs none
    many, at_once = run("many", "hardprompt-chat", cache="another", concurrency="4", limit=4)
    assert many["endpoint"]["n_from_cache"] == 0
    assert answers == kept == at_once


def test_a_model_that_the_server_does_not_have(run):
    with pytest.raises(BackendError, match=r"status 400.*pinned to"):
        run("wrong", "hardprompt-chat", model="another")
