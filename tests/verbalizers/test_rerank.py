"""Re-ranking without labels: the KL against a plain loop, which text wins, and what inputs may be."""

from __future__ import annotations

import json

import pytest
import torch
from toys import EOS, hard_rows

from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.errors import ConfigError, DataError, NonFiniteError
from lm_eval_softverb.frame import Frame
from lm_eval_softverb.prompt import SoftPrompt
from lm_eval_softverb.verbalizers import rerank as module
from lm_eval_softverb.verbalizers.base import Verbalization, settings_of
from lm_eval_softverb.verbalizers.rerank import Reranked, divergences, read_inputs, rerank
from lm_eval_softverb.verbalizers.selfverb import SelfVerb

HARD = "kind people and"
TEXTS = ["red, blue", HARD, "", "a dull story"]
INPUTS = ["The film is", "Is it 42?", "good music and kind people. Sentiment:  "]
FRAMES = [Frame(), Frame("after_bos"), Frame("user_end", "Please §."), Frame("user_start", "Be § now.")]


def hard_prompt(b, frame=FRAMES[0], chat: bool = False, **fields) -> SoftPrompt:
    rows = hard_rows(b, b.tokenizer.encode(HARD, add_special_tokens=False))
    return SoftPrompt(rows, frame=frame, info={"config": {"chat": chat}}, **fields)


def soft_prompt(b, seed: int = 1, **fields) -> SoftPrompt:
    return SoftPrompt(torch.randn(4, b.hidden_size, generator=torch.Generator().manual_seed(seed)), **fields)


def found(texts=TEXTS) -> list[Verbalization]:
    return [Verbalization(t, 0.5, {"own": i}) for i, t in enumerate(texts)]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("frame", FRAMES, ids=str)
def test_the_text_equal_to_the_prompt_wins_with_no_divergence(backbone, frame, chat):
    b = backbone("llama")
    [best, *rest] = rerank(b, [hard_prompt(b, frame, chat)], [found()], {"*": INPUTS})[0]
    assert best.text == HARD and best.details["kl"] == pytest.approx(0.0, abs=1e-5)
    assert best.details == {"own": 1, "kl": best.details["kl"], "kl_inputs": 3, "rank_before": 1}
    assert min(v.details["kl"] for v in rest) > 0.05
    values = [v.details["kl"] for v in rest]
    assert values == sorted(values) and {v.text for v in rest} == set(TEXTS) - {HARD}


def loop(b: Backbone, prompt: SoftPrompt, text: str, inputs, tokens: int) -> float:
    """Mean KL of one text, from embeddings, without a cache: one forward pass per position."""
    t, total, positions = b.tokenizer, 0.0, 0
    with torch.no_grad():
        for x in inputs:
            behind = b.embedding(torch.tensor(t.encode(x.rstrip())))
            ids = t.encode(text, add_special_tokens=False)
            slots = [prompt.embeddings, b.embedding(torch.tensor(ids, dtype=torch.long))]
            answer: list[int] = []
            for _ in range(tokens):
                own = b.embedding(torch.tensor(answer, dtype=torch.long))
                p, q = (
                    b.model(inputs_embeds=torch.cat([slot, behind, own])[None]).logits[0, -1].double().softmax(-1)
                    for slot in slots
                )
                total, positions = total + float((p * (p.log() - q.log())).sum()), positions + 1
                token = int(p.argmax())
                if token == EOS:
                    break
                answer.append(token)
    return total / positions


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "gemma3"])
def test_divergences_are_those_of_a_plain_loop(backbone, name, tokens):
    b = backbone(name)
    prompt = soft_prompt(b)
    values = divergences(b, prompt, TEXTS, INPUTS, tokens)
    for value, text in zip(values, TEXTS, strict=True):
        assert value == pytest.approx(loop(b, prompt, text, INPUTS, tokens), rel=1e-3, abs=1e-5)


def test_an_answer_that_is_over_counts_its_eos(backbone, monkeypatch):
    """An answer of one token that ended by itself has two positions, its EOS among them."""
    b = backbone("llama")

    def answered(answer, tokens):
        monkeypatch.setattr(module, "generate", lambda _b, _r, contexts, **_kw: [answer for _ in contexts])
        return divergences(b, soft_prompt(b), TEXTS, INPUTS, tokens)

    over, two, one = answered([5], 5), answered([5, 7], 2), answered([5], 1)  # 7 is in no position before it
    assert over == pytest.approx(two) and over != pytest.approx(one)
    assert answered([], 5) == pytest.approx(one)  # stopped at once: the first position is that of EOS


