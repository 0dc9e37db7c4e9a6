"""The translator at work: against a plain loop, in batches, with samples and prefill, and through the harness."""

from __future__ import annotations

import math

import pytest
import torch
from toy_translators import SETS, learnt, overfit, toy_bank, toy_prompt
from toys import BOS, EOS

from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.batching import MAX_ROWS
from lm_eval_softverb.errors import ArtifactError, ConfigError
from lm_eval_softverb.verbalizers import translator as module
from lm_eval_softverb.verbalizers.base import create, settings_of
from lm_eval_softverb.verbalizers.translator import Translator
from lm_eval_softverb.verbalizers.translator_adapter import TranslatorAdapter
from lm_eval_softverb.verbalizers.translator_lora import layers_of

NEW = 12


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """``trained(name)`` → backbone, bank, folder of a translator that knows the bank's training prompts."""
    kept = {}

    def build(name: str):
        if name not in kept:
            root = tmp_path_factory.mktemp(name)
            b = Backbone.load(tiny(name, window=1024), dtype="float32", device="cpu")
            bank = toy_bank(b, root / "bank")
            overfit(b, bank, root / "t", epochs=12)
            kept[name] = b, bank, str(root / "t")
        return kept[name]

    return build


def verbalize(b, prompts, adapter, new=NEW, **settings):
    return Translator(adapter=adapter, **settings).verbalize(b, prompts, kind="labels", max_new_tokens=new)


def plain(b: Backbone, adapter: str, prompt, between: list[int], new: int = NEW) -> tuple[str, float, bool]:
    """Greedy text, confidence and whether it was cut: one token at a time, no cache, PEFT's layers on."""
    ids, scores = [], []
    with torch.no_grad(), layers_of(b, TranslatorAdapter.load(adapter)).on():
        for _ in range(new):
            real = b.embedding(torch.tensor([[*between, *ids]], dtype=torch.long))
            logits = b.model(inputs_embeds=torch.cat([prompt.embeddings[None], real], dim=1)).logits[0, -1].double()
            token = int(logits.argmax())
            if token == EOS:
                return b.tokenizer.decode(ids).strip(), math.exp(sum(scores) / max(1, len(scores))), False
            ids.append(token)
            scores.append(float(logits.log_softmax(-1)[token]))
    return b.tokenizer.decode(ids, skip_special_tokens=True).strip(), math.exp(sum(scores) / len(scores)), True


MIXED = [(11, 2), (12, 7), (13, 1), (14, 4)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "gemma3"])
def test_texts_are_those_of_a_plain_loop(trained, name):
    b, bank, adapter = trained(name)
    prompts = [*bank.prompts, *(toy_prompt(b, s, n) for s, n in MIXED)]
    for prompt, [found] in zip(prompts, verbalize(b, prompts, adapter), strict=True):
        text, confidence, cut = plain(b, adapter, prompt, [BOS])
        assert (found.text, found.details["cut"]) == (text, cut)
        assert found.confidence == pytest.approx(confidence if text else 0.0, rel=1e-3)


