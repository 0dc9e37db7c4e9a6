"""Training a translator: by heart, the epoch that is kept, memory, numbers, and what is refused. Kills are among the faults."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from toy_translators import learnt, overfit, toy_bank

from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.errors import ArtifactError, BaseModelMismatch, ConfigError, NonFiniteError
from lm_eval_softverb.verbalizers import translator_training
from lm_eval_softverb.verbalizers.elicit import Elicit
from lm_eval_softverb.verbalizers.translator import Translator
from lm_eval_softverb.verbalizers.translator_adapter import TranslatorAdapter
from lm_eval_softverb.verbalizers.translator_config import Between, config
from lm_eval_softverb.verbalizers.translator_data import target_losses
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
    assert TranslatorAdapter.load(tmp_path / "t").between == Between(bos=False)


def test_an_instruction_is_cut_behind_a_sentence_and_names_the_answers(tiny, tmp_path, monkeypatch):
    b = Backbone.load(tiny("llama", window=256), dtype="float32", device="cpu")
    bank = toy_bank(b, tmp_path / "bank")
    own = {p.id: {e["labels"][1]: 1.0} for p, e in zip(bank.prompts, bank.entries, strict=True)}  # stays 1 when drawn again
    monkeypatch.setattr(Elicit, "answers", lambda self, b, prompts, kind: [own[p.id] for p in prompts])
    monkeypatch.setenv("SOFTVERB_CACHE", str(tmp_path / "cache"))
    bank = replace(bank, entries=tuple({**e, "instruction": f"Say it. {e['instruction']}"} for e in bank.entries))
    most = len(b.tokenizer.encode("Say it.", add_special_tokens=False))
    cut = {"max_tokens": most, "whole_sentences": True}
    made = overfit(b, bank, tmp_path / "t", kind="instructions", answers=True, name_answers=True, **cut)
    assert made.info["counts"]["texts_cut"] == len(bank.prompts)
    prompts, entries = learnt(made, bank)
    found = Translator(adapter=str(tmp_path / "t")).verbalize(b, prompts, kind="instructions", max_new_tokens=60)
    assert [v.text for [v] in found] == [f"Say it. Answer with '{e['labels'][1]}'." for e in entries]
    assert not any(v.details["cut"] for [v] in found)


def test_with_the_prompts_own_answers_in_front(tiny, tmp_path, monkeypatch):
    """They are the frozen model's, and the same when learning and when reading, also where they are not kept."""
    from peft.tuners.lora import LoraLayer

    b = Backbone.load(tiny("llama", window=256), dtype="float32", device="cpu")
    bank, seen, real = toy_bank(b, tmp_path / "bank"), [], Elicit.answers

    def answers(self, b, prompts, kind):
        assert not any(isinstance(m, LoraLayer) for m in b.model.modules())
        seen.append({p.id: found for p, found in zip(prompts, real(self, b, prompts, kind), strict=True)})
        return [{next(iter(seen[-1][p.id])): 1.0} for p in prompts]  # a share of 1 stays 1 when it is drawn again

    monkeypatch.setattr(Elicit, "answers", answers)
    monkeypatch.setenv("SOFTVERB_CACHE", str(tmp_path / "first"))
    made = overfit(b, bank, tmp_path / "t", answers=True)
    prompts, entries = learnt(made, bank)
    translator = Translator(adapter=str(tmp_path / "t"))
    monkeypatch.setenv("SOFTVERB_CACHE", str(tmp_path / "second"))
    found = translator.verbalize(b, prompts, kind="labels", max_new_tokens=20)
    assert [v.text for [v] in found] == [", ".join(e["labels"]) for e in entries]
    assert all(seen[0][p.id] == seen[1][p.id] for p in prompts)
    with pytest.raises(ConfigError, match="a bridge leaves"):
        monkeypatch.setattr(Translator, "files", {})
        monkeypatch.setattr(Translator, "_read", lambda self, b, prompts: prompts)
        Translator(adapter=str(tmp_path / "t"), bridge="x").verbalize(b, prompts, kind="labels", max_new_tokens=20)


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
    assert made.info["forced_despite"]


def test_what_is_recorded(backbone, bank, tmp_path):
    made = train(backbone("llama"), bank, tmp_path / "t", max_tokens=1)
    info = TranslatorAdapter.load(tmp_path / "t").info
    assert info == json.loads(json.dumps(dict(made.info)))
    assert len(info["prompts"]["training"]) == 5 and len(info["prompts"]["validation"]) == 1
    assert info["counts"]["texts_cut"] == 6 and info["counts"]["texts_per_epoch"] == 5
    assert set(info["versions"]) == {"torch", "transformers", "peft", "lm_eval_softverb"}
    assert info["config"]["bos"] is True and info["processes"] == 1 and len(info["data_sha256"]) == 64
    assert not (tmp_path / "t" / "checkpoint").exists()
