"""Faults of translator training: kills, signals, full disks; and several processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from toy_translators import toy_bank

from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.verbalizers.translator_adapter import TranslatorAdapter

CHILD = """
import os, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from lm_eval_softverb import checkpoint
from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.bank import Bank
from lm_eval_softverb.verbalizers.translator_config import config
from lm_eval_softverb.verbalizers.translator_training import train_translator
model, bank, out, number, at, every, dropout = sys.argv[1:]
def on_step(step):
    print("step", step, flush=True)
    if step == int(at):
        os.kill(os.getpid(), int(number))
settings = config(epochs=4, batch_size=2, patience=0, rank=2, dropout=float(dropout))
try:
    train_translator(Backbone.load(model, dtype="float32", device="cpu"), Bank.load(bank), settings, Path(out),
                     checkpoint_seconds=float(every), progress=False, on_step=on_step)
except checkpoint.Interrupted as stop:
    sys.exit(stop.exit_code)
"""


def child(model, bank, out, number=0, at=-1, every=0.0, dropout=0.3, env=None, start=subprocess.run):
    arguments = [sys.executable, "-c", CHILD, model, bank.source, str(out), *map(str, (number, at, every, dropout))]
    more = {"check": False} if start is subprocess.run else {}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return start(arguments, env={**os.environ, **(env or {})}, **pipes, **more)


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("clean")
    bank = toy_bank(Backbone.load(tiny("llama"), dtype="float32", device="cpu"), root / "bank")
    done = child(tiny("llama"), bank, root / "t")
    assert done.returncode == 0, done.stderr
    return bank, TranslatorAdapter.load(root / "t")


@pytest.mark.parametrize(
    ("number", "at", "every", "status"),
    [(signal.SIGKILL, 4, 0.0, -9), (signal.SIGTERM, 2, 1e9, 143)],
)
def test_f01_f02_killed_training_resumes_to_the_same_weights(tiny, tmp_path, uninterrupted, number, at, every, status):
    bank, clean = uninterrupted
    stopped = child(tiny("llama"), bank, tmp_path / "t", int(number), at, every)
    assert stopped.returncode == status, stopped.stderr
    assert not (tmp_path / "t" / "translator.json").exists()
    resumed = child(tiny("llama"), bank, tmp_path / "t", every=every)
    assert resumed.returncode == 0, resumed.stderr
    # A signal ends training after the step that follows it: its checkpoint holds that step.
    assert int(resumed.stdout.split()[1]) == at + (1 if status == -9 else 2)
    found = TranslatorAdapter.load(tmp_path / "t")
    assert found.info["losses"] == clean.info["losses"]
    assert all(torch.equal(found.tensors[k], clean.tensors[k]) for k in clean.tensors)


def test_two_processes_follow_the_trajectory_of_one(tiny, tmp_path, uninterrupted):
    """What ``accelerate launch`` starts, on a CPU: gradients are added up, one process writes."""
    bank, _ = uninterrupted
    one = child(tiny("llama"), bank, tmp_path / "one", dropout=0.0)
    assert one.returncode == 0, one.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    envs = [{**shared, "RANK": str(r), "LOCAL_RANK": str(r), "LOCAL_WORLD_SIZE": "2"} for r in range(2)]
    both = [child(tiny("llama"), bank, tmp_path / "two", dropout=0.0, env=e, start=subprocess.Popen) for e in envs]
    try:
        ends = [p.communicate(timeout=120) for p in both]
    finally:
        for p in both:
            p.kill()
    assert [p.returncode for p in both] == [0, 0], ends[0][1] + ends[1][1]
    first, second = TranslatorAdapter.load(tmp_path / "one"), TranslatorAdapter.load(tmp_path / "two")
    assert (first.info["processes"], second.info["processes"]) == (1, 2)
    for own, expected in zip(second.info["losses"], first.info["losses"], strict=True):
        assert own == pytest.approx(expected, rel=1e-4)  # Adam and clipping would forgive gradients of another size
    for name, expected in first.tensors.items():
        torch.testing.assert_close(second.tensors[name], expected, rtol=1e-3, atol=1e-5)
