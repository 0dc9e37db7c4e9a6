"""``softverb arms`` on a tiny model and a server of our own: every arm, its numbers by hand, plans, budgets and refusals."""

from __future__ import annotations

import csv
import json
import shlex

import pytest
from fault_server import Server, error, good
from toy_dods import general_bank, labels_bank

from lm_eval_softverb import cli
from lm_eval_softverb.compare.comparison import MACRO
from lm_eval_softverb.compare.runs import read_run
from lm_eval_softverb.models.softprompt import SoftPromptLM
from lm_eval_softverb.storage import read_jsonl, write_jsonl

pytest.importorskip("matplotlib", reason="the page needs the extra [plots]")
pytest.importorskip("openai", reason="needs the extra [api]")
NAMES = ["emotion", "weather", "sport"]
LOCAL = ["softprompt", "none", "gold", "other", "shots2", "nearest", "theirs"]
CHAT = ["chat-none", "chat-gold", "chat-other", "chat-shots2", "chat-nearest", "chat-theirs"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _results: None)  # runs pip
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server():
    made = Server()
    yield made
    made.close()


@pytest.fixture
def given(tmp_path, tiny, server):
    """``given(*more)`` → exit status of the command on three label sets, two rows each; with ``chat`` also on the server."""
    bank, dod = labels_bank(tmp_path / "bank", NAMES)
    write_jsonl(tmp_path / "theirs.jsonl", [{"prompt_id": f"p-{n}", "text": f"{n}?", "rank": r} for n in NAMES for r in (0, 1)])

    def run(*more, chat=True, out="out"):
        words = ["arms", "--bank", bank, "--out", tmp_path / out, "--model", tiny("llama", window=1024), "--dtype", "float32"]
        words += [
            "--rows",
            2,
            "--shots",
            2,
            "--method",
            "nearest",
            "--reading",
            f"theirs={tmp_path / 'theirs.jsonl'}",
            "--quiet",
        ]
        words += ["--chat-model", "m", "--base-url", server.url, "--chat-set", "concurrency=1"] if chat else []
        return cli.main([str(w) for w in [*words, *more]])

    run.bank, run.dod = bank, dod
    return run


def rows(folder):
    with (folder / "compare.csv").open() as f:
        return {(r["run"], r["task"]): r for r in csv.DictReader(f)}


def test_a_single_task_has_no_other_ones_text(given, tmp_path, capsys, tiny):
    bank, _ = labels_bank(tmp_path / "one", NAMES[:1])
    words = ["arms", "--bank", bank, "--out", tmp_path / "o", "--model", tiny("llama", window=1024), "--rows", 1, "--shots", 1]
    assert cli.main([str(w) for w in [*words, "--plan"]]) == 0
    planned = [line.split()[0] for line in capsys.readouterr().out.splitlines() if " requests" in line]
    assert planned == ["softprompt", "none", "gold", "shots1", "majority"]
    assert not (tmp_path / "o" / "texts" / "other.jsonl").exists()


