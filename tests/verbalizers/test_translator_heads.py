"""What a translator reads besides the vectors: the prompt's own answers, drawn once, kept, and drawn again in training."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from toy_translators import toy_bank, toy_prompt
from toys import BOS

from lm_eval_softverb.verbalizers import translator_heads
from lm_eval_softverb.verbalizers.elicit import Elicit
from lm_eval_softverb.verbalizers.translator_config import Between, config
from lm_eval_softverb.verbalizers.translator_data import Pair, epoch_items, fixed_items, pairs_of
from lm_eval_softverb.verbalizers.translator_heads import Head, heads, reads


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
    monkeypatch.setattr(translator_heads, "MOST_CHARACTERS", len("red 50, blue 30, "))
    assert Head((), {"red": 0.5, "blue": 0.3, "green": 0.2}, ()).ids(b) == ids(b, "Answers: red 50, blue 30\n")
    assert Head((), {}, ()).ids(b) == ids(b, "Answers: \n") and Head((7,), None, ()).ids(b) == [7]


def test_a_part_of_the_draws_is_drawn_again():
    """What came once in all draws is shown in no epoch, as it is not when reading; empty answers stay in the shares."""
    count = 144
    head = Head((BOS,), {"red": 80 / count, "blue": 40 / count, "pale": 2 / count, "odd": 1 / count}, (7,))
    assert list(head.shown) == ["red", "blue", "pale"]
    drawn = [head.redrawn(random.Random(i)) for i in range(300)]
    assert drawn[0] == head.redrawn(random.Random(0)) and len({tuple(d.answers.items()) for d in drawn}) > 50
    for d in drawn:
        shares = list(d.answers.values())
        assert (d.start, d.end, d.kind) == (head.start, head.end, head.kind)
        assert sum(shares) < 1 and shares == sorted(shares, reverse=True) and "odd" not in d.shown and "" not in d.answers
    assert sum(d.answers["red"] for d in drawn) / 300 == pytest.approx(80 / count, abs=0.01)
    assert 100 < sum("pale" in d.shown for d in drawn) < 200  # both draws kept: .75 * .75
    assert Head((BOS,), None, (7,)).redrawn(random.Random(0)) == Head((BOS,), None, (7,))
    assert Head((BOS,), {}, (7,)).redrawn(random.Random(0)).answers == {}


def test_answers_of_one_share_are_shown_in_no_order_of_their_inputs(backbone, monkeypatch, tmp_path):
    b = backbone("llama")
    monkeypatch.setenv("SOFTVERB_CACHE", str(tmp_path))
    monkeypatch.setattr(Elicit, "answers", lambda *a: [{"top": 0.2} | {f"a{i}": 0.02 for i in range(20)}])
    [head] = heads(b, [toy_prompt(b, 0, n=2)], Between(answers=True), "instructions").values()
    first, *others = head.answers
    assert first == "top" and others != [f"a{i}" for i in range(20)]
    [again] = heads(b, [toy_prompt(b, 0, n=2)], Between(answers=True), "instructions").values()
    assert list(again.answers.items()) == list(head.answers.items())


@pytest.mark.parametrize("kept", ["[1]", '{"a": "x"}', '{"a": -1}', '{"a": 7}', '{"a": true}', '{"a": 0.', ""])
def test_a_broken_cache_is_noticed_and_drawn_again(backbone, asked, tmp_path, kept):
    b, between = backbone("llama"), Between(answers=True)
    prompt = toy_prompt(b, 0, n=2)
    good = heads(b, [prompt], between, "labels")
    [file] = (tmp_path / "cache" / "answers").iterdir()
    file.write_text(kept)
    with pytest.warns(UserWarning, match="drawn again"):
        assert heads(b, [prompt], between, "labels") == good
    assert heads(b, [prompt], between, "labels") == good and len(asked) == 2


def test_a_prompt_in_another_frame_is_asked_anew(backbone, asked):
    b, between = backbone("llama"), Between(answers=True)
    prompt = toy_prompt(b, 0, n=2)
    heads(b, [prompt], between, "labels")
    chatty = replace(prompt, info={"config": {"chat": True}})
    assert chatty.id == prompt.id
    heads(b, [chatty], between, "labels")
    assert len(asked) == 2


def test_processes_share_the_questions(backbone, asked, monkeypatch):
    b, between = backbone("llama"), Between(answers=True)
    prompts = [toy_prompt(b, i, n=i + 2) for i in range(3)]

    class Second:
        rank, count, waits = 1, 2, 0

        def wait(self):
            self.waits += 1
            if self.waits == 2:  # meanwhile the first process has asked about its prompts
                heads(b, prompts, between, "labels")

    found = heads(b, prompts, between, "labels", processes=Second())
    assert asked == [[prompts[1].id], [prompts[0].id, prompts[2].id]]
    assert found == heads(b, prompts, between, "labels")


def test_texts_follow_the_answers_that_stand_before_them(backbone, tmp_path):
    pairs, _ = pairs_of(toy_bank(backbone("llama"), tmp_path / "bank"), "labels")
    pair = Pair("p", pairs[0].prompt, "x, Red, y, blue", ("x", "Red", "y", "blue"))
    before = {pair.prompt.id: Head((), {"blue": 0.52, "red!": 0.48}, ())}
    [fixed] = fixed_items([pair], before, config())
    assert fixed.text == "blue, Red, x, y" and fixed.head is before[pair.prompt.id]
    texts = set()
    for epoch in range(40):
        [item] = epoch_items([pair], before, config(), epoch)
        first, second = item.head.answers
        assert [t.casefold() for t in item.text.split(", ")[:2]] == [first.strip("!"), second.strip("!")]
        texts.add(item.text)
    assert len(texts) == 4  # two orders of the answers, two of the rest
    assert {epoch_items([pair], before, config(label_order="given"), e)[0].text for e in range(5)} == {pair.text}


def test_the_rule_of_naming_answers_is_part_of_what_decides_a_run(monkeypatch):
    plain, naming = reads("instructions"), reads("instructions", True)
    monkeypatch.setattr(translator_heads, "RULE", (*translator_heads.RULE, "more"))
    assert reads("instructions") == plain != naming != reads("instructions", True)
