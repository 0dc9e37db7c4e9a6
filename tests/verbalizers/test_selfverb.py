"""Self-verbalization: against a plain loop over real tokens, alone and in batches, and what frames and questions may hold."""

from __future__ import annotations

import math

import pytest
import torch
from toys import SPECIAL, hard_rows

from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.errors import ConfigError, FrameError
from lm_eval_softverb.frame import SLOT, Frame
from lm_eval_softverb.prompt import SoftPrompt
from lm_eval_softverb.verbalizers import selfverb
from lm_eval_softverb.verbalizers.answers import normalised
from lm_eval_softverb.verbalizers.base import create, settings_of
from lm_eval_softverb.verbalizers.selfverb import QUESTIONS, SelfVerb, end_of_turn_ids

NEW = 8
HARD = "kind people and"  # what a prompt of real tokens stands for
IM_END = SPECIAL.index("<|im_end|>")
ASK = "Is {commands} good or bad?"
FORGED = "\ue5f7"  # the character a slot travels behind


@pytest.fixture(scope="module")
def model(tiny):
    """``model(name)`` → a tiny model with room for long questions, shared."""
    kept = {}

    def build(name: str) -> Backbone:
        if name not in kept:
            kept[name] = Backbone.load(tiny(name, window=1024), dtype="float32", device="cpu")
        return kept[name]

    return build


def random_prompt(seed: int = 0, n: int = 4, placement: str = "user_end", text: str = "Please §.") -> SoftPrompt:
    rows = torch.randn(n, 32, generator=torch.Generator().manual_seed(seed)) * 0.5
    return SoftPrompt(rows, frame=Frame(placement, text))


def hard_ids(b: Backbone) -> list[int]:
    return b.tokenizer.encode(HARD, add_special_tokens=False)


def hard_prompt(b: Backbone, **frame) -> SoftPrompt:
    return SoftPrompt(hard_rows(b, hard_ids(b)), frame=Frame(**({"placement": "user_end", "text": "Please §."} | frame)))


def verbalize(b, prompts, kind="labels", new=NEW, **settings):
    return SelfVerb(**settings).verbalize(b, prompts, kind=kind, max_new_tokens=new)


def plain_answer(b: Backbone, question: str, inside: list[int], prefill: str = "", new: int = NEW) -> tuple[str, float]:
    """Greedy answer and confidence, one token at a time by id; ``inside`` stands where ``question`` has its slots."""
    t = b.tokenizer
    if t.chat_template:
        turn = [{"role": "user", "content": question}]
        text = t.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) + prefill
    else:
        text = f"Question: {question}\nAnswer:" + (f" {prefill}" if prefill else "")
    ids = []
    for i, part in enumerate(text.split(SLOT)):
        ids += (inside if i else []) + t.encode(part, add_special_tokens=i == 0)
    answer, scores = [], []
    for _ in range(new):
        logits = b.model(torch.tensor([ids + answer])).logits[0, -1].double()
        token = int(logits.argmax())
        if token in (t.eos_token_id, IM_END):
            break
        answer.append(token)
        scores.append(float(logits.log_softmax(-1)[token]))
    return t.decode(answer, skip_special_tokens=True).strip(), math.exp(sum(scores) / len(scores))


# --- against the plain loop ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(QUESTIONS))
@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "qwen2", "gemma2", "gemma3"])
def test_a_prompt_of_real_tokens_answers_as_their_text(model, name, kind):
    b = model(name)
    [[found]] = verbalize(b, [hard_prompt(b)], kind)
    text, confidence = plain_answer(b, QUESTIONS[kind].replace("{commands}", '"Please §."'), hard_ids(b))
    assert text and found.text == text
    assert found.confidence == pytest.approx(confidence, rel=1e-3)
    assert found.details == {"frames": ["Please §."], "chat": name != "gpt2", "cut": True}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_all_frames_stand_in_one_question(model, name):
    b = model(name)
    [[found]] = verbalize(b, [hard_prompt(b)], frames="Please §.|Be §, now| § ", question=ASK)
    question = 'Is "Please §." or "Be §, now" or "§" good or bad?'
    assert found.text == plain_answer(b, question, hard_ids(b))[0]
    assert found.text != plain_answer(b, question, [])[0]
    assert found.details["frames"] == ["Please §.", "Be §, now", "§"]