def test_every_arm_is_there_with_the_numbers_of_its_run(given, server, tmp_path, capsys):
    server.script = [(200, good(label), {}) for label in ("joy", "Rain.", "no", "x", "y", "z") * 6]
    assert given() == 0
    out, text = tmp_path / "out", capsys.readouterr().out
    found = rows(out)
    arms = [*LOCAL, *CHAT, "majority"]
    assert list(dict.fromkeys(run for run, _ in found)) == arms
    assert {task for _, task in found} == {MACRO, *(f"dod_classification/{n}" for n in NAMES)}
    for arm in arms:
        tasks = read_run(out / "runs" / arm).tasks
        means = [sum(t.scores["exact_match"].values()) / 2 for t in tasks.values()]
        assert float(found[arm, MACRO]["score"]) == pytest.approx(sum(means) / 3, abs=1e-5)
        assert found[arm, MACRO]["n"] == "3" and all(found[arm, f"dod_classification/{n}"]["n"] == "2" for n in NAMES)
        assert (found[arm, MACRO]["difference"] == "") == (arm == "chat-gold")
    # what filled the slot
    documents = [doc["doc"] for _, doc in read_jsonl(next((out / "runs" / "gold").rglob("samples_*")))]
    texts = {arm: dict(_texts(out, arm)) for arm in ("gold", "other", "shots2", "nearest", "theirs", "majority")}
    assert texts["gold"] == {f"p-{n}": ", ".join(given.dod.task(n).labels) for n in NAMES}
    assert texts["theirs"] == {f"p-{n}": f"{n}?" for n in NAMES}
    assert set(texts["other"].values()) == set(texts["gold"].values()) and texts["other"]["p-sport"] != texts["gold"]["p-sport"]
    sent = [r["messages"][0]["content"] for r in server.requests]
    expected = [doc["input"] for doc in documents]
    for arm in ("gold", "other", "shots2", "nearest", "theirs"):
        expected += [f"{texts[arm][doc['prompt_id']]}\n\n{doc['input']}" for doc in documents]
    assert sent == expected and all(r["messages"][0]["role"] == "user" and len(r["messages"]) == 1 for r in server.requests)
    answers = {t["answer"] for task in read_run(out / "runs" / "majority").tasks.values() for t in task.texts.values()}
    assert answers == set(texts["majority"].values())
    # pages and commands
    page = (out / "compare.html").read_text()
    assert "<summary>p-weather</summary>" in page and "weather?" in page and "<svg" in page
    assert "| chat-gold |" in text and f"Page: {out / 'compare.html'}" in text and "Arm 14 of 14: majority …" in text
    lines = (out / "commands.md").read_text().splitlines()[1:-1]
    assert len(lines) == 4 + 2 + 14 + 1
    for line in lines:
        if line.startswith("softverb"):
            cli.parser().parse_args(shlex.split(line)[1:])

    # Again: everything is finished.
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and "cache" not in p.parts}
    assert given() == 0 and "Arm 14 of 14: majority is finished" in capsys.readouterr().out
    assert len(server.requests) == 36
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and "cache" not in p.parts} == before


def _texts(out, name):
    return [(line["prompt_id"], line["text"]) for _, line in read_jsonl(out / "texts" / f"{name}.jsonl")]


def test_by_hand_the_same(given, tmp_path, monkeypatch, capsys):
    """The commands of ``commands.md`` write the same texts, scores and table."""
    assert given(chat=False) == 0
    out, hand = tmp_path / "out", tmp_path / "hand"
    whole = (out / "compare.csv").read_text()
    lines = (out / "commands.md").read_text().replace(str(out), str(hand)).splitlines()[1:-1]
    (hand / "texts").mkdir(parents=True)
    from lm_eval.tasks import TaskManager

    stock = TaskManager.__init__

    def indexed(self, *args, **kw):  # without the harness's own tasks, which take ten seconds
        from lm_eval_softverb.plugin import task_dir

        stock(self, *args, **{**kw, "include_defaults": False, "include_path": str(task_dir())})

    monkeypatch.setattr(TaskManager, "__init__", indexed)
    for line in lines:
        program, *words = shlex.split(line)
        if program == "softverb":
            assert cli.main(words) == 0
        elif program == "cp":
            (hand / "texts" / "theirs.jsonl").write_bytes((tmp_path / "theirs.jsonl").read_bytes())
        else:
            from lm_eval._cli.harness import HarnessCLI

            monkeypatch.setattr("sys.argv", [program, *words])
            harness = HarnessCLI()
            harness.execute(harness.parse_args())
    assert (hand / "compare.csv").read_text() == whole


