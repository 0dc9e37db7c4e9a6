"""One arm: its run is the one that its command line makes, what is finished is not run again, and changes are noticed."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace

import pytest
from toy_dods import labels_bank

from lm_eval_softverb.compare.arms import MARK, Arm, is_finished, plan_arm, run_arm
from lm_eval_softverb.compare.runs import read_run
from lm_eval_softverb.errors import OutputError
from lm_eval_softverb.models.softprompt import SoftPromptLM
from lm_eval_softverb.storage import read_json, write_jsonl

NAMES = ["emotion", "weather"]


@pytest.fixture(autouse=True)
def no_pip(monkeypatch):
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _results: None)


@pytest.fixture
def arm(tmp_path, tiny):
    """``arm(model, **model_args)`` on three rows of two label sets."""
    bank, _ = labels_bank(tmp_path / "bank", NAMES)

    def make(model="hardprompt", **model_args):
        local = {} if model == "replay" else {"pretrained": tiny("llama"), "dtype": "float32"}
        metadata = {"bank": str(bank), "rows": 3}
        return Arm("toy", model, {**local, **model_args}, ("dod_classification",), metadata=metadata, batch_size=4)

    return make


@pytest.fixture
def texts(tmp_path):
    def write(text, name="texts.jsonl"):
        write_jsonl(tmp_path / name, [{"prompt_id": f"p-{n}", "text": text, "rank": 0} for n in NAMES])
        return str(tmp_path / name)

    return write


def computing(monkeypatch):
    """Counts what is really computed."""
    seen = []
    stock = SoftPromptLM._answer

    def answer(self, kind, requests, compute, *more, **kw):
        def counted(part, *rest):
            seen.extend(part)
            return compute(part, *rest)

        return stock(self, kind, requests, counted, *more, **kw)

    monkeypatch.setattr(SoftPromptLM, "_answer", answer)
    return seen


def test_a_run_is_written_once_and_goes_on(arm, texts, tmp_path, monkeypatch):
    seen = computing(monkeypatch)
    one, folder, cache = arm(prompt_file=texts("Name it.")), tmp_path / "run", tmp_path / "cache"
    assert not is_finished(one, folder)
    first = run_arm(one, folder, cache)
    assert len(seen) == 6 and {t: len(x.texts) for t, x in first.tasks.items()} == {f"dod_classification/{n}": 3 for n in NAMES}
    assert is_finished(one, folder) and run_arm(one, folder, cache) == first == read_run(folder, "toy")
    [results] = folder.rglob("results_*.json")

    # Another run of a clock that went ahead does not count.
    for path in list(results.parent.iterdir()):
        path.with_name(path.name.replace("_20", "_30", 1)).write_bytes(path.read_bytes().replace(b"0.0", b"1.0"))
    assert run_arm(one, folder, cache) == first != read_run(folder, "toy")

    # Killed after the results and before the mark: nothing is computed again.
    (folder / MARK).unlink()
    assert not is_finished(one, folder)
    again = run_arm(one, folder, cache)
    assert len(seen) == 6 and again.tasks == first.tasks and len(list(folder.rglob("results_*.json"))) == 3


def test_what_decides_the_scores_is_noticed(arm, texts, tmp_path):
    one, folder = arm(prompt_file=texts("Name it.")), tmp_path / "run"
    run_arm(one, folder, tmp_path / "cache")
    for other in (
        replace(one, model_args={**one.model_args, "dtype": "bfloat16"}),
        replace(one, metadata={**one.metadata, "rows": 2}),
        replace(one, shots=1),
        replace(one, tasks=("dod_classification_mc",)),
    ):
        assert not is_finished(other, folder)
    for same in (
        replace(one, limits={"max_dollars": 1}),
        replace(one, batch_size=1),
        replace(one, model_args={**one.model_args, "prompt_file": texts("Name it.", "moved.jsonl")}),
    ):
        assert is_finished(same, folder)
    texts("Name them.")
    assert not is_finished(one, folder)
    texts("Name it.")
    assert is_finished(one, folder)
    next(folder.rglob("results_*.json")).unlink()
    assert not is_finished(one, folder)


def test_recorded_outputs_do_not_share_a_cache(arm, texts, tmp_path):
    runs = []
    for text in ("joy", "anger"):
        one = arm("replay", file=texts(text, f"{text}.jsonl"))
        runs.append(run_arm(one, tmp_path / text, tmp_path / "cache"))
        assert {t["answer"] for task in runs[-1].tasks.values() for t in task.texts.values()} == {text}
    assert not list(tmp_path.glob("cache*"))


def test_documents_without_an_answer_are_asked_for_again(arm, tmp_path):
    lines = [{"task": "dod_classification", "doc_id": i, "text": None if i == 2 else "joy"} for i in range(6)]
    write_jsonl(tmp_path / "out.jsonl", lines)
    one, folder = arm("replay", file=str(tmp_path / "out.jsonl")), tmp_path / "run"
    assert sum(len(t.unscored) for t in run_arm(one, folder, tmp_path / "cache").tasks.values()) == 1
    assert not is_finished(one, folder)


def test_the_command_line_says_the_same(arm, texts, tmp_path, monkeypatch):
    from lm_eval._cli.harness import HarnessCLI

    plain = replace(arm(prompt_file=texts("x")), shots=2, limits={"prices": "p.json"})
    odd = replace(plain, model_args={**plain.model_args, "note": "a,b=c"})
    for one in (plain, odd):
        words = shlex.split(one.command(tmp_path / "run", tmp_path / "cache"))
        monkeypatch.setattr("sys.argv", words)
        a = HarnessCLI().parse_args()
        assert (a.model, a.model_args) == ("hardprompt", {**one.model_args, "prices": "p.json"})
        assert a.metadata == one.metadata and a.num_fewshot == 2
        assert a.log_samples and str(a.output_path) == str(tmp_path / "run") and a.use_cache == str(tmp_path / "cache")
    assert "--use_cache" not in arm("replay", file="f").command(tmp_path, tmp_path / "cache")
    run_arm(replace(plain, limits={}), tmp_path / "run", tmp_path / "cache")
    assert shlex.split(read_json(tmp_path / "run" / MARK)["command"])[0] == "lm_eval"


def test_results_that_cannot_be_written(arm, texts, tmp_path, monkeypatch):
    from lm_eval.loggers import EvaluationTracker

    monkeypatch.setattr(EvaluationTracker, "save_results_samples", lambda *_a, **_k: None)
    with pytest.raises(OutputError, match="could not write its results"):
        run_arm(arm(prompt_file=texts("x")), tmp_path / "run", tmp_path / "cache")
    assert not (tmp_path / "run" / MARK).exists()


def test_a_plan_sends_nothing(arm, texts, tmp_path, monkeypatch):
    pytest.importorskip("openai", reason="needs the extra [api]")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    price = tmp_path / "prices.json"
    price.write_text(json.dumps({"m": {"in": 1.0, "out": 2.0}}))
    one = replace(arm(prompt_file=texts("Name it.")), model="hardprompt-chat", limits={"prices": str(price)})
    one = replace(one, model_args={"model": "m", "base_url": "http://127.0.0.1:9", "prompt_file": texts("Name it.")})
    plan = plan_arm(one, tmp_path / "cache")
    assert (plan.requests, plan.completion_tokens) == (6, 6 * 16)
    assert plan.dollars == pytest.approx((plan.prompt_tokens + 2 * 96) / 1e6)
