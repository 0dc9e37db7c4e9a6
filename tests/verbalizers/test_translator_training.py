"""Training a translator: what is supervised, which epoch is kept, kills, memory, processes, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from toy_translators import SETS, learnt, overfit, toy_bank, toy_prompt
from toys import BOS, EOS

from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.bank import Bank
from lm_eval_softverb.errors import ArtifactError, BaseModelMismatch, ConfigError, DataError, NonFiniteError
from lm_eval_softverb.verbalizers import translator_data, translator_training
from lm_eval_softverb.verbalizers.translator import Translator
from lm_eval_softverb.verbalizers.translator_adapter import TranslatorAdapter
from lm_eval_softverb.verbalizers.translator_config import config
from lm_eval_softverb.verbalizers.translator_data import encode, epoch_texts, held_out, pairs_of, target_losses
from lm_eval_softverb.verbalizers.translator_lora import LoraLayers, target_modules
from lm_eval_softverb.verbalizers.translator_training import Translation, train_translator

QUICK = {"epochs": 2, "batch_size": 2, "patience": 0, "rank": 2}


@pytest.fixture
def bank(backbone, tmp_path):
    return toy_bank(backbone("llama"), tmp_path / "bank")


def train(b, bank, out, **changes):
    return train_translator(b, bank, config(**{**QUICK, **changes}), out, progress=False)


# --- end to end ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "gemma3"])
def test_a_translator_learns_its_prompts_by_heart_and_stops_by_itself(backbone, tmp_path, name):
    b = backbone(name)
    bank = toy_bank(b, tmp_path / "bank")
    made = overfit(b, bank, tmp_path / "t")
    prompts, entries = learnt(made, bank)
    found = Translator(adapter=str(tmp_path / "t")).verbalize(b, prompts, kind="labels", max_new_tokens=20)
    assert [v.text for [v] in found] == [", ".join(e["labels"]) for e in entries]
    assert not any(v.details["cut"] for [v] in found)
    assert all(v.confidence > 0.5 for [v] in found)
    assert made.info["losses"][-1]["train"] < 0.5 < made.info["losses"][0]["train"]


def test_instructions(backbone, tmp_path, bank):
    b = backbone("llama")
    made = overfit(b, bank, tmp_path / "t", kind="instructions", bos=False)
    prompts, entries = learnt(made, bank)
    found = Translator(adapter=str(tmp_path / "t")).verbalize(b, prompts, kind="instructions", max_new_tokens=30)
    assert [v.text for [v] in found] == [e["instruction"] for e in entries]
    assert TranslatorAdapter.load(tmp_path / "t").bos is False


# --- what is supervised ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["red, blue", "a dull story " * 50, "</s> red </s>", "red</s>"])
@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_the_last_supervised_label_of_every_target_is_eos(backbone, text, pad_is_eos, monkeypatch):
    """Truncated texts, too; and texts that spell EOS have no EOS inside."""
    b = backbone("llama")
    if pad_is_eos:
        monkeypatch.setattr(b.tokenizer, "_special_tokens_map", {**b.tokenizer._special_tokens_map, "pad_token": "</s>"})
        assert b.tokenizer.pad_token_id == b.tokenizer.eos_token_id == EOS
    prompts = [toy_prompt(b, 1, n=2), toy_prompt(b, 2, n=5)]
    examples, cut = encode(b, [(prompts[0], text), (prompts[1], "no")], bos=True, max_tokens=12)
    seen = []
    real = torch.nn.functional.cross_entropy

    def spy(logits, targets, **kw):
        seen.append(targets.tolist())
        return real(logits, targets, **kw)

    monkeypatch.setattr(translator_data, "cross_entropy", spy)
    target_losses(b, examples)
    first, second = seen[0][: len(examples[0].target)], seen[0][len(examples[0].target) :]
    assert [t[-1] for t in (first, second)] == [EOS, EOS]
    assert EOS not in first[:-1] + second[:-1]
    assert len(first) <= 13 and cut == (len(text) > 100)
    assert b.tokenizer.decode(second[:-1]) == "no"


def test_the_model_reads_vectors_bos_text(backbone, monkeypatch):
    b = backbone("llama")
    prompt = toy_prompt(b, 3, n=2)
    [with_bos], _ = encode(b, [(prompt, "no")], bos=True, max_tokens=9)
    [without], _ = encode(b, [(prompt, "no")], bos=False, max_tokens=9)
    own = tuple(b.tokenizer.encode("no", add_special_tokens=False))
    assert with_bos.ids == (-1, -2, BOS, *own) and without.ids == (-1, -2, *own)
    assert with_bos.target == without.target == (*own, EOS)
    monkeypatch.setattr(b.tokenizer, "_special_tokens_map", {**b.tokenizer._special_tokens_map, "bos_token": None})
    with pytest.raises(ConfigError, match="bos=false"):
        encode(b, [(prompt, "no")], bos=True, max_tokens=9)
    monkeypatch.setattr(b.tokenizer, "_special_tokens_map", {**b.tokenizer._special_tokens_map, "eos_token": None})
    with pytest.raises(ConfigError, match="no EOS"):
        encode(b, [(prompt, "no")], bos=False, max_tokens=9)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_a_loss_does_not_depend_on_the_rows_beside_it(backbone, name):
    b = backbone(name)
    items = [(toy_prompt(b, i, n=1 + 3 * i), text) for i, text in enumerate(["no", "a dull and slow story", "red, blue"])]
    examples, _ = encode(b, items, bos=True, max_tokens=50)
    together = target_losses(b, examples)
    alone = torch.cat([target_losses(b, [e]) for e in examples])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    for example, found in zip(examples, together, strict=True):  # token by token, from embeddings
        embeds = torch.cat([example.rows[None], b.embedding(torch.tensor([[t for t in example.ids if t >= 0]]))], dim=1)
        scores = b.model(inputs_embeds=embeds).logits[0].log_softmax(-1)[-len(example.target) :]
        expected = -sum(float(scores[i, t]) for i, t in enumerate(example.target))
        assert float(found) == pytest.approx(expected, rel=1e-4)


# --- data ------------------------------------------------------------------------------------------------------------


def test_labels_come_in_another_order_each_epoch_unless_fixed(bank):
    pairs, counts = pairs_of(bank, "labels")
    assert [p.text for p in pairs] == [", ".join(s) for s in SETS]
    assert counts == {"other_split": 0, "without_text": 0, "paraphrased": 0, "texts_unused": 0}
    fixed = [sorted(t for _, t in epoch_texts(pairs, config("paper"), e)) for e in range(4)]
    assert fixed == [sorted(", ".join(s) for s in SETS)] * 4
    shuffled = [sorted(t for _, t in epoch_texts(pairs, config(), e)) for e in range(4)]
    assert len({tuple(x) for x in shuffled}) > 2
    assert {frozenset(t.split(", ")) for t in shuffled[0]} == {frozenset(s) for s in SETS}
    assert epoch_texts(pairs, config(), 1) == epoch_texts(pairs, config(), 1)


def test_paraphrases_by_prompt_or_task(bank, tmp_path):
    lines = [
        {"task": "t0", "paraphrases": ["Choose.", "Pick."]},
        {"prompt_id": "p1", "text": "Judge."},
        {"task": "x", "text": "y"},
    ]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    pairs, counts = pairs_of(bank, "instructions", texts=translator_data.read_texts(path))
    assert counts["paraphrased"] == 2 and counts["texts_unused"] == 1
    both = sorted(t for _, t in epoch_texts(pairs[:2], config(kind="instructions"), 0))
    assert both == ["Choose.", "Judge.", "Pick.", "Say good or dull.", "Say red or blue."]
    paper = sorted(t for _, t in epoch_texts(pairs[:3], config("paper", kind="instructions"), 0))
    assert paper == ["Choose.", "Judge.", "Pick.", "Say yes or no."]  # its own text only where there is no other
    path.write_text('{"task": "t0", "text": 3}\n')
    with pytest.raises(DataError, match=r"texts\.jsonl:1"):
        translator_data.read_texts(path)


def test_splits_and_prompts_without_text_are_counted(backbone, tmp_path):
    b = backbone("llama")
    entries = [{"labels": ["a", "b"], "split": "train"}, {"labels": ["c"], "split": "test"}, {"split": "train"}]
    items = [(toy_prompt(b, i), {"prompt_id": f"p{i}", **e}) for i, e in enumerate(entries)]
    bank = Bank.load(Bank.save(tmp_path / "b", items))
    pairs, counts = pairs_of(bank, "labels")
    assert [p.name for p in pairs] == ["p0"] and counts["other_split"] == counts["without_text"] == 1
    with pytest.raises(DataError, match="no prompt to learn instructions from in split 'train'"):
        pairs_of(bank, "instructions")


def test_prompts_of_one_text_stay_on_one_side(backbone, tmp_path):
    b = backbone("llama")
    sets = [SETS[i // 2][:: -1 if i % 2 else 1] for i in range(8)]  # each set twice, in both orders
    bank = toy_bank(b, tmp_path / "bank", sets)
    pairs, _ = pairs_of(bank, "labels")
    training, validation = held_out(pairs, 0.25, 0)
    assert len(validation) == 2 and len(training) == 6
    assert not {frozenset(p.labels) for p in training} & {frozenset(p.labels) for p in validation}
    assert held_out(pairs, 0.25, 0) == (training, validation)
    with pytest.raises(DataError, match="too few"):
        held_out(pairs[:2], 0.25, 0)


def test_presets_and_settings():
    paper = config("paper")
    assert (paper.rank, paper.alpha, paper.dropout, paper.epochs, paper.batch_size) == (4, 8, 0.1, 5, 16)
    assert (paper.learning_rate, paper.weight_decay, paper.max_tokens, paper.bos) == (1e-4, 0.1, 300, True)
    assert paper.rate(0, 100) == paper.rate(99, 100) == 1e-4
    fixed = config(learning_rate=1.0, warmup=0.1)
    assert [round(fixed.rate(s, 100), 3) for s in (0, 9, 10, 55)] == [0.1, 1.0, 1.0, 0.5]
    for wrong, message in (
        ({"preset": "papr"}, "Did you mean 'paper'"),
        ({"learnin_rate": 1}, "Did you mean 'learning_rate'"),
        ({"kind": "label"}, "Did you mean 'labels'"),
        ({"dropout": 1.0}, "dropout"),
        ({"rank": 0}, "rank"),
        ({"validation": 1.0}, "validation"),
        ({"schedule": "cosine"}, "schedule"),
    ):
        with pytest.raises(ConfigError, match=message):
            config(**wrong)


# --- LoRA ------------------------------------------------------------------------------------------------------------


def test_what_lora_adapts(backbone):
    llama = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    assert all(target_modules(backbone(name)) == llama for name in ("llama", "qwen2", "gemma2", "gemma3"))
    assert target_modules(backbone("gpt2")) == ("c_attn", "c_fc", "c_proj")
    eyes = target_modules(backbone("gemma3_vision"))
    assert len(eyes) == 3 * 7 and all("language_model" in name for name in eyes)
    for name in ("gpt_neo", "mamba", "t5"):
        with pytest.raises(ConfigError, match=r"LoRA has no place|residual stream"):
            target_modules(backbone(name))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_vision"])
def test_layers_are_in_the_model_only_while_wanted(backbone, name):
    b = backbone(name)
    names, ids = [n for n, _ in b.model.named_modules()], torch.tensor([[5, 9, 40]])
    with torch.no_grad():
        before = b.model(ids).logits
        layers = LoraLayers(b, config(rank=3), seed=1)
        layers.load({k: torch.randn(p.shape) for k, p in layers.parameters.items()})
        with pytest.raises(RuntimeError, match="inside"), layers.on(training=True):
            inside = b.model(ids).logits
            raise RuntimeError("inside")
        assert not torch.allclose(inside, before, atol=0.1)
        assert torch.equal(b.model(ids).logits, before)
    assert [n for n, _ in b.model.named_modules()] == names
    assert Backbone(b.model, b.tokenizer, b.name).fingerprint == b.fingerprint


def test_initial_weights_change_nothing_and_depend_on_the_seed_only(backbone):
    b = backbone("llama")
    first = LoraLayers(b, config(), seed=3).state()
    torch.rand(5)
    state = torch.random.get_rng_state()
    again, other = LoraLayers(b, config(), seed=3).state(), LoraLayers(b, config(), seed=4).state()
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's stream is touched
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)
    assert all(not t.any() for k, t in first.items() if "lora_B" in k)
    assert all(t.any() for k, t in first.items() if "lora_A" in k)


def test_only_lora_weights_are_trained(backbone, bank, tmp_path):
    b = backbone("llama")
    before = {k: p.clone() for k, p in b.model.named_parameters()}
    train(b, bank, tmp_path / "t", learning_rate=0.1)
    assert all(torch.equal(p, before[k]) and p.grad is None for k, p in b.model.named_parameters())


def test_weights_are_float32_whatever_the_model_is(tiny, tmp_path):
    b = Backbone.load(tiny("llama"), dtype="bfloat16", device="cpu")
    made = train(b, toy_bank(b, tmp_path / "bank"), tmp_path / "t")
    assert {t.dtype for t in made.tensors.values()} == {torch.float32}
    assert made.info["dtype"] == "bfloat16"


# --- epochs, memory, numbers -----------------------------------------------------------------------------------------


def scripted(monkeypatch, losses):
    """Validation losses per token as given, one per epoch."""
    queue = iter(losses)
    monkeypatch.setattr(
        translator_training.Fit,
        "_evaluate",
        lambda self, mine: next(queue) * sum(self.objective.weight(e) for e in mine),
    )


def test_the_epoch_with_the_best_validation_loss_is_kept(backbone, bank, tmp_path, monkeypatch):
    b = backbone("llama")
    whole = train(b, bank, tmp_path / "whole", epochs=2, schedule="constant", warmup=0.0)
    scripted(monkeypatch, [3.0, 1.0, 2.0, 2.5])
    kept = train(b, bank, tmp_path / "kept", epochs=9, patience=2, schedule="constant", warmup=0.0)
    assert kept.info["best_epoch"] == 2 and len(kept.info["losses"]) == 4  # and it stopped two epochs later
    assert whole.info["best_epoch"] == 2 or whole.info["losses"][0]["validation"] < whole.info["losses"][1]["validation"]
    scripted(monkeypatch, [3.0, 1.0])
    short = train(b, bank, tmp_path / "short", epochs=2, schedule="constant", warmup=0.0)
    assert all(torch.equal(kept.tensors[k], short.tensors[k]) for k in kept.tensors)


def test_out_of_memory_accumulates_smaller_passes_of_the_same_batch(backbone, bank, tmp_path, monkeypatch):
    b = backbone("llama")
    quick = {"batch_size": 6, "dropout": 0.0}
    clean = train(b, bank, tmp_path / "clean", **quick)
    real = Translation.losses

    def tight(self, examples):
        if len(examples) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return real(self, examples)

    monkeypatch.setattr(Translation, "losses", tight)
    small = train(b, bank, tmp_path / "small", **quick)
    assert clean.info["out_of_memory"] == 0 < small.info["out_of_memory"] < 4
    assert small.info["steps"] == clean.info["steps"]
    for name, expected in clean.tensors.items():
        torch.testing.assert_close(small.tensors[name], expected, rtol=1e-3, atol=1e-4)


def test_a_loss_that_is_no_number_is_refused(backbone, bank, tmp_path, monkeypatch):
    with pytest.raises(NonFiniteError, match=r"diverged at step 0.*learning rate"), monkeypatch.context() as patch:
        patch.setattr(Translation, "losses", lambda self, x: target_losses(self.backbone, x) * float("nan"))
        train(backbone("llama"), bank, tmp_path / "a")
    scripted(monkeypatch, [float("nan")])
    with pytest.raises(NonFiniteError, match="validation loss is nan"):
        train(backbone("llama"), bank, tmp_path / "b")
    assert not (tmp_path / "b" / "translator.json").exists()


def test_dropout_is_drawn_without_touching_other_streams(backbone, bank, tmp_path):
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    first = train(backbone("llama"), bank, tmp_path / "a", dropout=0.5)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(9)
    again = train(backbone("llama"), bank, tmp_path / "b", dropout=0.5)
    without = train(backbone("llama"), bank, tmp_path / "c", dropout=0.0)
    assert all(torch.equal(first.tensors[k], again.tensors[k]) for k in first.tensors)
    assert not all(torch.equal(first.tensors[k], without.tensors[k]) for k in first.tensors)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_loaded_and_another_run_refused(backbone, bank, tmp_path, monkeypatch):
    b = backbone("llama")
    made = train(b, bank, tmp_path / "t")
    monkeypatch.setattr(translator_training, "Fit", lambda *_a, **_k: pytest.fail("trained again"))
    assert train(b, bank, tmp_path / "t").id == made.id
    with pytest.raises(ArtifactError, match="another run"):
        train(b, bank, tmp_path / "t", seed=1)
    monkeypatch.undo()
    other = train_translator(b, bank, config(**QUICK, seed=1), tmp_path / "t", progress=False, overwrite=True)
    assert other.id != made.id


def test_prompts_of_another_model_are_refused_unless_forced(backbone, bank, tmp_path):
    other = backbone("llama_tied")
    with pytest.raises(BaseModelMismatch, match="force=true"):
        train(other, bank, tmp_path / "t")
    made = train_translator(other, bank, config(**QUICK), tmp_path / "t", progress=False, force=True)
    assert len(made.info["forced_despite"]) == len(SETS)


def test_a_text_that_does_not_fit_is_refused(backbone, bank, tmp_path):
    with pytest.raises(ConfigError, match="Lower max_tokens"):
        long = toy_prompt(backbone("llama"), 1, n=95)
        encode(backbone("llama"), [(long, "a dull story")], bos=True, max_tokens=50)


def test_what_is_recorded(backbone, bank, tmp_path):
    made = train(backbone("llama"), bank, tmp_path / "t", max_tokens=1)
    info = TranslatorAdapter.load(tmp_path / "t").info
    assert info == json.loads(json.dumps(dict(made.info)))
    assert len(info["prompts"]["training"]) == 5 and len(info["prompts"]["validation"]) == 1
    assert info["counts"]["texts_cut"] == 6 and info["counts"]["texts_per_epoch"] == 5
    assert set(info["versions"]) == {"torch", "transformers", "peft", "lm_eval_softverb"}
    assert info["config"]["bos"] is True and info["processes"] == 1 and len(info["data_sha256"]) == 64
    assert not (tmp_path / "t" / "checkpoint").exists()


# --- kills and processes ---------------------------------------------------------------------------------------------

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
    for name, expected in first.tensors.items():
        torch.testing.assert_close(second.tensors[name], expected, rtol=1e-3, atol=1e-5)