def test_the_general_dod(tmp_path, tiny, monkeypatch, capsys):
    monkeypatch.setenv("SOFTVERB_CACHE", str(tmp_path / "cache"))
    import torch

    from lm_eval_softverb.bank import Bank
    from lm_eval_softverb.prompt import SoftPrompt

    folder, dod = general_bank(tmp_path)
    entries = [{k: v for k, v in e.items() if k != "path"} for _, e in read_jsonl(folder / "manifest.jsonl")]
    entries = [{**e, "instruction": dod.task(e["task"]).instruction} for e in entries]
    Bank.save(folder, [(SoftPrompt(torch.randn(3, 32)), e) for e in entries])
    (tmp_path / "ni").rename(tmp_path / "moved")
    words = ["--bank", folder, "--out", tmp_path / "out", "--model", tiny("llama", window=1024), "--dtype", "float32"]
    words += ["--rows", 3, "--tasks-most", 1, "--shots", 2, "--dod", f"general:{tmp_path / 'moved'}", "--method", "nearest"]
    assert cli.main(["arms", *map(str, words), "--quiet"]) == 0
    found = rows(tmp_path / "out")
    assert {task for _, task in found} == {"dod_general/task3_green_three"}  # one of the two test tasks
    assert [name for name, _ in _texts(tmp_path / "out", "nearest")] == ["p-task3_green_three"]
    other = dict(_texts(tmp_path / "out", "other"))
    assert other == {"p-task3_green_three": "{{ 7*7 }}\nSay [black]."}
    [samples] = (tmp_path / "out" / "runs" / "shots2").rglob("samples_*")
    line = json.loads(samples.read_text().splitlines()[0])
    assert line["arguments"]["gen_args_0"]["arg_1"]["until"] == ["\nInput:", "\nOutput:"]
    text = dict(_texts(tmp_path / "out", "shots2"))["p-task3_green_three"]
    assert text.count("Input: ") == 2 and "\n\nInput: " in text
    # more tasks later: what was read stays
    words[words.index("--tasks-most") + 1] = 2
    assert cli.main(["arms", *map(str, words), "--quiet"]) == 0
    assert len(_texts(tmp_path / "out", "nearest")) == 2 and len(rows(tmp_path / "out")) == 7 * 3  # two tasks and their average


def test_by_log_likelihood(given, tmp_path, capsys):
    assert given("--task", "dod_classification_mc", chat=False) == 0
    found = rows(tmp_path / "out")
    assert list(dict.fromkeys(run for run, _ in found)) == LOCAL
    assert given("--task", "dod_classification_mc") == 2
    assert "Chat endpoints give no log-likelihoods" in capsys.readouterr().err


def test_a_plan_counts_and_sends_nothing(given, server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(SoftPromptLM, "__init__", None)  # no model is loaded
    prices = tmp_path / "prices.json"
    prices.write_text(json.dumps({"m": {"in": 1.0, "out": 2.0}}))
    assert given("--plan", "--prices", prices, "--max-dollars", "0.5") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:14]] == [*LOCAL, *CHAT, "majority"]
    assert lines[0].split() == ["softprompt", "softprompt", "6", "requests"]
    assert all("6 requests, " in line and "96 completion tokens, at most $0.00" in line for line in lines[7:13])
    assert any(line.startswith("Endpoint: 36 requests, ") and "the limit is $0.50" in line for line in lines)
    prompt = [int(line.split("requests, ")[1].split()[0].replace(",", "")) for line in lines[7:13]]
    total = next(line for line in lines if line.startswith("Endpoint"))
    assert sum(prompt) == int(total.split("requests, ")[1].split()[0].replace(",", "")) and prompt[0] == min(prompt)
    assert lines[-1] == "Nothing was sent." and not server.requests and not (tmp_path / "out" / "runs").exists()


def test_a_plan_knows_what_is_finished_and_what_is_cached(given, server, tmp_path, capsys):
    server.script = [(200, good("joy"), {})] * 9 + [(401, error("invalid_api_key"), {})]
    assert given() == 1  # the key does not work any more in the middle of the second arm of the endpoint
    capsys.readouterr()
    assert given("--plan") == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert all(lines[arm].endswith("finished") for arm in [*LOCAL, "chat-none"])
    assert " 3 requests" in lines["chat-gold"] and " 6 requests" in lines["chat-other"]
    assert "27 requests" in lines["Endpoint:"] and "$" not in lines["Endpoint:"] and len(server.requests) == 10


