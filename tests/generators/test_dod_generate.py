"""The commands: arguments to settings, plan, keys never shown."""

from __future__ import annotations

import argparse
import json
import sqlite3

import pytest
import torch
from fakes import Writer
from fault_server import Server

from lm_eval_softverb.bank import Bank
from lm_eval_softverb.cli import dod_generate
from lm_eval_softverb.errors import BackendError, ConfigError
from lm_eval_softverb.prompt import SoftPrompt

CANARY = "sk-canary-9876543210"


def run(*arguments):
    root = argparse.ArgumentParser()
    group = root.add_subparsers(required=True)
    dod_generate.add_generate(group)
    dod_generate.add_paraphrase(group)
    a = root.parse_args([str(x) for x in arguments])
    return a.run(a)


@pytest.fixture
def writer(monkeypatch):
    writer = Writer()
    monkeypatch.setattr(dod_generate, "_backend", lambda _a: writer)
    return writer


def test_generate_end_to_end(writer, tmp_path, capsys):
    out = tmp_path / "d.sqlite"
    assert run("generate", "--out", out, "--sets", 2, "--sentences", 3, "--model", "m", "--seed", 3, "--backend", "openai") == 0
    shown = capsys.readouterr().out
    assert "2/2" in shown and "sentences_read" in shown and str(out) in shown
    with sqlite3.connect(out) as db:
        config = json.loads(db.execute("SELECT value FROM meta WHERE key = 'config'").fetchone()[0])
    assert (config["sentences"], config["seed"], config["style"], config["avoid"]) == (3, 3, "list", True)


def test_local_models_get_their_own_style(writer, tmp_path):
    run("generate", "--out", tmp_path / "d.sqlite", "--sets", 1, "--sentences", 2, "--quiet", "--no-avoid")
    questions = [r.messages[-1]["content"] for r in writer.asked if not r.messages[-1]["content"].startswith("Words")]
    assert questions and all("fit the label" not in q for q in questions)
    assert all(r.max_tokens == 100 for r in writer.asked if not r.messages[-1]["content"].startswith("Words"))


def test_plan_sends_and_writes_nothing(writer, tmp_path, capsys):
    prices = tmp_path / "prices.json"
    prices.write_text('{"m": {"in": 1, "out": 2}}')
    out = tmp_path / "d.sqlite"
    assert run("generate", "--out", out, "--model", "m", "--prices", prices, "--plan") == 0
    assert writer.calls == 0 and not out.exists()
    shown = capsys.readouterr().out
    assert "Nothing was sent" in shown and "$" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "openai"], "--model"),
        (["--base-url", "http://127.0.0.1:1/v1"], "--backend openai"),
        (["--sets", "0"], "out of range"),
    ],
)
def test_wrong_use(arguments, message, tmp_path, monkeypatch):
    from lm_eval_softverb.backbone import Backbone

    monkeypatch.setattr(Backbone, "load", lambda *_a, **_k: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match=message):
        run("generate", "--out", tmp_path / "d.sqlite", *arguments)


def test_only_tasks_of_a_bank_are_paraphrased(writer, tmp_path, monkeypatch):
    asked = {}

    def paraphrase(dod, config, meter, out, *, only, progress):
        asked.update(only=only, copies=config.copies)
        return {"kept": 0}

    monkeypatch.setattr("lm_eval_softverb.data.dod.opening.open_dod", lambda source: source)
    monkeypatch.setattr("lm_eval_softverb.generators.paraphrase.paraphrase", paraphrase)
    for number in (1, 2):
        entries = [{"prompt_id": "p", "task": f"task{number}", "split": "train"}]
        entries += [{"prompt_id": "t", "task": "held out", "split": "test"}]
        Bank.save(tmp_path / f"bank{number}", [(SoftPrompt(torch.randn(2, 4)), entry) for entry in entries])
    banks = ["--bank", tmp_path / "bank1", "--bank", tmp_path / "bank2"]
    run("paraphrase", "--out", tmp_path / "p.jsonl", "--copies", 3, "--quiet", *banks)
    assert asked == {"only": {"task1", "task2"}, "copies": 3}
    run("paraphrase", "--out", tmp_path / "p.jsonl", "--quiet")
    assert asked["only"] is None


def test_money_needs_prices_and_an_endpoint_cannot_filter(writer, tmp_path):
    with pytest.raises(ConfigError, match="--prices"):
        run("generate", "--out", tmp_path / "d.sqlite", "--max-dollars", 1)
    with pytest.raises(ConfigError, match="local one"):
        run("generate", "--out", tmp_path / "d.sqlite", "--filter", "--model", "m")


def test_f19_the_key_is_in_no_output_and_no_file(tmp_path, monkeypatch, capsys):
    pytest.importorskip("openai", reason="needs the extra [api]")
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    body = {"error": {"message": f"Incorrect API key provided: {CANARY}", "type": "x", "code": "invalid_api_key"}}
    server = Server([None, (401, body, {})])
    try:
        with pytest.raises(BackendError) as stop:
            run("generate", "--out", tmp_path / "d.sqlite", "--backend", "openai", "--base-url", server.url, "--model", "m")
    finally:
        server.close()
    assert server.keys[0] == f"Bearer {CANARY}"  # it was used
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert written and CANARY.encode() not in written
    assert CANARY not in str(stop.value) + str(capsys.readouterr())


def test_local_end_to_end_with_a_toy(tiny, tmp_path):
    """A random model cannot write label sets; the run says so and keeps the counts."""
    arguments = ["--model", tiny("llama", window=1024), "--device", "cpu", "--label-attempts", 1, "--filter", "--quiet"]
    with pytest.raises(BackendError, match="in a row came to nothing"):
        run("generate", "--out", tmp_path / "d.sqlite", "--sets", 1, *arguments)
    with sqlite3.connect(tmp_path / "d.sqlite") as db:
        counts = json.loads(db.execute("SELECT value FROM meta WHERE key = 'counts'").fetchone()[0])
    assert counts["sets_given_up"] == 50 == counts["set_too_few_labels"]
