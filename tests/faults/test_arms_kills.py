"""``kill -9`` in the middle of ``softverb arms``: between and inside arms, texts, and files; the numbers are the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fault_server import Server
from toy_dods import labels_bank

pytest.importorskip("matplotlib", reason="the page needs the extra [plots]")
pytest.importorskip("openai", reason="needs the extra [api]")

# Kills itself at one point: after the n-th new answer, or before or after the n-th file of a name is written.
SCRIPT = """
import os, signal, sys
import torch
torch.set_num_threads(1)
import lm_eval.evaluator
from pathlib import Path
from lm_eval_softverb import cli, storage
from lm_eval_softverb.models.ledger import Ledger

lm_eval.evaluator.add_env_info = lambda _results: None
what, number, log = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]).open("a")
put, write, seen = Ledger.put, storage.write_bytes, {}

def reached(point):
    seen[point] = seen.get(point, 0) + 1
    if (point, seen[point]) == (what, number):
        os.kill(os.getpid(), signal.SIGKILL)

def counted_put(self, key, answer):
    put(self, key, answer)
    print(key, file=log, flush=True)
    reached("answer")

def counted_write(path, data):
    reached(f"before {path.name}")
    write(path, data)
    reached(f"after {path.name}")

Ledger.put, storage.write_bytes = counted_put, counted_write
sys.exit(cli.main(sys.argv[4:]))
"""
KILLS = [
    ("after nearest.jsonl", 1),  # verbalized, but no arm run
    ("answer", 3),  # inside the first arm
    ("before arm.json", 1),  # its results are written, its mark is not
    ("after arm.json", 2),  # between two arms
    ("answer", 27),  # inside the first arm on the endpoint
]


def test_kill_9_anywhere_and_again(tmp_path, tiny):
    bank, _ = labels_bank(tmp_path / "bank", ["emotion", "weather", "sport"])
    servers = {"killed": Server(), "whole": Server()}
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)

    def run(name, what="nothing", number=0):
        words = ["arms", "--bank", bank, "--out", tmp_path / name, "--model", tiny("llama", window=1024), "--dtype", "float32"]
        words += ["--rows", 2, "--shots", 2, "--method", "nearest", "--chat-model", "m", "--base-url", servers[name].url]
        words += ["--chat-set", "concurrency=1", "--batch-size", 2, "--quiet"]
        environment = {**os.environ, "OPENAI_API_KEY": "sk-test", "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "SOFTVERB_AUTOLOAD": "0"}
        log = tmp_path / f"{name}.log"
        done = subprocess.run(
            [sys.executable, str(script), what, str(number), str(log), *map(str, words)],
            env=environment, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        return done, log.read_text().split() if log.exists() else []

    try:
        for what, number in KILLS:
            done, _ = run("killed", what, number)
            assert done.returncode == -signal.SIGKILL, (what, done.stdout[-2000:], done.stderr[-2000:])
        last, answers = run("killed")
        whole, expected = run("whole")
        assert last.returncode == whole.returncode == 0, last.stderr[-2000:] + whole.stderr[-2000:]
        assert "none is finished" in last.stdout and "gold is finished" in last.stdout
        # No answer was computed or asked for twice.
        assert len(answers) == len(set(answers)) == len(set(expected))
        assert servers["killed"].requests == servers["whole"].requests
        for file in ("compare.csv", "compare.md"):
            assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
        for file in Path(tmp_path / "whole" / "texts").iterdir():
            assert (tmp_path / "killed" / "texts" / file.name).read_bytes() == file.read_bytes()
    finally:
        for server in servers.values():
            server.close()
