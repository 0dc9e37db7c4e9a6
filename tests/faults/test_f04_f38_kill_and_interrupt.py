"""F04 kill -9 and F38 Ctrl-C in the middle of an evaluation: what was finished is not computed again, nothing differs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toys
from toys import logged

import lm_eval_softverb
from lm_eval_softverb.models.ledger import Ledger

ROWS = [{"text": f"{word} {n}", "label": n % 2} for n, word in enumerate(["red", "seven", "table", "music"] * 6)]
TASK = {**toys.GENERATE_TASK, "rows": ROWS}

# The slow run: every answer that is finished becomes one line of the log.
RUN = """
import sys, time
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
import torch
torch.set_num_threads(1)
import lm_eval.tasks.manager as manager
from lm_eval_softverb.models.ledger import Ledger
from lm_eval_softverb.models.softprompt import SoftPromptLM

put, forward, log = Ledger.put, SoftPromptLM.__init__, Path({log!r}).open("a")

def slow_put(self, key, answer):
    put(self, key, answer)
    log.write(key + "\\n")
    log.flush()

def slow_init(self, *args, **kwargs):
    forward(self, *args, **kwargs)
    self.model.register_forward_pre_hook(lambda *_: time.sleep(0.02))

Ledger.put, SoftPromptLM.__init__ = slow_put, slow_init
"""
SIMPLE = """
import datasets, lm_eval
from lm_eval.api.task import ConfigurableTask
import test_f04_f38_kill_and_interrupt as this
config = {{k: v for k, v in this.TASK.items() if k != "rows"}}
config |= {{"custom_dataset": lambda **_: {{"test": datasets.Dataset.from_list(this.ROWS)}}, "test_split": "test"}}
lm = SoftPromptLM(pretrained={model!r}, peft={prompt!r}, batch_size=1)
lm_eval.simple_evaluate(lm, tasks=[ConfigurableTask(config=config)], use_cache={cache!r}, bootstrap_iters=0,
                        task_manager=manager.TaskManager(include_defaults=False))
print("FINISHED")
"""
# The real module entry; only the indexing of the harness's own tasks, which takes long, is left out.
MODULE = """
import functools, inspect, runpy
index = manager.TaskManager.__init__

@functools.wraps(index)
def without_defaults(*args, **kwargs):
    bound = inspect.signature(index).bind(*args, **kwargs)
    bound.arguments["include_defaults"] = False
    index(*bound.args, **bound.kwargs)

manager.TaskManager.__init__ = without_defaults
sys.argv = ["lm_eval", "run", "--model", "softprompt", "--model_args", "pretrained={model},peft={prompt}",
            "--tasks", "toy_gen", "--include_path", {tasks!r}, "--use_cache", {cache!r}, "--batch_size", "1"]
runpy.run_module("lm_eval_softverb", run_name="__main__")
print("FINISHED")
"""


@pytest.fixture
def setting(tmp_path, tiny, random_prompt):
    here = Path(__file__).resolve().parent
    values = {
        "tests": str(here.parent),
        "root": str(Path(lm_eval_softverb.__file__).resolve().parent.parent),
        "model": tiny("llama"),
        "prompt": random_prompt(),
        "cache": str(tmp_path / "cache"),
        "log": str(tmp_path / "finished.log"),
        "tasks": str(tmp_path / "tasks"),
    }
    return values


def start(source, setting, tmp_path, **kwargs):
    script = tmp_path / "run.py"
    script.write_text(source.format(**setting))
    path = os.pathsep.join([str(Path(__file__).parent), setting["root"], os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": path, "SOFTVERB_AUTOLOAD": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kwargs,
    )


def finished(setting):
    """Keys of the answers that the slow run had stored, whole lines only."""
    log = Path(setting["log"])
    return [line for line in log.read_text().split("\n")[:-1] if line] if log.exists() else []


def stop_in_the_middle(process, setting, how):
    """Sends the signal once a few answers are there; returns the exit status and the output."""
    deadline = time.monotonic() + 120
    while len(finished(setting)) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(how)
    output, _ = process.communicate(timeout=60)
    assert "FINISHED" not in output, output
    assert 5 <= len(finished(setting)) < len(ROWS), output
    return process.returncode, output


def resume(ours, evaluate, setting, monkeypatch):
    """The run again, in this process; returns its results and the keys of what it computed."""
    computed, put = [], Ledger.put

    def spy(self, key, answer):
        computed.append(key)
        put(self, key, answer)

    monkeypatch.setattr(Ledger, "put", spy)
    lm = ours("llama", peft=setting["prompt"], batch_size=1)
    return evaluate(lm, [TASK], use_cache=setting["cache"]), computed


def check_resumed(ours, evaluate, setting, monkeypatch):
    before = finished(setting)
    results, computed = resume(ours, evaluate, setting, monkeypatch)
    assert not set(before) & set(computed)
    assert len(before) + len(computed) - len(ROWS) in (0, -1)  # one may be stored, but not in the log any more
    assert results["config"]["softprompt"]["n_from_cache"] == len(ROWS) - len(computed)
    clean = evaluate(ours("llama", peft=setting["prompt"], batch_size=1), [TASK])
    assert logged(results, "toy_gen") == logged(clean, "toy_gen")
    assert results["results"] == clean["results"]
    assert results["config"]["softprompt"]["cache_quarantined"] is None


def test_f04_killed_evaluation_goes_on_where_it_was(setting, tmp_path, ours, evaluate, monkeypatch):
    process = start(RUN + SIMPLE, setting, tmp_path)
    status, _ = stop_in_the_middle(process, setting, signal.SIGKILL)
    assert status == -signal.SIGKILL
    check_resumed(ours, evaluate, setting, monkeypatch)


def test_f04_positive_control_a_clean_run_stores_every_answer(setting, ours, evaluate, monkeypatch):
    results, computed = resume(ours, evaluate, setting, monkeypatch)
    assert len(set(computed)) == len(ROWS)
    assert results["config"]["softprompt"]["n_from_cache"] == 0


def test_f38_interrupted_generation_exits_as_interrupted_and_resumes(setting, tmp_path, ours, evaluate, monkeypatch):
    """``python -m lm_eval_softverb`` dies of SIGINT itself, which a shell shows as 130."""
    tasks = Path(setting["tasks"])
    tasks.mkdir()
    config = {k: v for k, v in TASK.items() if k != "rows"} | {"test_split": "test"}
    import yaml

    text = yaml.safe_dump(config) + "custom_dataset: !function test_f04_f38_kill_and_interrupt.dataset\n"
    (tasks / "toy_gen.yaml").write_text(text)
    process = start(
        RUN + MODULE,
        setting,
        tmp_path,
        # a test run in the background of a shell ignores SIGINT, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    status, output = stop_in_the_middle(process, setting, signal.SIGINT)
    assert status in (-signal.SIGINT, 130), output
    check_resumed(ours, evaluate, setting, monkeypatch)


def dataset(**_arguments):
    import datasets

    return {"test": datasets.Dataset.from_list(ROWS)}