@pytest.mark.parametrize("settings", [{}, {"samples": 5, "seed": 2}, {"prefill": "red"}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_neither_batch_nor_order_changes_a_text(trained, name, settings):
    b, _, adapter = trained(name)
    prompts = [toy_prompt(b, s, n) for s, n in MIXED]
    together = verbalize(b, prompts, adapter, **settings)
    alone = [verbalize(b, [p], adapter, **settings)[0] for p in prompts]
    backwards = verbalize(b, prompts[::-1], adapter, **settings)[::-1]
    for other in (alone, backwards):
        assert [[v.text for v in found] for found in together] == [[v.text for v in found] for found in other]
        for found, same in zip(together, other, strict=True):
            assert [v.confidence for v in found] == pytest.approx([v.confidence for v in same], rel=1e-4)
    assert len({found[0].text for found in together}) > 2
    assert verbalize(b, [], adapter) == []


def test_prompts_go_through_the_model_together(trained, monkeypatch):
    b, bank, adapter = trained("llama")
    rows, real = [], module.generate
    monkeypatch.setattr(module, "generate", lambda b, r, c, **kw: rows.append(len(c)) or real(b, r, c, **kw))
    verbalize(b, bank.prompts, adapter, samples=3)
    assert rows == [3 * len(SETS)] and rows[0] <= MAX_ROWS


def test_the_frozen_model_is_bit_for_bit_what_it_was(trained):
    b, bank, adapter = trained("llama")
    ids, fresh = torch.tensor([[5, 9, 40]]), Backbone(b.model, b.tokenizer, b.name).fingerprint
    with torch.no_grad():
        before = b.model(ids).logits
        verbalize(b, bank.prompts, adapter)
        assert torch.equal(b.model(ids).logits, before)
    assert Backbone(b.model, b.tokenizer, b.name).fingerprint == fresh == TranslatorAdapter.load(adapter).fingerprint


def test_layers_are_made_once_per_model_and_adapter(trained, monkeypatch):
    b, bank, adapter = trained("llama")
    verbalize(b, bank.prompts[:1], adapter)
    monkeypatch.setattr("lm_eval_softverb.verbalizers.translator_lora.LoraLayers", lambda *_a, **_k: pytest.fail("made again"))
    verbalize(b, bank.prompts[:1], adapter)


def test_two_translators_of_one_model_do_not_mix(trained, tmp_path):
    b, bank, first = trained("llama")
    overfit(b, bank, tmp_path / "second", kind="instructions", epochs=12)
    before = [v.text for [v] in verbalize(b, bank.prompts, first)]
    other = [v.text for [v] in verbalize(b, bank.prompts, str(tmp_path / "second"))]
    assert [v.text for [v] in verbalize(b, bank.prompts, first)] == before != other


def test_memory_that_runs_out_halves_the_batch(trained, monkeypatch):
    b, bank, adapter = trained("llama")
    expected, real = verbalize(b, bank.prompts, adapter), module.generate

    def tight(backbone, rows, contexts, **kw):
        if len(contexts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return real(backbone, rows, contexts, **kw)

    monkeypatch.setattr(module, "generate", tight)
    assert [v.text for [v] in verbalize(b, bank.prompts, adapter)] == [v.text for [v] in expected]


# --- samples and prefill ---------------------------------------------------------------------------------------------


def test_samples_come_as_their_distribution(trained):
    b, _, adapter = trained("llama")
    [found] = verbalize(b, [toy_prompt(b, 11)], adapter, new=1, samples=40)
    assert sum(v.confidence for v in found) == pytest.approx(1.0)
    assert all(v.details["share"] == v.confidence == v.details["count"] / 40 for v in found)
    counts = [v.details["count"] for v in found]
    assert counts == sorted(counts, reverse=True) and len(counts) > 1
    assert all(0 <= v.details["likelihood"] <= 1 for v in found)
    again, other = (verbalize(b, [toy_prompt(b, 11)], adapter, new=4, samples=6, seed=s) for s in (0, 1))
    assert verbalize(b, [toy_prompt(b, 11)], adapter, new=4, samples=6) == again != other


def test_a_cold_sample_is_the_greedy_text(trained):
    b, bank, adapter = trained("llama")
    [[cold]] = verbalize(b, bank.prompts[:1], adapter, samples=4, temperature=1e-3)
    [[greedy]] = verbalize(b, bank.prompts[:1], adapter)
    assert (cold.text, cold.confidence, cold.details["count"]) == (greedy.text, 1.0, 4)
    assert cold.details["likelihood"] == pytest.approx(greedy.confidence, rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_prefill_begins_the_text_and_is_not_part_of_it(trained, name):
    b, bank, adapter = trained(name)
    prefill = "The label is"
    [[found]] = verbalize(b, bank.prompts[:1], adapter, prefill=prefill)
    own = b.tokenizer.encode(prefill, add_special_tokens=False)
    text, confidence, _ = plain(b, adapter, bank.prompts[0], [BOS, *own])
    assert found.text == text and found.confidence == pytest.approx(confidence if text else 0.0, rel=1e-3)
    assert found.details["prefill"] == prefill
    assert found.details["with_prefill"].startswith(prefill) and found.details["with_prefill"].endswith(text)
    [[without]] = verbalize(b, bank.prompts[:1], adapter)
    assert "with_prefill" not in without.details and without.text != found.text


def test_a_text_that_max_new_tokens_ended_says_so(trained):
    b, bank, adapter = trained("llama")
    made = TranslatorAdapter.load(adapter)
    prompts, _ = learnt(made, bank)
    [[whole]], [[short]] = (verbalize(b, prompts[:1], adapter, new=new) for new in (NEW, 2))
    assert whole.text.startswith(short.text) and whole.text != short.text
    assert (whole.details["cut"], short.details["cut"]) == (False, True)
    assert whole.details["adapter"] == made.id and whole.details["trained_for"] == "labels"


# --- settings --------------------------------------------------------------------------------------------------------


def test_settings_are_checked_before_any_model_is_loaded(trained, tmp_path):
    _, _, adapter = trained("llama")
    for settings, message in (
        ({}, "needs adapter=DIR"),
        ({"adapter": adapter, "samples": -1}, "samples"),
        ({"adapter": adapter, "temperature": 0}, "temperature"),
        ({"adapter": adapter, "rerank": "r", "bridge": "b"}, "only one of them"),
        ({"adapter": adapter, "adaptor": "x"}, "Did you mean 'adapter'"),
    ):
        with pytest.raises(ConfigError, match=message):
            create("translator", **settings)
    with pytest.raises(ArtifactError, match="no translator"):
        create("translator", adapter=str(tmp_path))
    assert create("translator", adapter=adapter, samples="3") == Translator(adapter=adapter, samples=3)


def test_settings_tell_apart_what_one_folder_held_at_different_times(trained, tmp_path):
    b, bank, _ = trained("llama")
    seen = []
    for seed in range(2):
        overfit(b, bank, tmp_path / f"{seed}", epochs=1, seed=seed)
        folder = tmp_path / "t"
        if folder.exists():
            folder.unlink()
        folder.symlink_to(tmp_path / f"{seed}")
        seen.append(settings_of(Translator(adapter=str(folder))))
    assert seen[0]["adapter"] == seen[1]["adapter"] and seen[0] != seen[1]


@pytest.mark.parametrize("name", ["t5", "mamba"])
def test_other_architectures_are_refused(trained, backbone, name):
    with pytest.raises(ConfigError, match="decoder-only"):
        verbalize(backbone(name), [toy_prompt(backbone(name), 1)], trained("llama")[2])


def test_what_does_not_fit_is_refused(trained):
    b, bank, adapter = trained("llama")
    with pytest.raises(ConfigError, match=r"do not fit the 1024 tokens.*max_new_tokens"):
        verbalize(b, bank.prompts, adapter, new=1020)


# --- through the harness ---------------------------------------------------------------------------------------------


def test_the_alias_runs_both_tasks_through_the_harness(trained, tiny, monkeypatch, hashing):
    import lm_eval
    from lm_eval.tasks import TaskManager

    from lm_eval_softverb.plugin import register, task_dir

    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _results: None)
    register()
    _b, bank, adapter = trained("llama")
    arguments = {"pretrained": tiny("llama", window=1024), "bank": bank.source, "dtype": "float32", "adapter": adapter}
    results = lm_eval.simple_evaluate(
        model="translator",
        model_args=arguments,
        tasks=["verbalize_labels", "verbalize_instructions"],
        task_manager=TaskManager(include_path=str(task_dir()), include_defaults=False, metadata=arguments),
        gen_kwargs=f"max_gen_toks={NEW}",
        bootstrap_iters=10,
    )
    known = set(TranslatorAdapter.load(adapter).info["prompts"]["training"])
    samples = results["samples"]["verbalize_labels"]
    right = [s["doc"]["prompt_id"] for s in samples if s["filtered_resps"] == [s["doc"]["target"]]]
    assert set(right) >= known - {"p5"} and len(samples) == len(SETS)
    assert results["results"]["verbalize_labels"]["recall,none"] >= (len(SETS) - 2) / len(SETS)
    recorded = results["config"]["verbalizer"]
    assert recorded["method"] == "translator" and recorded["adapter_id"] == TranslatorAdapter.load(adapter).id
    assert set(recorded["answers"]) == {f"p{i}" for i in range(len(SETS))}
