"""Soft prompt training: the lean step against the plain one, determinism, early stopping, and what is written."""

from __future__ import annotations

import json

import pytest
import torch

from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.data.rows import Row, split_rows
from lm_eval_softverb.errors import ArtifactError, ConfigError, DataError, NonFiniteError
from lm_eval_softverb.frame import Frame
from lm_eval_softverb.prompt import SoftPrompt
from lm_eval_softverb.tuners import loss as losses_module
from lm_eval_softverb.tuners.config import PRESETS, SoftConfig, config
from lm_eval_softverb.tuners.encoding import encode_rows
from lm_eval_softverb.tuners.loss import loss_sums, mean_losses
from lm_eval_softverb.tuners.soft import train_soft_prompt
from lm_eval_softverb.tuners.training import initial_rows

ROWS = [
    Row(f"Sentence: {a} {b} Label:", label)
    for label in ("good", "dull")
    for a in ("The film", "It", "My day")
    for b in ("was long", "is a story", "goes on", "ended early")
]
SMALL = config(tokens=4, epochs=3, batch_size=6, patience=0, learning_rate=0.05)
FRAMES = [Frame(), Frame("after_bos"), Frame("user_start", "Please §."), Frame("user_end", "Please §.")]


def loss_sum(backbone: Backbone, prompt: torch.Tensor, examples) -> torch.Tensor:
    return loss_sums(backbone, [prompt], [(0, examples)])[0]


def mean_loss(backbone: Backbone, prompt: torch.Tensor, examples, tokens: int) -> float:
    return mean_losses(backbone, [prompt], [examples], tokens)[0]


def plain_loss(backbone: Backbone, prompt: torch.Tensor, examples) -> torch.Tensor:
    """Each row alone, every position through the model and its head, no cache."""
    total = torch.zeros((), dtype=torch.float64)
    for e in examples:
        ids = torch.tensor([[*e.context, *e.target[:-1]]])
        logits = backbone.model(inputs_embeds=backbone.embed(ids, prompt)).logits[0, len(e.context) - 1 :]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(e.target), reduction="sum")
    return total


@pytest.mark.parametrize("frame", FRAMES, ids=lambda f: f.placement)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_lean_loss_and_gradient_equal_plain_ones(tiny, name, frame):
    backbone = Backbone.load(tiny(name), dtype="float64", device="cpu")
    settings = config(tokens=4, frame=frame)
    examples, _ = encode_rows(backbone, ROWS[:5], settings)
    grads = []
    for loss in (loss_sum, plain_loss):
        prompt = initial_rows(backbone, settings).double().requires_grad_()
        value = loss(backbone, prompt, examples)
        value.backward()
        grads.append((float(value.detach()), prompt.grad))
    assert grads[0][0] == pytest.approx(grads[1][0], rel=1e-5)
    # norms and rotations run in float32 inside these models, whatever their dtype
    torch.testing.assert_close(grads[0][1], grads[1][1], rtol=1e-4, atol=1e-5 * float(grads[1][1].abs().max()))
    assert grads[0][1].abs().max() > 0


def test_only_target_positions_reach_the_head(tiny):
    backbone = Backbone.load(tiny("llama"), dtype="float32", device="cpu")
    examples, _ = encode_rows(backbone, ROWS[:3], SMALL)
    seen = []
    hook = backbone.model.get_output_embeddings().register_forward_hook(lambda _m, i, _o: seen.append(i[0].shape[0]))
    loss_sum(backbone, initial_rows(backbone, SMALL), examples)
    hook.remove()
    assert seen == [0, sum(len(e.target) for e in examples)]  # the prefix reads nothing


def test_training_improves_validation_and_keeps_the_best_epoch(backbone, tmp_path):
    b = backbone("llama")
    prompt = train_soft_prompt(b, ROWS, SMALL, tmp_path, progress=False)
    training, validation = split_rows(ROWS, SMALL.validation, SMALL.seed)
    held_out, _ = encode_rows(b, validation, SMALL)
    losses = [h["validation"] for h in prompt.info["losses"]]
    assert prompt.info["best_validation_loss"] == pytest.approx(min(losses), abs=SMALL.min_delta)
    assert mean_loss(b, prompt.embeddings, held_out, 64) == pytest.approx(prompt.info["best_validation_loss"], abs=1e-5)
    assert min(losses) < mean_loss(b, initial_rows(b, SMALL), held_out, 64)
    assert prompt.info["rows"] == {"training": len(training), "validation": len(validation), "inputs_cut": 0}
    assert not (tmp_path / "checkpoint").exists()


def test_same_seed_same_prompt(backbone, tmp_path):
    first, second, other = (
        train_soft_prompt(
            backbone("llama"), ROWS, config(**{"seed": s, "tokens": 4, "epochs": 1}), tmp_path / n, progress=False
        )
        for s, n in ((0, "a"), (0, "b"), (1, "c"))
    )
    assert first.id == second.id
    assert first.id != other.id


def test_early_stopping_counts_stale_epochs(backbone, tmp_path):
    settings = config(tokens=2, epochs=9, patience=2, min_delta=1e9, batch_size=8)
    prompt = train_soft_prompt(backbone("llama"), ROWS, settings, tmp_path, progress=False)
    assert len(prompt.info["losses"]) == 3  # the first counts as an improvement over nothing


