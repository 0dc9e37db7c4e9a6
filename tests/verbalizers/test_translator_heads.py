"""What a translator reads besides the vectors: the prompt's own answers, drawn once, kept, and drawn again in training."""

from __future__ import annotations

import random

import pytest
from toy_translators import toy_bank, toy_prompt
from toys import BOS

from lm_eval_softverb.verbalizers import translator_heads
from lm_eval_softverb.verbalizers.elicit import Elicit
from lm_eval_softverb.verbalizers.translator_config import Between, config
from lm_eval_softverb.verbalizers.translator_data import Pair, epoch_items, fixed_items, pairs_of
from lm_eval_softverb.verbalizers.translator_heads import Head, heads


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Which prompts were asked together; each answers "answer N" most often, N being the number of its virtual tokens."""
    calls = []

    def answers(self, b, part, kind):
        calls.append([p.id for p in part])
        return [{f"answer {p.n}": 0.5, "b": 0.3, "c": 0.194, "rare": 0.006} for p in part]

    monkeypatch.setattr(Elicit, "answers", answers)
    monkeypatch.setattr(translator_heads, "TOGETHER", 2)
    monkeypatch.setenv("SOFTVERB_CACHE", str(tmp_path / "cache"))
    return calls


def ids(b, text):
    return b.tokenizer.encode(text, add_special_tokens=False)


def test_the_prompts_own_answers_stand_in_front_of_the_words(backbone, asked):
    b = backbone("llama")
    prompts = [toy_prompt(b, i, n=i + 2) for i in range(3)]
    between = Between(words="Labels:", answers=True)
    found = heads(b, [*prompts, prompts[0]], between, "labels", prefill="no")
    assert asked == [[prompts[0].id, prompts[1].id], [prompts[2].id]]  # once for each prompt
    for p in prompts:
        own = ids(b, f"Answers: answer {p.n} 50, b 30, c 19\n")
        assert found[p.id].ids(b) == [BOS, *own, *ids(b, "Labels:"), *ids(b, "no")]
    assert heads(b, prompts, between, "labels", prefill="no") == found and len(asked) == 2  # kept, also across runs
    heads(b, prompts[:1], between, "instructions")
    assert len(asked) == 3  # inputs of another form, other answers


def test_of_instructions_single_answers_are_shown_too(backbone, asked):
    b = backbone("llama")
    prompt = toy_prompt(b, 0, n=2)
    [head] = heads(b, [prompt], Between(bos=False, answers=True), "instructions").values()
    assert head.ids(b) == ids(b, "Answers: answer 2 50, b 30, c 19, rare 1\n")


def test_answers_are_cut_where_they_do_not_fit(backbone, monkeypatch):
    b = backbone("llama")
    head = Head((), {"red": 0.5, "blue": 0.3, "green": 0.2}, ())
    monkeypatch.setattr(translator_heads, "MOST_TOKENS", len(ids(b, "red 50, blue 30")))
    assert head.ids(b) == ids(b, "Answers: red 50, blue 30\n")


def test_answers_are_drawn_again_from_their_shares():
    head = Head((BOS,), {"red": 0.6, "blue": 0.38, "rare": 0.02}, (7,))
    drawn = [head.redrawn(random.Random(i)) for i in range(200)]
    assert drawn[0] == head.redrawn(random.Random(0)) and len({tuple((d.answers or {}).items()) for d in drawn}) > 100
    for d in drawn:
        shares = list(d.answers.values())
        assert (d.start, d.end) == (head.start, head.end)
        assert sum(shares) == pytest.approx(1) and shares == sorted(shares, reverse=True)
    assert sum(d.answers["red"] for d in drawn) / 200 == pytest.approx(0.6, abs=0.01)
    assert 0 < sum("rare" not in d.answers for d in drawn) < 100
    assert Head((BOS,), None, (7,)).redrawn(random.Random(0)) == Head((BOS,), None, (7,))
    assert Head((BOS,), {}, (7,)).redrawn(random.Random(0)) == Head((BOS,), {}, (7,))


def test_texts_follow_the_answers_that_stand_before_them(backbone, tmp_path):
    pairs, _ = pairs_of(toy_bank(backbone("llama"), tmp_path / "bank"), "labels")
    pair = Pair("p", pairs[0].prompt, "x, Red, y, blue", ("x", "Red", "y", "blue"))
    before = {pair.prompt.id: Head((), {"blue": 0.52, "red": 0.48}, ())}
    [fixed] = fixed_items([pair], before, "shuffled")
    assert fixed.text == "blue, Red, x, y" and fixed.head is before[pair.prompt.id]
    texts = set()
    for epoch in range(40):
        [item] = epoch_items([pair], before, config(), epoch)
        first, second = item.head.answers
        assert [t.casefold() for t in item.text.split(", ")[:2]] == [first, second]
        texts.add(item.text)
    assert len(texts) == 4  # two orders of the answers, two of the rest
    assert {epoch_items([pair], before, config(label_order="given"), e)[0].text for e in range(5)} == {pair.text}
