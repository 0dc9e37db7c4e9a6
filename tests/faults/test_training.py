"""Faults of training: kills, signals, full disks, memory. Numbers are those of the fault list."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lm_eval_softverb import checkpoint, storage
from lm_eval_softverb.data.rows import Row
from lm_eval_softverb.errors import ArtifactError, OutputError
from lm_eval_softverb.prompt import SoftPrompt
from lm_eval_softverb.tuners import loss
from lm_eval_softverb.tuners.config import config
from lm_eval_softverb.tuners.soft import train_soft_prompt

SETTINGS = {"tokens": 3, "epochs": 4, "batch_size": 4, "patience": 0, "learning_rate": 0.05}
CHILD = """
import os, signal, sys, torch
torch.set_num_threads(1)
from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.data.rows import Row
from lm_eval_softverb import checkpoint
from lm_eval_softverb.tuners.config import config
from lm_eval_softverb.tuners.soft import train_soft_prompt
model, out, number, at = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
rows = [Row(f"Sentence: {i} and {j} Label:", ("good", "dull")[i % 2]) for i in range(4) for j in range(4)]
def on_step(step):
    print("step", step, flush=True)
    if step == at:
        os.kill(os.getpid(), number)
try:
    train_soft_prompt(Backbone.load(model, dtype="float32", device="cpu"), rows, config(**SETTINGS), out,
                      checkpoint_seconds=EVERY, progress=False, on_step=on_step)
except checkpoint.Interrupted as stop:
    sys.exit(stop.exit_code)
"""


def train(model: str, out, number: int = 0, at: int = -1, every: float = 0.0) -> subprocess.CompletedProcess[str]:
    code = CHILD.replace("SETTINGS", repr(SETTINGS)).replace("EVERY", repr(every))
    return subprocess.run(
        [sys.executable, "-c", code, model, str(out), str(number), str(at)], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("clean")
    assert train(tiny("llama"), out).returncode == 0
    return SoftPrompt.load(out)


@pytest.mark.parametrize(("at", "every"), [(2, 0.0), (9, 0.0), (7, 1e9)])
def test_f01_sigkill_mid_training_resumes_to_the_same_prompt(tiny, tmp_path, uninterrupted, at, every):
    killed = train(tiny("llama"), tmp_path, signal.SIGKILL, at, every)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "softprompt.json").exists()
    resumed = train(tiny("llama"), tmp_path, every=every)
    assert resumed.returncode == 0, resumed.stderr
    first = int(resumed.stdout.split()[1])
    assert first == (at + 1 if every == 0 else 1)  # with checkpoints nothing finished is repeated
    assert torch.equal(SoftPrompt.load(tmp_path).embeddings, uninterrupted.embeddings)
    assert SoftPrompt.load(tmp_path).info["losses"] == uninterrupted.info["losses"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_f02_signals_write_a_checkpoint_and_exit(tiny, tmp_path, uninterrupted, number, status):
    stopped = train(tiny("llama"), tmp_path, number, 5, every=1e9)  # only the signal can have caused a checkpoint
    assert stopped.returncode == status, stopped.stderr
    assert [p.name for p in (tmp_path / "checkpoint").iterdir()] == ["step-00000005.safetensors"]
    assert train(tiny("llama"), tmp_path, every=1e9).returncode == 0
    assert torch.equal(SoftPrompt.load(tmp_path).embeddings, uninterrupted.embeddings)


def test_f01_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tiny, tmp_path, uninterrupted):
    train(tiny("llama"), tmp_path, signal.SIGKILL, 6)
    newest = max((tmp_path / "checkpoint").iterdir())
    newest.write_bytes(newest.read_bytes()[:100])
    assert train(tiny("llama"), tmp_path).returncode == 0
    assert torch.equal(SoftPrompt.load(tmp_path).embeddings, uninterrupted.embeddings)


def test_f01_a_checkpoint_of_another_run_is_refused(backbone, tmp_path):
    checkpoint.save(tmp_path / "checkpoint", 3, {"prompt": torch.zeros(1, 1)}, {"run": "another"})
    with pytest.raises(ArtifactError, match="another run"):
        train_soft_prompt(backbone("llama"), ROWS, config(**SETTINGS), tmp_path, progress=False)


def full_disk(monkeypatch, name: str) -> None:
    """No space left as soon as a file called ``name…`` would be put in place."""
    real = os.replace

    def replace(source, target):
        if Path(target).name.startswith(name):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(storage.os, "replace", replace)


@pytest.mark.parametrize("name", ["step-", "adapter_model", "softprompt.json"])
def test_f07_a_full_disk_names_path_and_bytes_and_leaves_no_temporary_file(backbone, tmp_path, monkeypatch, name):
    full_disk(monkeypatch, name)
    with pytest.raises(OutputError, match=rf"bytes to .*{name}.*No space left"):
        train_soft_prompt(backbone("llama"), ROWS, config(**SETTINGS), tmp_path, progress=False, checkpoint_seconds=0)
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".tmp")]
    monkeypatch.undo()
    resumed = train_soft_prompt(backbone("llama"), ROWS, config(**SETTINGS), tmp_path, progress=False)
    assert resumed.id == SoftPrompt.load(tmp_path).id


def test_f35_out_of_memory_makes_smaller_passes_of_the_same_batch_and_is_recorded(backbone, tmp_path, monkeypatch):
    clean = train_soft_prompt(backbone("llama"), ROWS, config(**SETTINGS), tmp_path / "clean", progress=False)
    real = loss.loss_sums

    def tight(b, prompts, parts):
        if sum(len(rows) for _, rows in parts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return real(b, prompts, parts)

    monkeypatch.setattr(loss, "loss_sums", tight)
    small = train_soft_prompt(backbone("llama"), ROWS, config(**SETTINGS), tmp_path / "small", progress=False)
    assert clean.info["out_of_memory"] == 0 < small.info["out_of_memory"] < 4  # once found, the size is kept
    assert small.info["steps"] == clean.info["steps"]
    torch.testing.assert_close(small.embeddings, clean.embeddings, rtol=1e-3, atol=1e-4)


ROWS = [Row(f"Sentence: {i} and {j} Label:", ("good", "dull")[i % 2]) for i in range(4) for j in range(4)]
