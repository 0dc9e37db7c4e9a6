"""Elicitation: answers against a plain loop over real tokens, alone and in batches, and which of them make the text."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from toys import EOS, hard_rows

from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.errors import ConfigError, DataError
from lm_eval_softverb.frame import Frame
from lm_eval_softverb.prompt import SoftPrompt
from lm_eval_softverb.verbalizers import elicit as module
from lm_eval_softverb.verbalizers.answers import normalised
from lm_eval_softverb.verbalizers.base import create, settings_of
from lm_eval_softverb.verbalizers.elicit import FORMS, NEUTRAL, Elicit
from lm_eval_softverb.verbalizers.telling import CHOOSE, instruction

HARD = "kind people and"
PLAIN = Frame()
SURE = {"temperature": 1e-4, "samples": 2, "min_share": 0.0}  # as good as greedy


@pytest.fixture
def model(backbone):
    return backbone("llama")


def hard_prompt(b: Backbone, frame: Frame = PLAIN) -> SoftPrompt:
    return SoftPrompt(hard_rows(b, b.tokenizer.encode(HARD, add_special_tokens=False)), frame=frame)


def soft_prompts(b: Backbone, n: int) -> list[SoftPrompt]:
    rows = [torch.randn(4, b.hidden_size, generator=torch.Generator().manual_seed(i)) for i in range(n)]
    return [SoftPrompt(r) for r in rows]


def greedy(b: Backbone, text: str, new: int) -> str:
    """The first line of the greedy answer behind the real tokens of HARD and ``text``, one token at a time."""
    ids, answer = [*b.tokenizer.encode(HARD, add_special_tokens=False), *b.tokenizer.encode(text)], []
    for _ in range(new):
        token = int(b.model(torch.tensor([ids + answer])).logits[0, -1].argmax())
        if token == EOS:
            break
        answer.append(token)
    return b.tokenizer.decode(answer, skip_special_tokens=True).strip().partition("\n")[0].strip(" ,.")


@pytest.mark.parametrize("kind", list(FORMS))
def test_a_prompt_of_real_tokens_answers_as_their_text(model, kind):
    [found] = Elicit(answer_tokens=4, **SURE).answers(model, [hard_prompt(model)], kind)
    wanted = Counter(normalised(greedy(model, FORMS[kind].format(text), 4)) for text in NEUTRAL)
    assert {normalised(text): share for text, share in found.items()} == {
        text: pytest.approx(n / len(NEUTRAL)) for text, n in wanted.items() if text
    }


def test_a_text_does_not_depend_on_the_prompts_beside_it(model):
    prompts, method = soft_prompts(model, 3), Elicit(samples=3, answer_tokens=3, min_share=0.0)
    together = method.verbalize(model, prompts, kind="labels", max_new_tokens=40)
    alone = [method.verbalize(model, [p], kind="labels", max_new_tokens=40)[0] for p in prompts]
    assert together == alone and len({found[0].text for found in together}) > 1
    assert method.verbalize(model, [], kind="labels", max_new_tokens=40) == []


def test_frequent_answers_make_the_text(model, monkeypatch):
    drawn = ["red", " Red.", "blue", "", "blue", "green", "red", "red", "x", "y", "z", "w"]
    monkeypatch.setattr(Elicit, "_draw", lambda self, b, rows, asked, batch: [drawn[i] for i in batch])
    method = Elicit(samples=1, min_share=0.15)
    assert method.answers(model, soft_prompts(model, 1), "labels")[0]["red"] == pytest.approx(4 / 12)
    [[found]] = method.verbalize(model, soft_prompts(model, 1), kind="labels", max_new_tokens=40)
    assert found.text == "red, blue" and found.confidence == pytest.approx(6 / 12)
    assert found.details == {"answers": {"red": 0.3333, "blue": 0.1667}, "kept": 2}
    [[found]] = method.verbalize(model, soft_prompts(model, 1), kind="labels", max_new_tokens=3)
    assert found.text == "red" and found.confidence == pytest.approx(4 / 12) and found.details["kept"] == 1
    [[found]] = Elicit(samples=1, min_share=0.9).verbalize(model, soft_prompts(model, 1), kind="labels", max_new_tokens=40)
    assert found.text == "" and found.confidence == 0


def test_an_instruction_names_the_answers(model, monkeypatch):
    drawn = ["yes", "no", "Yes.", "yes", "no", "no", "yes", "maybe", "", "yes", "no", "yes"]
    monkeypatch.setattr(Elicit, "_draw", lambda self, b, rows, asked, batch: [drawn[i] for i in batch])
    [[found]] = Elicit(samples=1).verbalize(model, soft_prompts(model, 1), kind="instructions", max_new_tokens=300)
    shares = {"yes": 6 / 12, "no": 4 / 12, "maybe": 1 / 12}
    assert found.text == instruction(shares) and "'yes' or 'no' or 'maybe'" in found.text
    assert found.confidence == pytest.approx(11 / 12)
    # Less room: fewer names, and still a choice.
    for names in (["yes", "no"], ["yes"], []):
        text = instruction(shares, names)
        room = len(model.tokenizer.encode(text, add_special_tokens=False))
        [[found]] = Elicit(samples=1).verbalize(model, soft_prompts(model, 1), kind="instructions", max_new_tokens=room)
        assert found.text == text and text.startswith(CHOOSE) and found.details["kept"] == len(names)
    [[found]] = Elicit(samples=1).verbalize(model, soft_prompts(model, 1), kind="instructions", max_new_tokens=2)
    assert (found.text, found.confidence) == ("", 0)


def test_examples_of_free_answers_come_from_all_inputs(model, monkeypatch):
    """And have their shares, however rare they are."""
    monkeypatch.setattr(Elicit, "_draw", lambda self, b, rows, asked, batch: [f"answer {i}" for i in batch])
    [[found]] = Elicit(samples=4).verbalize(model, soft_prompts(model, 1), kind="instructions", max_new_tokens=300)
    numbers = [int(text.removeprefix("answer ")) for text in found.details["answers"]]
    assert len(numbers) == 4 and max(numbers) >= 4  # the first four are one input's
    assert set(found.details["answers"].values()) == {round(1 / 48, 4)} and found.confidence == pytest.approx(4 / 48)


def test_another_way_to_name_answers_is_another_method(monkeypatch):
    before = settings_of(Elicit())
    monkeypatch.setattr(module, "RULE", (*module.RULE, "more"))
    assert settings_of(Elicit()) != before


def test_own_inputs_stand_as_they_are(model, tmp_path):
    file = tmp_path / "inputs.jsonl"
    file.write_text(json.dumps({"prompt_id": "*", "inputs": ["Review: good. Sentiment:"]}) + "\n")
    method = Elicit(inputs=str(file), answer_tokens=4, **SURE)
    [found] = method.answers(model, [hard_prompt(model)], "labels")
    assert list(found) == [greedy(model, "Review: good. Sentiment:", 4)]
    assert settings_of(method)["inputs_sha256"] and "inputs_sha256" not in settings_of(Elicit())
    file.write_text(json.dumps({"prompt_id": "other", "input": "x"}) + "\n")
    with pytest.raises(DataError, match="no unlabelled inputs"):
        Elicit(inputs=str(file)).answers(model, soft_prompts(model, 1), "labels")


def test_frames_are_respected(model):
    framed = hard_prompt(model, Frame("after_bos"))
    keep = module.with_slot(model, framed, [-1, -2], "x")
    assert keep[0] == model.tokenizer.bos_token_id and keep[1:3] == [-1, -2]


@pytest.mark.parametrize(
    "settings", [{"samples": 0}, {"temperature": 0.0}, {"top_k": -1}, {"min_share": 1.5}, {"answer_tokens": 0}]
)
def test_settings_that_make_no_sense(settings):
    with pytest.raises(ConfigError, match=str(next(iter(settings.values())))):
        create("elicit", **settings)


def test_encoder_decoders_are_refused(backbone):
    with pytest.raises(ConfigError, match="decoder-only"):
        Elicit().answers(backbone("t5"), [], "labels")
