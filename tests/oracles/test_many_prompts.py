"""Many prompts trained side by side against each of them alone, and against PEFT under a plain loop."""

from __future__ import annotations

import pytest
import torch
from toys import rows_of

from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.frame import Frame
from lm_eval_softverb.tuners import loss as loss_module
from lm_eval_softverb.tuners.config import config
from lm_eval_softverb.tuners.encoding import encode_rows, epoch_batches
from lm_eval_softverb.tuners.loss import loss_sums, passes
from lm_eval_softverb.tuners.soft import train_together
from lm_eval_softverb.tuners.training import Training, initial_rows


def trainings(backbone, out, settings, tasks=range(8)):
    return [Training(backbone, rows_of(t), settings(t), out / f"task{t}") for t in tasks]


def trace(backbone, all_trainings, width, **more):
    """The rows of every prompt after every step, and the finished prompts."""
    steps: dict[str, list[torch.Tensor]] = {t.name: [] for t in all_trainings}

    def on_step(active, _losses):
        for training in active:
            steps[training.name].append(training.prompt.detach().clone())

    found = {t.name: p for t, p in train_together(backbone, all_trainings, width=width, on_step=on_step, **more)}
    return steps, found


@pytest.fixture
def exact(tiny):
    """A tiny Llama in float64; its initial rows are float32, as in every prompt."""
    return Backbone.load(tiny("llama", window=256), dtype="float64", device="cpu")


@pytest.mark.parametrize("frame", [Frame(), Frame("after_bos"), Frame("user_end", "Please §.")], ids=lambda f: f.placement)
def test_alone_and_in_a_bank_of_eight_step_for_step(exact, tmp_path, frame):
    """Different tasks, seeds, lengths, row counts, epochs; three at a time, so prompts enter and leave on the way."""

    def settings(t):
        return config(tokens=3 + t % 2, epochs=2 + t % 3, batch_size=4, patience=1, learning_rate=0.02, seed=t, frame=frame)

    alone: dict[str, list[torch.Tensor]] = {}
    prompts = {}
    for t in range(8):
        steps, found = trace(exact, trainings(exact, tmp_path / "alone", settings, [t]), 1)
        alone |= steps
        prompts |= found
    for width, max_tokens in ((8, None), (3, 150)):
        together = trainings(exact, tmp_path / f"together{width}", settings)
        steps, found = trace(exact, together, width, max_tokens=max_tokens)
        assert {name: len(s) for name, s in steps.items()} == {name: len(s) for name, s in alone.items()}
        for name, mine in steps.items():
            for a, b in zip(mine, alone[name], strict=True):
                # the rows are float32, and so are norms and rotations inside the model, whatever its dtype
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        for name, prompt in found.items():
            torch.testing.assert_close(prompt.embeddings, prompts[name].embeddings, rtol=1e-5, atol=1e-5)
            assert prompt.info["steps"] == prompts[name].info["steps"]
            for a, b in zip(prompt.info["losses"], prompts[name].info["losses"], strict=True):
                assert a == pytest.approx(b, rel=1e-6)
    assert len({p.info["steps"] for p in prompts.values()}) > 3


