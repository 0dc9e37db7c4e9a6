"""Preference training: the loss by hand, the reference it starts from, which pairs there are, and an end-to-end run."""

from __future__ import annotations

import json
import math

import pytest
import torch
from toy_translators import SETS, overfit, toy_bank

from lm_eval_softverb.errors import ArtifactError, ConfigError, DataError
from lm_eval_softverb.verbalizers import preference as module
from lm_eval_softverb.verbalizers.preference import CANDIDATES, Preferring, dpo_loss, preferred, train_preferences
from lm_eval_softverb.verbalizers.translator_adapter import TranslatorAdapter
from lm_eval_softverb.verbalizers.translator_config import PreferenceConfig
from lm_eval_softverb.verbalizers.translator_data import target_losses
from lm_eval_softverb.verbalizers.translator_lora import layers_of

INPUTS = ["The film is", "Is it 42?"]
QUICK = {"candidates": 8, "max_tokens": 20, "answer_tokens": 2, "temperature": 1.5, "batch_size": 2}


@pytest.fixture(scope="module")
def started(tiny, tmp_path_factory):
    """Backbone, bank, folder of a translator, file of inputs."""
    from lm_eval_softverb.backbone import Backbone

    root = tmp_path_factory.mktemp("start")
    b = Backbone.load(tiny("llama"), dtype="float32", device="cpu")
    bank = toy_bank(b, root / "bank")
    overfit(b, bank, root / "t")
    (root / "inputs.jsonl").write_text(json.dumps({"prompt_id": "*", "inputs": INPUTS}))
    return b, bank, root / "t", root / "inputs.jsonl"


def train(started, out, **changes):
    b, bank, start, inputs = started
    config = PreferenceConfig(**{**QUICK, **changes})
    return train_preferences(b, bank, start, inputs, config, out, progress=False, checkpoint_seconds=1e9)


# --- the loss --------------------------------------------------------------------------------------------------------


def test_the_loss_by_hand_in_float64():
    chosen, rejected = torch.tensor([-3.0, -8.0, -1.0], dtype=torch.float64), torch.tensor([-5.0, -2.0, -1.0]).double()
    reference = torch.tensor([[-4.0, -4.5], [-7.0, -3.0], [-1.0, -1.0]], dtype=torch.float64)
    beta, expected = 0.3, []
    for won, lost, (won_before, lost_before) in zip(chosen.tolist(), rejected.tolist(), reference.tolist(), strict=True):
        ratio = (math.exp(won) / math.exp(won_before)) ** beta, (math.exp(lost) / math.exp(lost_before)) ** beta
        expected.append(-math.log(ratio[0] / (ratio[0] + ratio[1])))  # Bradley-Terry with rewards beta log(pi / ref)
    found = dpo_loss(chosen, rejected, reference, beta)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    assert found[2] == pytest.approx(math.log(2))


def test_its_gradient_raises_the_chosen_and_lowers_the_rejected():
    chosen, rejected = torch.tensor([-3.0], requires_grad=True), torch.tensor([-2.0], requires_grad=True)
    dpo_loss(chosen, rejected, torch.tensor([[-3.0, -2.0]]), 0.1).sum().backward()
    assert float(chosen.grad) == pytest.approx(-0.05) and float(rejected.grad) == pytest.approx(0.05)


def test_the_reference_is_the_translator_before_training_not_the_frozen_model(started, tmp_path, monkeypatch):
    b, _, start, _ = started
    seen = []
    real = Preferring.losses
    monkeypatch.setattr(Preferring, "losses", lambda self, x: seen.append((list(x), real(self, x).detach())) or real(self, x))
    train(started, tmp_path / "dpo")
    pairs, losses = seen[0]
    assert losses.tolist() == pytest.approx([math.log(2)] * len(pairs), rel=1e-3)  # nothing has moved yet
    with torch.no_grad():
        frozen = -target_losses(b, [pairs[0].chosen])
        with layers_of(b, TranslatorAdapter.load(start)).on():
            own = -target_losses(b, [pairs[0].chosen])
    assert pairs[0].reference[0] == pytest.approx(float(own), rel=1e-4)
    assert abs(float(own) - float(frozen)) > 0.1


# --- pairs -----------------------------------------------------------------------------------------------------------


def line(text, kl, cut=False):
    return {"text": text, "details": {"kl": kl, "cut": cut}}


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([line("b", 2.0), line("a", 1.0), line("c", 3.0)], ("a", "c")),
        ([line("a", 1.0, cut=True), line("b", 2.0), line("c", 3.0), line("d", 4.0, cut=True)], ("b", "c")),
        ([line("a", 1.0)], None),
        ([line("a", 1.0), line("b", 1.0)], None),
        ([line("a", 1.0), line("A.", 2.0)], None),
        ([line("a", 1.0, cut=True), line("b", 2.0, cut=True)], None),
    ],
)
def test_the_pair_of_a_prompt(lines, expected):
    assert preferred(lines) == expected


# --- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_prefers_what_behaves_like_the_prompt(started, tmp_path):
    _b, _, start, _ = started
    made = train(started, tmp_path / "dpo", learning_rate=3e-3, epochs=6, patience=0, min_delta=-1e9)
    first = TranslatorAdapter.load(start)
    assert made.info["start"]["id"] == first.id != made.id
    assert made.info["losses"][-1]["train"] < math.log(2) - 0.05
    lines = [json.loads(x) for x in (tmp_path / "dpo" / CANDIDATES).read_text().splitlines()]
    assert {x["prompt_id"] for x in lines} == {f"p{i}" for i in range(len(SETS))}
    assert sum(x["details"]["count"] for x in lines) == 8 * len(SETS)
    counted = made.info["counts"]["without_preference"] + sum(len(x) for x in made.info["prompts"].values())
    assert counted == len(SETS)
    assert train(started, tmp_path / "dpo", learning_rate=3e-3, epochs=6, patience=0, min_delta=-1e9).id == made.id
    with pytest.raises(ArtifactError, match="another run"):
        train(started, tmp_path / "dpo", beta=0.2)


def test_the_defaults_are_the_paper_s():
    config = PreferenceConfig()
    assert (config.beta, config.learning_rate, config.epochs, config.dropout) == (0.1, 1e-6, 1, 0.0)
    for wrong in ({"beta": 0.0}, {"candidates": 1}, {"answer_tokens": 0}, {"temperature": 0.0}, {"epochs": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            PreferenceConfig(**wrong)


def test_prompts_without_inputs_are_refused_before_anything_is_drawn(started, tmp_path, monkeypatch):
    b, bank, start, _ = started
    (tmp_path / "few.jsonl").write_text(json.dumps({"prompt_id": "p0", "inputs": INPUTS}))
    monkeypatch.setattr(module, "verbalize_to", lambda *_a, **_k: pytest.fail("drawn"))
    with pytest.raises(DataError, match="no unlabelled inputs"):
        train_preferences(b, bank, start, tmp_path / "few.jsonl", PreferenceConfig(**QUICK), tmp_path / "o", progress=False)


def test_too_few_different_texts_are_refused(started, tmp_path):
    with pytest.raises(DataError, match="two different finished texts among 2 candidates"):
        train(started, tmp_path / "cold", temperature=1e-3, candidates=2)