def test_a_finished_run_is_loaded_and_another_one_refused(backbone, tmp_path):
    settings = config(tokens=2, epochs=1)
    first = train_soft_prompt(backbone("llama"), ROWS, settings, tmp_path, progress=False)
    again = train_soft_prompt(
        backbone("llama"), ROWS, settings, tmp_path, progress=False, on_step=lambda _s: pytest.fail("trained again")
    )
    assert again.id == first.id
    with pytest.raises(ArtifactError, match="--overwrite"):
        train_soft_prompt(backbone("llama"), ROWS, config(tokens=3, epochs=1), tmp_path, progress=False)
    third = train_soft_prompt(backbone("llama"), ROWS, config(tokens=3, epochs=1), tmp_path, progress=False, overwrite=True)
    assert SoftPrompt.load(tmp_path).id == third.id


def test_targets_end_with_eos_in_fixed_and_not_in_paper(backbone):
    b = backbone("llama")
    eos = b.tokenizer.eos_token_id
    fixed, _ = encode_rows(b, ROWS, config("fixed"))
    paper, _ = encode_rows(b, ROWS, config("paper"))
    assert all(e.target[-1] == eos for e in fixed)
    assert not any(eos in e.target for e in paper)
    cut, n = encode_rows(b, [Row("word " * 500, "good")], config(max_length=40))
    assert n == 1
    assert len(cut[0].context) + len(cut[0].target) == 40
    assert cut[0].target[-1] == eos
    assert sum(t < 0 for t in cut[0].context) == 20


def test_a_target_that_cannot_fit_is_refused(backbone):
    with pytest.raises(DataError, match="max_length"):
        encode_rows(backbone("llama"), [Row("x", "word " * 100)], config(max_length=40))


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("frame", FRAMES, ids=lambda f: f.placement)
def test_rows_are_encoded_as_the_harness_encodes_requests(tiny, ours, save_prompt, frame, chat):
    b = Backbone.load(tiny("llama"), dtype="float32", device="cpu")
    folder = save_prompt(torch.randn(4, b.hidden_size), frame.placement, frame.text)
    lm = ours("llama", peft=folder)
    row = Row("Sentence: a long day Label:", "good")
    text, continuation = row.input, " good"
    if chat:
        text, continuation = lm.apply_chat_template([{"role": "user", "content": row.input}]), "good"
    context, target = lm.slots.request(text, continuation, 0)
    (example,), _ = encode_rows(b, [row], config(tokens=4, frame=frame, chat=chat))
    assert example.context + example.target == (*context, *target, b.tokenizer.eos_token_id)
    if not chat:  # in a chat the harness counts the template's last line break as part of the continuation
        assert example.context == context


def test_seq2seq_loss_equals_the_models_own_and_trains(tiny, tmp_path):
    b = Backbone.load(tiny("t5"), dtype="float32", device="cpu")
    settings = config(tokens=3, epochs=8, learning_rate=0.01, batch_size=4, patience=0)
    examples, _ = encode_rows(b, ROWS[:3], settings)
    prompt = initial_rows(b, settings)
    own = 0.0
    for e in examples:
        labels = torch.tensor([e.target])
        own += float(b.model(inputs_embeds=b.embed(torch.tensor([e.context]), prompt), labels=labels).loss) * len(e.target)
    assert float(loss_sum(b, prompt, examples)) == pytest.approx(own, rel=1e-4)
    losses = [h["train"] for h in train_soft_prompt(b, ROWS, settings, tmp_path, progress=False).info["losses"]]
    assert min(losses[4:]) < losses[0]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"


@pytest.mark.parametrize("init", ["vocab", "normal", "text"])
def test_initial_rows(backbone, init):
    b = backbone("llama")
    rows = initial_rows(b, config(tokens=5, init=init, init_text="The film"))
    assert rows.shape == (5, b.hidden_size)
    in_vocabulary = torch.cdist(rows, b.embedding.weight, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1).values < 1e-6
    assert in_vocabulary.all() == (init != "normal")


def test_divergence_is_an_error(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(losses_module, "loss_sums", lambda _b, p, parts: (p[0] * float("nan")).sum().expand(len(parts)))
    with pytest.raises(NonFiniteError, match="Lower the learning rate"):
        train_soft_prompt(backbone("llama"), ROWS, SMALL, tmp_path, progress=False)
    assert not (tmp_path / "softprompt.json").exists()


def test_presets_and_settings_are_checked():
    assert set(PRESETS) == {"fixed", "paper", "paper-general"}
    assert config() == SoftConfig()
    assert (config("paper").learning_rate, config("paper").eos) == (1e-4, False)
    for bad in ({"tokens": 0}, {"learning_rate": -1.0}, {"validation": 1.0}, {"init": "text"}, {"schedule": "steep"}):
        with pytest.raises(ConfigError):
            config(**bad)
    with pytest.raises(ConfigError, match="Did you mean 'paper'"):
        config("papr")
    with pytest.raises(ConfigError, match="Did you mean 'learning_rate'"):
        config(learning_rat=1)


def test_no_text_is_on_both_sides_of_the_split():
    rows = [Row("a", "x"), Row("a", "x"), Row("b", "x"), Row("c", "x")]
    training, validation = split_rows(rows, 0.3, 0)
    assert not {r.input for r in training} & {r.input for r in validation}
    with pytest.raises(DataError, match="too few"):
        split_rows(rows[:2], 0.5, 0)
