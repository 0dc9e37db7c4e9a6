"""``softverb bank``: every task's prompt as if trained alone, shards, kills, two processes, and the manifest."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from toys import FakeDod, rows_of

from lm_eval_softverb import storage
from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.bank import MANIFEST, Bank
from lm_eval_softverb.data.rows import data_sha256
from lm_eval_softverb.errors import ArtifactError, ConfigError, NonFiniteError
from lm_eval_softverb.prompt import SIDECAR, WEIGHTS
from lm_eval_softverb.tuners import bank as bank_module
from lm_eval_softverb.tuners import loss as loss_module
from lm_eval_softverb.tuners.bank import SCORES, seed_of, train_bank, unfinished, work_folder
from lm_eval_softverb.tuners.config import config
from lm_eval_softverb.tuners.encoding import encode_rows
from lm_eval_softverb.tuners.heldout import heldout_scores
from lm_eval_softverb.tuners.soft import train_soft_prompt
from lm_eval_softverb.tuners.training import Training

SETTINGS = config(tokens=3, epochs=2, batch_size=4, patience=0, learning_rate=0.05)


@pytest.fixture(scope="module")
def model(tiny):
    return Backbone.load(tiny("llama", window=256), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def dod():
    return FakeDod(5)


def train(model, dod, out, **changes):
    settings = {"tasks": dod.names(), "progress": False, "width": 3} | changes
    return train_bank(model, dod, settings.pop("config", SETTINGS), out, **settings)


@pytest.fixture(scope="module")
def clean(model, dod, tmp_path_factory):
    return train(model, dod, tmp_path_factory.mktemp("clean") / "bank")


def test_each_prompt_is_the_one_trained_alone(model, dod, clean, tmp_path):
    assert [e["task"] for e in clean.entries] == dod.names()
    for name, prompt in zip(dod.names(), clean.prompts, strict=True):
        own = replace(SETTINGS, seed=seed_of(SETTINGS, name))
        alone = train_soft_prompt(model, dod.task(name).train, own, tmp_path / name, progress=False)
        torch.testing.assert_close(prompt.embeddings, alone.embeddings, rtol=1e-3, atol=1e-4)
    assert len({seed_of(SETTINGS, name) for name in dod.names()}) == 5


def test_the_manifest(model, dod, clean):
    for name, entry, prompt in zip(dod.names(), clean.entries, clean.prompts, strict=True):
        task = dod.task(name)
        assert entry["prompt_id"] == name and entry["split"] == task.split and entry["dod"] == dod.reference()
        assert entry.get("labels", []) == list(task.labels) and entry.get("instruction", "") == task.instruction
        assert entry["heldout_sha256"] == data_sha256(task.heldout)
        assert entry["best_validation_loss"] == prompt.info["best_validation_loss"] > 0
        own = replace(SETTINGS, seed=seed_of(SETTINGS, name))
        scores = heldout_scores(model, prompt.embeddings, task.heldout, own)
        assert entry["heldout"] == pytest.approx(scores)
    assert {e["split"] for e in clean.entries} == {"train", "test"}


def test_texts_of_others_stay_out(model, dod, tmp_path):
    bank = train(model, dod, tmp_path / "bank", texts=False, tasks=dod.names()[:2])
    for entry in bank.entries:
        assert "labels" not in entry and "instruction" not in entry
    truth = {"labels": list(dod.task("task0").labels), "instruction": dod.task("task0").instruction}
    assert bank.entries[0]["truth_sha256"] == storage.sha256_json(truth)


def test_shards_make_one_bank(model, dod, clean, tmp_path):
    out = tmp_path / "bank"
    assert train(model, dod, out, shard=(1, 2)) is None
    assert unfinished(out, dod.names()) == ["task1", "task3"]
    assert not (out / "manifest.jsonl").exists()
    bank = train(model, dod, out, shard=(2, 2))
    for mine, theirs in zip(bank.prompts, clean.prompts, strict=True):
        torch.testing.assert_close(mine.embeddings, theirs.embeddings, rtol=1e-3, atol=1e-4)
    assert [e["heldout"] for e in bank.entries] == [e["heldout"] for e in clean.entries]


@pytest.mark.parametrize("shard", [(0, 2), (3, 2)])
def test_a_shard_that_does_not_exist(model, dod, tmp_path, shard):
    with pytest.raises(ConfigError, match="1 <= i <= n"):
        train(model, dod, tmp_path / "bank", shard=shard)


def test_a_finished_bank_is_not_trained_again(model, dod, tmp_path, monkeypatch):
    first = train(model, dod, tmp_path / "bank")
    monkeypatch.setattr(loss_module, "loss_sums", lambda *_a: pytest.fail("trained again"))
    assert [p.id for p in train(model, dod, tmp_path / "bank").prompts] == [p.id for p in first.prompts]
    with pytest.raises(ArtifactError, match="another run"):
        train(model, dod, tmp_path / "bank", config=replace(SETTINGS, learning_rate=0.1))


@pytest.mark.parametrize("place", ["before the scores of a prompt", "before the bank is written", "before its manifest"])
def test_f05_killed_between_a_finished_part_and_its_record(place, model, dod, clean, tmp_path, monkeypatch):
    """What was trained is not trained again; what was scored is not scored again."""
    out = tmp_path / "bank"
    with monkeypatch.context() as patch:
        if place == "before the scores of a prompt":
            patch.setattr(bank_module, "heldout_scores", _killed)
        elif place == "before the bank is written":
            patch.setattr(Bank, "save", _killed)
        else:
            patch.setattr(storage, "write_jsonl", _killed)
        with pytest.raises(KeyboardInterrupt):
            train(model, dod, out)
    assert not (out / MANIFEST).exists()
    trained = [name for name in dod.names() if (work_folder(out) / name / "softprompt.json").exists()]
    assert len(trained) == (5 if place != "before the scores of a prompt" else 1)
    trainings: list[str] = []
    scored: list[int] = []
    real_start = Training.start
    monkeypatch.setattr(Training, "start", lambda self: trainings.append(self.name) or real_start(self))
    monkeypatch.setattr(bank_module, "heldout_scores", lambda *a, **k: scored.append(1) or heldout_scores(*a, **k))
    again = train(model, dod, out)
    assert sorted(trained + trainings) == dod.names(), "trained once, and once only"
    assert len(scored) == (5 if place == "before the scores of a prompt" else 0)
    assert [e["heldout"] for e in again.entries] == [e["heldout"] for e in clean.entries]


def _killed(*_a, **_k):
    raise KeyboardInterrupt


def test_one_diverging_prompt_is_named_and_the_others_are_kept(model, dod, tmp_path, monkeypatch):
    real = loss_module.loss_sums
    bad = encode_rows(model, dod.task("task2").train, SETTINGS)[0]
    bad_targets = {e.ids for e in bad}

    def broken(backbone, prompts, parts):
        sick = torch.tensor([float("nan") if any(e.ids in bad_targets for e in rows) else 0.0 for _, rows in parts])
        return real(backbone, prompts, parts) + sick

    monkeypatch.setattr(loss_module, "loss_sums", broken)
    with pytest.raises(NonFiniteError, match=r"1 of 5 prompts diverged.*task2"):
        train(model, dod, tmp_path / "bank")
    assert unfinished(tmp_path / "bank", dod.names()) == ["task2"]
    assert not (tmp_path / "bank" / "manifest.jsonl").exists()
    kept = [n for n in dod.names() if n != "task2"]
    assert len(train(model, dod, tmp_path / "bank", tasks=kept).prompts) == 4


def test_f06_two_processes_on_one_shard(model, dod, tmp_path):
    out = tmp_path / "bank"
    work_folder(out).mkdir()
    with FileLock(work_folder(out) / "shard-1-of-1.lock"), pytest.raises(ConfigError, match="Another process"):
        train(model, dod, out)


def test_f35_out_of_memory_in_a_bank(model, dod, clean, tmp_path, monkeypatch):
    real = loss_module.loss_sums

    def tight(backbone, prompts, parts):
        if sum(len(rows) for _, rows in parts) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return real(backbone, prompts, parts)

    monkeypatch.setattr(loss_module, "loss_sums", tight)
    bank = train(model, dod, tmp_path / "bank")
    assert all(p.info["out_of_memory"] for p in bank.prompts[:3])
    for mine, theirs in zip(bank.prompts, clean.prompts, strict=True):
        torch.testing.assert_close(mine.embeddings, theirs.embeddings, rtol=1e-3, atol=1e-4)


CHILD = """
import sys
sys.path.insert(0, sys.argv[3])
import torch
torch.set_num_threads(1)
from pathlib import Path
from toys import FakeDod
from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.tuners.bank import train_bank
from lm_eval_softverb.tuners.config import config
dod = FakeDod(5)
print("ready", flush=True)
train_bank(Backbone.load(sys.argv[1], dtype="float32", device="cpu"), dod,
           config(tokens=3, epochs=2, batch_size=4, patience=0, learning_rate=0.05), Path(sys.argv[2]),
           tasks=dod.names(), width=2, checkpoint_seconds=0, progress=False)