def test_the_budget_is_of_all_arms_together(given, server, tmp_path, capsys):
    prices = tmp_path / "prices.json"
    prices.write_text(json.dumps({"m": {"in": 1.0, "out": 1.0}}))
    # 10 tokens per request; each is admitted at its worst, which is a question of up to 200 bytes and 16 tokens
    assert given("--prices", prices, "--max-dollars", "0.0002") == 1
    assert "raise the limit and run the same command again" in capsys.readouterr().err
    assert 6 < len(server.requests) <= 20
    assert given("--prices", prices, "--max-dollars", "0.1") == 0
    assert len(server.requests) == 36
    costs = [read_run(tmp_path / "out" / "runs" / arm).config["endpoint"]["cost"] for arm in CHAT]
    assert sum(costs) == pytest.approx(360 / 1e6)


@pytest.mark.parametrize(
    ("more", "status", "says"),
    [
        (["--method", "r=nearest:metric=x"], 2, "Method 'nearest' has no setting 'metric'"),
        (["--method", "near"], 2, "Did you mean 'nearest'"),
        (["--method", "translator:adapter=nowhere"], 1, "nowhere"),
        (["--method", "nearest"], 2, "A reading is named 'nearest'"),
        (["--method", "gold=nearest"], 2, "differ from those of all other arms"),
        (["--method", "chat-x=nearest"], 2, "do not begin with 'chat-'"),
        (["--method", "a/b=nearest"], 2, "A reading is named 'a/b'"),
        (["--method", "r=nearest:control=mean"], 2, "control is 'mean'"),
        (["--method", "r=nearest:max_new_tokens=x"], 2, "max_new_tokens is 'x'"),
        (["--reading", "x"], 2, "--reading takes NAME=VALUE"),
        (["--reading", "x=nowhere.jsonl"], 1, "Cannot read nowhere.jsonl"),
        (["--baseline", "golden"], 2, "Did you mean 'gold' or 'chat-gold'"),
        (["--rows", "0"], 2, "--rows is 0"),
        (["--tasks-most", "0"], 2, "--tasks-most is 0"),
        (["--task", "dod_general"], 1, "no prompts of a general DoD"),
        (["--max-dollars", "1"], 2, "max_dollars needs prices"),
        (["--chat-set", "template=x", "--chat-set", "colour=1"], 2, "Unknown model argument 'colour'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_computed(given, server, tmp_path, capsys, monkeypatch, more, status, says):
    monkeypatch.setattr(SoftPromptLM, "__init__", None)
    monkeypatch.setattr("lm_eval_softverb.backbone.Backbone.load", None)
    assert given(*more) == status
    assert says in capsys.readouterr().err and not server.requests
    assert not (tmp_path / "out" / "runs").exists()


def test_more_that_is_said_beforehand(given, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lm_eval_softverb.backbone.Backbone.load", None)
    write_jsonl(tmp_path / "few.jsonl", [{"prompt_id": "p-sport", "text": "x", "rank": 0}])
    assert given("--reading", f"few={tmp_path / 'few.jsonl'}") == 1
    assert "no text for 2 of the 3 prompts to score, for example 'p-emotion'" in capsys.readouterr().err
    assert given("--chat-set", "concurrency=1", chat=False) == 2
    assert "pass --chat-model" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert given(out="file/out") == 1
    assert "Cannot write to the output folder" in capsys.readouterr().err
    monkeypatch.delenv("OPENAI_API_KEY")
    assert given("--chat-model", "m", chat=False) == 2
    assert "OPENAI_API_KEY is not set" in capsys.readouterr().err


def test_a_reading_of_other_settings_is_refused_unless_overwritten(given, tmp_path, capsys):
    assert given("--method", "r=nearest", chat=False) == 0
    changed = ["--method", "r=nearest:distance=euclidean,control=random"]
    assert given(*changed, chat=False) == 1
    assert "pass --overwrite" in capsys.readouterr().err
    assert given(*changed, "--overwrite", chat=False) == 0
    assert "--set distance=euclidean --control random" in (tmp_path / "out" / "commands.md").read_text()
