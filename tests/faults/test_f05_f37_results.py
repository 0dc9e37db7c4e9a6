"""F05 killed when every answer is there but the results are not yet written; F37 a clock that stands still or goes back."""

from __future__ import annotations

import itertools
import time

import pytest
from fault_server import Server
from toys import CHOICE_TASK, GENERATE_TASK, logged

pytest.importorskip("openai", reason="needs the extra [api]")

from lm_eval_softverb.endpoints.openai_chat import retry_after
from lm_eval_softverb.models.hardprompt_chat import HardPromptChatLM
from lm_eval_softverb.models.ledger import Ledger
from lm_eval_softverb.plugin import task_dir

NOON = 1_700_000_000.0


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary-0123456789")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server()
    yield server
    server.close()


@pytest.fixture
def clock(monkeypatch):
    """``clock(seconds)``: from now on the time of day stands there; what is measured goes on."""

    def stand(at: float) -> None:
        monkeypatch.setattr(time, "time", lambda: at)
        monkeypatch.setattr(time, "time_ns", lambda: int(at * 1e9))

    return stand


# --- F05 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["save_results_aggregated", "save_results_samples"])
@pytest.mark.parametrize("kind", ["hardprompt-chat", "softprompt"])
def test_f05_killed_before_the_results_are_written(kind, place, server, command, tiny, random_prompt, tmp_path, monkeypatch):
    """The same command writes what an uninterrupted run writes, and asks the model nothing."""
    from lm_eval.loggers import EvaluationTracker

    chat = f"model=m,base_url={server.url}"
    given = chat if kind == "hardprompt-chat" else f"pretrained={tiny('llama')},peft={random_prompt()}"
    common = ["--model", kind, "--model_args", given, "--tasks", "softverb_labels_emotion", "--limit", "6"]
    common += ["--include_path", str(task_dir()), "--use_cache"]
    clean, clean_samples = command("clean", *common, str(tmp_path / "clean-cache"))

    def killed(*_a, **_k):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(EvaluationTracker, place, killed)
        with pytest.raises(KeyboardInterrupt):
            command("killed", *common, str(tmp_path / "cache"))
    assert not list((tmp_path / "killed").rglob("samples_*"))
    sent, stored = len(server.requests), []
    monkeypatch.setattr(Ledger, "put", lambda _self, key, _answer: stored.append(key))
    again, samples = command("again", *common, str(tmp_path / "cache"))
    facts = again["config"]["endpoint" if kind == "hardprompt-chat" else "softprompt"]
    assert (len(server.requests), stored, facts["n_from_cache"]) == (sent, [], 6)
    assert again["results"] == clean["results"] and samples == clean_samples
    if kind == "hardprompt-chat":
        assert sent == 12 and facts["usage"] == clean["config"]["endpoint"]["usage"]


# --- F37 -------------------------------------------------------------------------------------------------------------


def test_f37_files_set_aside_in_the_same_instant_are_all_kept(tmp_path, clock):
    clock(NOON)
    path = tmp_path / "a.db"
    for i in range(3):
        path.write_text(f"no database {i}\n" * 300)
        Ledger(path).close()
    kept = sorted(tmp_path.glob("a.db.corrupt-*"))
    assert [p.read_text()[:13] for p in kept] == [f"no database {i}" for i in range(3)]


def test_f37_runs_of_the_same_instant_keep_their_answers_apart(server, ours, random_prompt, evaluate, tmp_path, clock):
    clock(NOON)
    a, b = random_prompt(1), random_prompt(2)
    cache = str(tmp_path / "cache")
    (tmp_path / "p.txt").write_text("Good or bad?")

    def chat(**settings):
        return evaluate(HardPromptChatLM(model="m", base_url=server.url, **settings), [GENERATE_TASK], use_cache=cache)

    def soft(prompt, **settings):
        return evaluate(ours("llama", peft=prompt, batch_size=4), [CHOICE_TASK], **settings)

    first = [chat(), chat(prompt_file=str(tmp_path / "p.txt")), soft(a, use_cache=cache), soft(b, use_cache=cache)]
    assert len(server.requests) == 16
    again = [chat(), chat(prompt_file=str(tmp_path / "p.txt")), soft(a, use_cache=cache), soft(b, use_cache=cache)]
    assert len(server.requests) == 16
    for task, old, new in zip(["toy_gen", "toy_gen", "toy_mc", "toy_mc"], first, again, strict=True):
        assert logged(old, task) == logged(new, task)
    assert all(x["samples"] != y["samples"] for x, y in itertools.pairwise(first))


def test_f37_a_clock_that_was_set_back_changes_nothing(server, evaluate, tmp_path, clock):
    def run(at):
        clock(at)
        lm = HardPromptChatLM(model="m", base_url=server.url)
        return evaluate(lm, [GENERATE_TASK], use_cache=str(tmp_path / "cache"))["config"]["endpoint"]

    assert run(NOON)["seconds"] > 0
    facts = run(NOON - 86_400)
    assert (len(server.requests), facts["n_from_cache"], facts["cache_quarantined"]) == (8, 8, None)
    assert facts["seconds"] >= 0 and facts["median_latency"] > 0


@pytest.mark.parametrize("ours_is_off_by", [-3600, 0, 3600])
def test_f37_a_date_to_wait_for_goes_by_the_clock_of_the_server(ours_is_off_by, clock):
    clock(NOON + ours_is_off_by)  # noon is 22:13:20
    headers = {"date": "Tue, 14 Nov 2023 22:13:20 GMT", "retry-after": "Tue, 14 Nov 2023 22:13:27 GMT"}
    assert retry_after(headers) == 7
    assert retry_after(headers | {"date": "no date"}) == max(0, 7 - ours_is_off_by)