"""


def test_f03_sigkill_while_a_bank_is_trained(tiny, dod, clean, tmp_path):
    """Finished prompts stay untouched, the others go on, and the bank is that of an uninterrupted run."""
    out = tmp_path / "bank"
    command = [sys.executable, "-c", CHILD, tiny("llama", window=256), str(out), str(Path(__file__).parents[1])]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(work_folder(out).glob(f"*/{SCORES}")):
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    files = (p.with_name(WEIGHTS) for p in work_folder(out).glob(f"*/{SIDECAR}"))  # which is a prompt's last file
    finished = {p: (p.stat().st_mtime_ns, storage.sha256_file(p)) for p in files}
    assert finished and not (out / "manifest.jsonl").exists()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    for path, before in finished.items():
        assert (path.stat().st_mtime_ns, storage.sha256_file(path)) == before
    for mine, theirs in zip(Bank.load(out).prompts, clean.prompts, strict=True):
        torch.testing.assert_close(mine.embeddings, theirs.embeddings, rtol=1e-3, atol=1e-4)


# --- scores on held-out rows -----------------------------------------------------------------------------------------


def test_heldout_scores_by_hand(model, monkeypatch):
    """Rows whose targets are what the model writes are right; others are not."""
    from lm_eval_softverb.tuners import heldout

    rows = rows_of(0, 6)
    said = {}

    def generate(_backbone, _rows, contexts, **_settings):
        return [said[c] for c in contexts]

    examples, _ = encode_rows(model, rows, SETTINGS)
    for i, (example, row) in enumerate(zip(examples, rows, strict=True)):
        text = {0: f" {row.output.upper()} ", 1: row.output, 2: "the film"}.get(i % 3, "")
        said[example.context] = model.tokenizer.encode(text, add_special_tokens=False)
    monkeypatch.setattr(heldout, "generate", generate)
    scores = heldout_scores(model, torch.zeros(3, 32), rows, SETTINGS)
    assert scores["accuracy"] == pytest.approx(4 / 6) and scores["rouge_l"] == pytest.approx(4 / 6)
    assert scores["rows"] == 6 and scores["inputs_cut"] == 0


def test_heldout_scores_do_not_depend_on_the_batch(model, clean, dod, monkeypatch):
    task, prompt = dod.task("task1"), clean.prompts[1]
    together = heldout_scores(model, prompt.embeddings, task.heldout, SETTINGS)
    monkeypatch.setattr("lm_eval_softverb.batching.TOKEN_BUDGET", 1)
    assert heldout_scores(model, prompt.embeddings, task.heldout, SETTINGS) == together