def test_neither_batches_nor_memory_change_a_divergence(backbone, monkeypatch):
    b = backbone("llama")
    together, real = divergences(b, soft_prompt(b), TEXTS, INPUTS), module.generate

    def tight(backbone, rows, contexts, **kw):
        if len(contexts) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return real(backbone, rows, contexts, **kw)

    monkeypatch.setattr(module, "generate", tight)
    assert divergences(b, soft_prompt(b), TEXTS, INPUTS) == pytest.approx(together, rel=1e-4)


def test_equal_texts_are_compared_once(backbone, monkeypatch):
    b, seen = backbone("llama"), []
    monkeypatch.setattr(module, "divergences", lambda _b, _p, texts, *_a: seen.append(texts) or [1.0] * len(texts))
    assert [v.details["own"] for v in rerank(b, [soft_prompt(b)], [found(["a", "b", "a"])], {"*": ["x"]})[0]] == [0, 1, 2]
    assert seen == [["a", "b"]]


# --- inputs ----------------------------------------------------------------------------------------------------------


def test_inputs_are_found_by_id_by_name_or_for_all(backbone):
    b = backbone("llama")
    own, row, folder, other = (soft_prompt(b, s, source=x) for s, x in enumerate(["", "/banks/x#p1", "/prompts/emotion", "/y"]))
    inputs = {own.id: ["a"], "p1": ["b"], "emotion": ["c"], "*": ["d"]}
    assert [module.inputs_of(p, inputs) for p in (own, row, folder, other)] == [["a"], ["b"], ["c"], ["d"]]
    with pytest.raises(DataError, match=r"no unlabelled inputs.*'p1'"):
        module.inputs_of(row, {"p2": ["b"]})


def test_lines_of_inputs(tmp_path):
    path = tmp_path / "inputs.jsonl"
    path.write_text(
        '{"prompt_id": "a", "input": "x"}\n{"prompt_id": "a", "inputs": ["y", "z"]}\n{"prompt_id": "*", "input": "w"}\n'
    )
    assert read_inputs(path) == {"a": ["x", "y", "z"], "*": ["w"]}
    for line in ({"input": "x"}, {"prompt_id": "a"}, {"prompt_id": "a", "inputs": "x"}, {"prompt_id": "a", "input": " "}):
        path.write_text(json.dumps(line))
        with pytest.raises(DataError, match=r"inputs\.jsonl:1"):
            read_inputs(path)
    path.write_text("")
    with pytest.raises(DataError, match="no inputs"):
        read_inputs(path)


# --- any method ------------------------------------------------------------------------------------------------------


def test_any_method_can_be_reranked(tiny, tmp_path):
    b = Backbone.load(tiny("llama", window=1024), dtype="float32", device="cpu")
    path = tmp_path / "inputs.jsonl"
    path.write_text(json.dumps({"prompt_id": "*", "inputs": INPUTS}))
    inner = SelfVerb(samples=4)
    method = Reranked(inner, str(path))
    [plain], [ranked] = (m.verbalize(b, [soft_prompt(b)], kind="labels", max_new_tokens=4) for m in (inner, method))
    assert {v.text for v in plain} == {v.text for v in ranked}
    values = [v.details["kl"] for v in ranked]
    assert values == sorted(values) and len(values) > 1
    assert [plain[v.details["rank_before"]].text for v in ranked] == [v.text for v in ranked]
    settings = settings_of(method)
    assert settings["method"] == "selfverb" and settings["inner"]["samples"] == 4
    path.write_text(json.dumps({"prompt_id": "*", "inputs": INPUTS[:1]}))
    assert settings_of(method) != settings  # other inputs, other texts
    with pytest.raises(DataError):
        Reranked(inner, str(tmp_path / "none.jsonl"))


@pytest.mark.parametrize("name", ["t5", "mamba"])
def test_other_architectures_are_refused(backbone, name):
    with pytest.raises(ConfigError, match="decoder-only"):
        divergences(backbone(name), soft_prompt(backbone(name)), TEXTS, INPUTS)


def test_what_does_not_fit_is_refused(backbone):
    with pytest.raises(ConfigError, match="longest inputs"):
        divergences(backbone("llama"), soft_prompt(backbone("llama")), TEXTS, ["a dull story " * 60])


def test_a_divergence_that_is_no_number_is_refused(backbone, monkeypatch):
    b, real = backbone("llama"), Backbone.logits
    monkeypatch.setattr(Backbone, "logits", lambda *a, **kw: real(*a, **kw) * float("nan"))
    monkeypatch.setattr(module, "generate", lambda _b, _r, contexts, **_kw: [[5] for _ in contexts])
    with pytest.raises(NonFiniteError, match="no finite probabilities"):
        divergences(b, soft_prompt(b), TEXTS, INPUTS)