def test_one_question_per_frame_best_first(model):
    b, frames = model("llama"), ["Please §.", "Be §.", "Act §.", "§"]
    [found] = verbalize(b, [hard_prompt(b)], frames="|".join(frames), per_frame=True)
    alone = {f: verbalize(b, [hard_prompt(b)], frames=f)[0][0] for f in frames}
    assert sorted(v.details["frames"] for v in found) == sorted([f] for f in frames)
    for v in found:
        [frame] = v.details["frames"]
        assert v.text == alone[frame].text
        assert v.confidence == pytest.approx(alone[frame].confidence, rel=1e-4)
    confidences = [v.confidence for v in found]
    assert confidences == sorted(confidences, reverse=True) and len(set(confidences)) > 1


@pytest.mark.parametrize(
    ("frame", "quoted"),
    [
        ({"placement": "user_end", "text": "Is it § or not?"}, "Is it § or not?"),
        ({"placement": "user_start", "text": "§"}, "§"),
        ({"placement": "prefix", "text": "§"}, "§"),
        ({"placement": "after_bos", "text": "§"}, "§"),
    ],
)
def test_without_frames_the_prompts_own_is_asked_about(model, frame, quoted):
    b = model("llama")
    [[found]] = verbalize(b, [hard_prompt(b, **frame)], question=ASK)
    assert found.text == plain_answer(b, ASK.replace("{commands}", f'"{quoted}"'), hard_ids(b))[0]
    assert found.details["frames"] == [quoted]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_words_only_is_the_question_without_virtual_tokens(model, name):
    b = model(name)
    found = verbalize(b, [hard_prompt(b), random_prompt(3, n=2)], words_only=True, question=ASK)
    text, confidence = plain_answer(b, ASK.replace("{commands}", '"Please §."'), [])
    assert [v.text for [v] in found] == [text, text]
    assert found[0][0].confidence == pytest.approx(confidence, rel=1e-3)
    assert verbalize(b, [hard_prompt(b)], question=ASK)[0][0].text != text


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_prefill_begins_the_answer_and_is_not_part_of_it(model, name):
    b = model(name)
    [[found]] = verbalize(b, [hard_prompt(b)], question=ASK, prefill="It is § good:")
    assert found.text == plain_answer_with_literal_slot(b, "It is § good:")
    assert found.text != verbalize(b, [hard_prompt(b)], question=ASK)[0][0].text


def plain_answer_with_literal_slot(b, prefill):
    """A prefill is text: its § is no slot, so the plain loop gets the ids of the last part as they are."""
    t, question = b.tokenizer, ASK.replace("{commands}", '"Please §."')
    before, after = question.split(SLOT)
    if t.chat_template:
        head, tail = "<|im_start|>user\n" + before, f"{after}<|im_end|>\n<|im_start|>assistant\n{prefill}"
    else:
        head, tail = "Question: " + before, f"{after}\nAnswer: {prefill}"
    ids = [*t.encode(head), *hard_ids(b), *t.encode(tail, add_special_tokens=False)]
    answer: list[int] = []
    for _ in range(NEW):
        token = int(b.model(torch.tensor([ids + answer])).logits[0, -1].argmax())
        if token in (t.eos_token_id, IM_END):
            break
        answer.append(token)
    return t.decode(answer, skip_special_tokens=True).strip()


# --- batches ---------------------------------------------------------------------------------------------------------

MIXED = [
    random_prompt(1, n=2),
    random_prompt(2, n=7, placement="prefix", text=SLOT),
    random_prompt(3, n=1, text="Is it § or not?"),
    random_prompt(4, n=4, placement="user_start"),
]