def test_a_bank_of_eight_equals_peft(tiny, tmp_path):
    """PEFT's PROMPT_TUNING under a plain loop with the same rows, order, start and optimiser, in float64."""
    from peft import PromptTuningConfig, TaskType, get_peft_model

    folder = tiny("llama", window=256)
    backbone = Backbone.load(folder, dtype="float64", device="cpu")

    def settings(t):
        return config("paper", tokens=4, epochs=2, batch_size=5, learning_rate=0.05, patience=0, seed=t)

    steps, _ = trace(backbone, trainings(backbone, tmp_path, settings), 8)
    for t in range(8):
        training = Training(backbone, rows_of(t), settings(t), tmp_path / "again")
        training.start()
        model = Backbone.load(folder, dtype="float64", device="cpu").model
        peer = get_peft_model(model, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)).double()
        weight = next(p for p in peer.parameters() if p.requires_grad)
        weight.data.copy_(initial_rows(backbone, settings(t)))
        optimiser = torch.optim.AdamW([weight], lr=0.05, weight_decay=settings(t).weight_decay)
        expected = []
        for epoch in range(2):
            for indices in epoch_batches(training.examples, settings(t), epoch):
                batch = [training.examples[i] for i in indices]
                texts = [[x for x in (*e.context, *e.target) if x >= 0] for e in batch]
                width = max(map(len, texts))
                ids = torch.tensor([x + [0] * (width - len(x)) for x in texts])
                labels = torch.full_like(ids, -100)
                for r, e in enumerate(batch):
                    n = len(e.context) - 4
                    labels[r, n : n + len(e.target)] = torch.tensor(e.target)
                optimiser.zero_grad()
                peer(input_ids=ids, labels=labels).loss.backward()
                optimiser.step()
                expected.append(weight.detach().clone())
        assert len(steps[f"task{t}"]) == len(expected)
        for mine, theirs in zip(steps[f"task{t}"], expected, strict=True):
            # ours is float32 between the steps, theirs float64; PEFT's loss also averages in float32
            torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-3, atol=1e-3)
    assert (expected[-1] - initial_rows(backbone, settings(7))).abs().max() > 0.05


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gemma3", "mamba", "t5"])
def test_losses_and_gradients_of_parts_are_those_of_each_alone(tiny, name):
    backbone = Backbone.load(tiny(name, window=256), dtype="float64", device="cpu")
    settings = [config(tokens=n, seed=n) for n in (2, 5, 3)]
    examples = [encode_rows(backbone, rows_of(t)[: 4 + t], c)[0] for t, c in enumerate(settings)]

    def prompts():
        return [initial_rows(backbone, c).double().requires_grad_() for c in settings]

    together, alone = prompts(), prompts()
    # not in order, and one prompt is not in this pass
    sums = loss_sums(backbone, together, [(2, examples[2]), (0, examples[0])])
    sums.sum().backward()
    for place, i in enumerate((2, 0)):
        [value] = loss_sums(backbone, alone, [(i, examples[i])])
        value.backward()
        assert float(sums[place].detach()) == pytest.approx(float(value.detach()), rel=1e-6)
        scale = float(alone[i].grad.abs().max())
        torch.testing.assert_close(together[i].grad, alone[i].grad, rtol=1e-4, atol=1e-5 * scale)
    assert together[1].grad is None


def test_passes_hold_every_row_once_and_stay_within_bounds(backbone):
    b = backbone("llama")
    batches = [encode_rows(b, rows_of(t, 3 + 5 * t), config(tokens=2))[0] for t in range(6)]
    for limit in (1, 40, 150, 10**6):
        seen: list[tuple[int, int]] = []
        for parts in passes(batches, limit):
            rows = [e for _, part in parts for e in part]
            assert len(rows) * max(len(e.ids) for e in rows) <= limit or len(rows) == 1
            assert len({i for i, _ in parts}) == len(parts)
            seen += [(i, id(e)) for i, part in parts for e in part]
        assert sorted(seen) == sorted((i, id(e)) for i, batch in enumerate(batches) for e in batch)
    assert len(list(passes(batches, 10**6))) == 1


def test_one_prompt_that_diverges_does_not_stop_the_others(exact, tmp_path, monkeypatch):
    real = loss_module.loss_sums
    calls = 0

    def broken(b, prompts, parts):
        nonlocal calls
        calls += 1
        values = real(b, prompts, parts)
        bad = torch.tensor([float("nan") if i == 1 and calls > 2 and len(prompts) == 3 else 0.0 for i, _ in parts])
        return values + bad * prompts[min(1, len(prompts) - 1)].sum()

    monkeypatch.setattr(loss_module, "loss_sums", broken)
    three = trainings(exact, tmp_path, lambda t: config(tokens=2, epochs=2, batch_size=4, seed=t), range(3))
    found = {t.name: p for t, p in train_together(exact, three, width=3)}
    assert "task1 diverged" in str(found["task1"])
    assert (tmp_path / "task0" / "softprompt.json").exists() and (tmp_path / "task2" / "softprompt.json").exists()
    assert not (tmp_path / "task1" / "softprompt.json").exists()