@pytest.mark.parametrize("settings", [{}, {"samples": 6, "seed": 5}, {"per_frame": True, "frames": "Be §.|§"}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_neither_batch_nor_order_changes_an_answer(model, name, settings):
    b = model(name)
    together = verbalize(b, MIXED, **settings)
    alone = [verbalize(b, [p], **settings)[0] for p in MIXED]
    backwards = verbalize(b, MIXED[::-1], **settings)[::-1]
    for other in (alone, backwards):
        assert [[v.text for v in found] for found in together] == [[v.text for v in found] for found in other]
        for found, same in zip(together, other, strict=True):
            assert [v.confidence for v in found] == pytest.approx([v.confidence for v in same], rel=1e-4)
            assert [v.details for v in found] == [v.details for v in same]
    assert len({found[0].text for found in together}) > 2  # the prompts matter
    assert verbalize(b, [], **settings) == []


def test_prompts_go_through_the_model_together(model, monkeypatch):
    rows = []
    plain = selfverb.generate
    monkeypatch.setattr(selfverb, "generate", lambda b, r, c, **kw: rows.append(len(c)) or plain(b, r, c, **kw))
    verbalize(model("llama"), MIXED, question=ASK)
    assert rows == [len(MIXED)]


# --- samples ---------------------------------------------------------------------------------------------------------


def test_samples_come_as_their_distribution(model):
    b = model("llama")
    [found] = verbalize(b, [random_prompt()], samples=40, new=1, question=ASK)
    assert sum(v.confidence for v in found) == pytest.approx(1.0)
    assert sum(v.details["count"] for v in found) == 40
    assert all(v.details["share"] == v.confidence == v.details["count"] / 40 for v in found)
    counts = [v.details["count"] for v in found]
    assert counts == sorted(counts, reverse=True) and counts[0] > 1 and len(counts) > 1
    assert len({normalised(v.text) for v in found}) == len(found)


def test_samples_depend_on_the_seed_only(model):
    b = model("llama")
    first, again, other = (verbalize(b, [random_prompt()], samples=6, seed=s) for s in (1, 1, 2))
    assert first == again
    assert [v.text for v in first[0]] != [v.text for v in other[0]]
    more = verbalize(b, [random_prompt()], samples=12, seed=1)
    assert {v.text for v in first[0]} <= {v.text for v in more[0]}  # sample 3 of 6 is sample 3 of 12


def test_each_prompt_has_its_own_random_stream(model):
    """The control without vectors asks the same question for both, so only the streams can tell them apart."""
    found = verbalize(model("llama"), [random_prompt(1), random_prompt(2)], samples=6, words_only=True)
    assert [v.text for v in found[0]] != [v.text for v in found[1]]


def test_a_cold_sample_is_the_greedy_answer(model):
    b = model("llama")
    [[cold]] = verbalize(b, [hard_prompt(b)], samples=5, temperature=1e-3)
    assert cold.text == verbalize(b, [hard_prompt(b)])[0][0].text
    assert cold.details == {"frames": ["Please §."], "chat": True, "cut": True, "count": 5, "share": 1.0}


def test_every_token_can_be_drawn(model):
    """transformers would keep the 50 likeliest."""
    [found] = verbalize(model("llama"), [random_prompt()], samples=200, temperature=1e4, new=1, question=ASK)
    assert len(found) > 60


def test_samples_of_all_frames_are_one_distribution(model):
    [found] = verbalize(model("llama"), [random_prompt()], samples=4, frames="Be §.|§", per_frame=True, new=1)
    assert sum(v.details["count"] for v in found) == 8
    assert {frame for v in found for frame in v.details["frames"]} == {"Be §.", "§"}


def test_spellings_of_one_answer_are_pooled(model, monkeypatch):
    texts = iter(["red", "Blue.", "blue", ' "BLUE"', "Red!"])
    monkeypatch.setattr(selfverb, "_text", lambda _b, _ids: next(texts))
    [found] = verbalize(model("llama"), [random_prompt()], samples=5, question=ASK)
    assert [(v.text, v.details["count"]) for v in found] == [("Blue.", 3), ("red", 2)]


# --- where an answer ends --------------------------------------------------------------------------------------------


def test_the_end_of_turn_is_read_off_the_chat_template(model):
    assert end_of_turn_ids(model("llama")) == {IM_END} != {model("llama").tokenizer.eos_token_id}
    assert end_of_turn_ids(model("gpt2")) == frozenset()


def test_only_a_special_token_can_end_a_turn(tiny):
    b = Backbone.load(tiny("llama", window=1024), dtype="float32", device="cpu")
    b.tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}assistant:"
    assert end_of_turn_ids(b) == frozenset()
    b.tokenizer.chat_template = (
        "{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}{{ messages[0].content }}"
    )
    assert end_of_turn_ids(b) == frozenset()
    assert len(verbalize(b, [random_prompt()], question=ASK)) == 1  # one question needs no more than one turn


def test_the_end_of_turn_ends_an_answer(model, monkeypatch):
    b = model("llama")
    [[whole]] = verbalize(b, [hard_prompt(b)], new=NEW)
    ids = greedy_ids(b, monkeypatch)
    end = next(i for i in range(1, NEW) if ids[i] not in ids[:i])
    monkeypatch.setattr(selfverb, "end_of_turn_ids", lambda _b: frozenset([ids[end]]))
    [[found]] = verbalize(b, [hard_prompt(b)])
    assert found.text == b.tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
    assert whole.text.startswith(found.text) and found.details["cut"] is False and whole.details["cut"] is True

    monkeypatch.setattr(selfverb, "end_of_turn_ids", lambda _b: frozenset([ids[0]]))
    [[found]] = verbalize(b, [hard_prompt(b)])
    assert (found.text, found.confidence, found.details["cut"]) == ("", 0.0, False)


def greedy_ids(b, monkeypatch):
    seen = []
    plain = selfverb.generate
    with monkeypatch.context() as patch:
        patch.setattr(selfverb, "generate", lambda *a, **kw: seen.extend(plain(*a, **kw)) or seen)
        verbalize(b, [hard_prompt(b)])
    return seen[0]


def test_without_a_chat_template_an_answer_is_one_line(model):
    b = model("gpt2")
    finished = selfverb._stopper(b, frozenset())
    for text, over in [("", False), ("\n \n", False), ("\n red", False), ("\n red\n", True), ("red\nblue", True)]:
        assert finished(b.tokenizer.encode(text)) is over
    assert selfverb._text(b, b.tokenizer.encode("\n red \nblue")) == "red"


# --- forged slots ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", ["Please", "Please § and §.", "Be §.|", "Be §.||§", "|", "Be §|act"])
def test_every_frame_has_exactly_one_slot(frames):
    with pytest.raises(FrameError, match="exactly one slot"):
        SelfVerb(frames=frames)


@pytest.mark.parametrize("question", ["What is it?", "Is § as {commands}?", "{commands} or {commands}?"])
def test_a_question_has_one_place_for_commands_and_no_slot(question):
    with pytest.raises(ConfigError, match=r"\{commands\} exactly once"):
        SelfVerb(question=question)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("text", [FORGED, FORGED + "0", "{commands}", "{{ x }}", "<s>"])
def test_marks_in_frames_and_questions_are_only_text(model, name, text):
    """Private-use marks, placeholders and template code reach the model byte for byte."""
    b = model(name)
    [[found]] = verbalize(b, [hard_prompt(b)], frames=f"Be {text}§{text}.", question=ASK + text.replace("{commands}", ""))
    question = ASK.replace("{commands}", f'"Be {text}§{text}."') + text.replace("{commands}", "")
    assert found.text == plain_answer(b, question, hard_ids(b))[0]


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"samples": -1}, {"temperature": 0.0}, {"temperature": math.inf}, {"temperature": math.nan}]
)
def test_settings_out_of_range(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        SelfVerb(**settings)


def test_settings_are_json_values_and_can_be_typed():
    assert create("selfverb", per_frame="true", samples="3", temperature="0.5") == SelfVerb(
        per_frame=True, samples=3, temperature=0.5
    )
    assert settings_of(SelfVerb())["method"] == "selfverb"
    assert all(isinstance(v, (str, int, float, bool)) for v in settings_of(SelfVerb()).values())


@pytest.mark.parametrize("name", ["t5", "mamba"])
def test_other_architectures_are_refused(model, name):
    with pytest.raises(ConfigError, match="decoder-only"):
        verbalize(model(name), [random_prompt()])


def test_a_question_that_does_not_fit_is_refused(backbone):
    with pytest.raises(ConfigError, match=r"do not fit the 96 tokens.*fewer frames"):
        verbalize(backbone("gpt2"), [random_prompt()], new=60)
