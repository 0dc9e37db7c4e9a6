"""What a translator learns from: what is supervised, EOS behind every text, splits, paraphrases, presets."""

from __future__ import annotations

import json

import pytest
import torch
from toy_translators import SETS, toy_bank, toy_prompt
from toys import BOS, EOS

from lm_eval_softverb.bank import Bank
from lm_eval_softverb.errors import ConfigError, DataError
from lm_eval_softverb.verbalizers import translator_data
from lm_eval_softverb.verbalizers.telling import ending
from lm_eval_softverb.verbalizers.translator_config import Between, config
from lm_eval_softverb.verbalizers.translator_data import (
    Item,
    Pair,
    encode,
    epoch_items,
    fixed_items,
    held_out,
    noisy,
    pairs_of,
    target_ids,
    target_losses,
)
from lm_eval_softverb.verbalizers.translator_heads import Head, heads
from lm_eval_softverb.verbalizers.translator_training import Translation


@pytest.fixture
def bank(backbone, tmp_path):
    return toy_bank(backbone("llama"), tmp_path / "bank")


def encoded(b, items, between, most):
    before = heads(b, [prompt for prompt, _ in items], between, "labels")
    return encode(b, [Item(prompt, before[prompt.id], text) for prompt, text in items], max_tokens=most)


def texts_of(pairs, settings, epoch):
    return sorted(item.text for item in epoch_items(pairs, PlainHeads(), settings, epoch))


# --- what is supervised ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["red, blue", "a dull story " * 50, "</s> red </s>", "red</s>"])
@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_the_last_supervised_label_of_every_target_is_eos(backbone, text, pad_is_eos, monkeypatch):
    """Truncated texts, too; and texts that spell EOS have no EOS inside."""
    b = backbone("llama")
    if pad_is_eos:
        monkeypatch.setattr(b.tokenizer, "_special_tokens_map", {**b.tokenizer._special_tokens_map, "pad_token": "</s>"})
        assert b.tokenizer.pad_token_id == b.tokenizer.eos_token_id == EOS
    prompts = [toy_prompt(b, 1, n=2), toy_prompt(b, 2, n=5)]
    examples, cut = encoded(b, [(prompts[0], text), (prompts[1], "no")], Between(bos=True), 12)
    seen = []
    real = torch.nn.functional.cross_entropy

    def spy(logits, targets, **kw):
        seen.append(targets.tolist())
        return real(logits, targets, **kw)

    monkeypatch.setattr(translator_data, "cross_entropy", spy)
    target_losses(b, examples)
    first, second = seen[0][: len(examples[0].target)], seen[0][len(examples[0].target) :]
    assert [t[-1] for t in (first, second)] == [EOS, EOS]
    assert EOS not in first[:-1] + second[:-1]
    assert len(first) <= 13 and cut == (len(text) > 100)
    assert b.tokenizer.decode(second[:-1]) == "no"


def test_a_text_is_cut_behind_a_sentence_and_never_in_its_ending(backbone):
    b = backbone("llama")

    def ids(text):
        return tuple(b.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    text, ending = "Read it. Is it good? Say so. " + "Then say more, " * 20, "Answer with 'x'."
    fits = len(ids("Read it. Is it good?")) + 1
    cut, too_long = target_ids(b, text, fits, whole_sentences=True)
    assert cut == (*ids("Read it. Is it good?"), EOS) and too_long
    assert target_ids(b, text, fits)[0] == (*ids(text)[:fits], EOS)
    assert target_ids(b, text, 2, whole_sentences=True)[0] == (*ids(text)[:2], EOS)  # not even one sentence fits
    assert target_ids(b, "Read it.", fits, ending, whole_sentences=True) == ((*ids("Read it."), *ids(f" {ending}"), EOS), False)
    assert target_ids(b, text, fits, ending)[0] == (*ids(text)[:fits], *ids(f" {ending}"), EOS)


def test_answers_are_named_as_they_are_shown(bank):
    """In validation all of them; in training those of the epoch's draws, which a text then names."""
    pairs, _ = pairs_of(bank, "labels")
    pair = Pair("p", pairs[0].prompt, "Say what it is.")
    head = Head((), {"red": 0.25, "blue": 0.25, "green": 0.25, "grey": 0.25}, (), "instructions")
    settings = config(kind="instructions", answers=True, name_answers=True)
    [item] = fixed_items([pair], {pair.prompt.id: head}, settings)
    assert item.text == pair.text and item.ending == "Answer with 'red' or 'blue' or 'green' or 'grey'."
    items = [epoch_items([pair], {pair.prompt.id: head}, settings, epoch)[0] for epoch in range(6)]
    assert all(item.ending == ending(item.head.shown) for item in items) and len({item.ending for item in items}) > 1
    [plain] = fixed_items([pair], {pair.prompt.id: head}, config(kind="instructions", answers=True))
    assert plain.ending == ""


@pytest.mark.parametrize("settings", [{"kind": "instructions"}, {"kind": "labels", "answers": True}])
def test_only_instructions_name_answers_that_are_drawn(settings):
    with pytest.raises(ConfigError, match="name_answers"):
        config(name_answers=True, **settings)


def test_the_model_reads_vectors_bos_text(backbone, monkeypatch):
    b = backbone("llama")
    prompt = toy_prompt(b, 3, n=2)
    [with_bos], _ = encoded(b, [(prompt, "no")], Between(bos=True), 9)
    [without], _ = encoded(b, [(prompt, "no")], Between(bos=False), 9)
    [worded], _ = encoded(b, [(prompt, "no")], Between(words="Labels:"), 9)
    words = b.tokenizer.encode("Labels:", add_special_tokens=False)
    assert worded.context == (*with_bos.context, *words) and worded.target == with_bos.target
    own = tuple(b.tokenizer.encode("no", add_special_tokens=False))
    assert with_bos.ids == (-1, -2, BOS, *own) and without.ids == (-1, -2, *own)
    assert with_bos.target == without.target == (*own, EOS)
    monkeypatch.setattr(b.tokenizer, "_special_tokens_map", {**b.tokenizer._special_tokens_map, "bos_token": None})
    with pytest.raises(ConfigError, match="bos=false"):
        encoded(b, [(prompt, "no")], Between(bos=True), 9)
    monkeypatch.setattr(b.tokenizer, "_special_tokens_map", {**b.tokenizer._special_tokens_map, "eos_token": None})
    with pytest.raises(ConfigError, match="no EOS"):
        encoded(b, [(prompt, "no")], Between(bos=False), 9)


class PlainHeads(dict):
    def __missing__(self, _prompt):
        return Head((BOS,), None, ())


def test_noise_is_another_in_each_epoch_and_as_large_as_asked_for(bank, backbone):
    b = backbone("llama")
    examples, _ = encoded(b, [(toy_prompt(b, 1, n=40), "no")] * 2, Between(), 9)
    first, second = (noisy(examples, 0.5, f"0/{epoch}") for epoch in range(2))
    rows = examples[0].rows
    added = [e.rows - rows for e in (*first, *second)]
    for noise in added:
        assert float(noise.square().mean().sqrt()) == pytest.approx(0.5 * float(rows.square().mean().sqrt()), rel=0.1)
    assert all(not torch.equal(added[i], added[j]) for i in range(4) for j in range(i))
    assert torch.equal(noisy(examples, 0.5, "0/0")[1].rows, first[1].rows)
    assert [e.ids for e in first] == [e.ids for e in examples] and torch.equal(examples[0].rows, rows)


def test_only_training_examples_are_noisy(bank, backbone):
    pairs, _ = pairs_of(bank, "labels")
    loud, plain = (Translation(backbone("llama"), pairs[:2], pairs[2:], config(noise=n), PlainHeads()) for n in (0.5, 0.0))
    for found, clean in zip(loud.epoch(0), plain.epoch(0), strict=True):
        assert found.target == clean.target and not torch.equal(found.rows, clean.rows)
    for found, clean in zip(loud.validation(), plain.validation(), strict=True):
        assert torch.equal(found.rows, clean.rows)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_a_loss_does_not_depend_on_the_rows_beside_it(backbone, name):
    b = backbone(name)
    items = [(toy_prompt(b, i, n=1 + 3 * i), text) for i, text in enumerate(["no", "a dull and slow story", "red, blue"])]
    examples, _ = encoded(b, items, Between(bos=True), 50)
    together = target_losses(b, examples)
    alone = torch.cat([target_losses(b, [e]) for e in examples])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    for example, found in zip(examples, together, strict=True):  # token by token, from embeddings
        embeds = torch.cat([example.rows[None], b.embedding(torch.tensor([[t for t in example.ids if t >= 0]]))], dim=1)
        scores = b.model(inputs_embeds=embeds).logits[0].log_softmax(-1)[-len(example.target) :]
        expected = -sum(float(scores[i, t]) for i, t in enumerate(example.target))
        assert float(found) == pytest.approx(expected, rel=1e-4)


def test_a_text_that_does_not_fit_is_refused(backbone):
    with pytest.raises(ConfigError, match="Lower max_tokens"):
        long = toy_prompt(backbone("llama"), 1, n=95)
        encoded(backbone("llama"), [(long, "a dull story")], Between(bos=True), 50)


# --- data ------------------------------------------------------------------------------------------------------------


def test_labels_come_sorted_as_given_or_in_another_order_each_epoch(bank):
    pairs, counts = pairs_of(bank, "labels")
    assert [p.text for p in pairs] == [", ".join(s) for s in SETS]
    assert counts == {"other_split": 0, "without_text": 0, "paraphrased": 0, "texts_unused": 0}
    fixed = [texts_of(pairs, config("paper"), e) for e in range(4)]
    assert fixed == [sorted(", ".join(s) for s in SETS)] * 4
    alphabetic = [texts_of(pairs, config(label_order="sorted"), e) for e in range(4)]
    assert alphabetic == [sorted(", ".join(sorted(s)) for s in SETS)] * 4
    [item] = fixed_items(
        [Pair("p", pairs[0].prompt, "Zoo, a, b", ("Zoo", "a", "b"))], PlainHeads(), config(label_order="sorted")
    )
    assert item.text == "a, b, Zoo"
    free = config()
    shuffled = [texts_of(pairs, free, e) for e in range(4)]
    assert len({tuple(x) for x in shuffled}) > 2
    assert {frozenset(t.split(", ")) for t in shuffled[0]} == {frozenset(s) for s in SETS}
    assert epoch_items(pairs, PlainHeads(), free, 1) == epoch_items(pairs, PlainHeads(), free, 1)


def test_paraphrases_by_prompt_or_task(bank, tmp_path):
    lines = [
        {"task": "t0", "paraphrases": ["Choose.", "Pick."]},
        {"prompt_id": "p1", "text": "Judge."},
        {"task": "x", "text": "y"},
    ]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    pairs, counts = pairs_of(bank, "instructions", texts=translator_data.read_texts(path))
    assert counts["paraphrased"] == 2 and counts["texts_unused"] == 1
    both = texts_of(pairs[:2], config(kind="instructions"), 0)
    assert both == ["Choose.", "Judge.", "Pick.", "Say good or dull.", "Say red or blue."]
    paper = texts_of(pairs[:3], config("paper", kind="instructions"), 0)
    assert paper == ["Choose.", "Judge.", "Pick.", "Say yes or no."]  # its own text only where there is no other
    path.write_text('{"task": "t0", "text": 3}\n')
    with pytest.raises(DataError, match=r"texts\.jsonl:1"):
        translator_data.read_texts(path)


def test_splits_and_prompts_without_text_are_counted(backbone, tmp_path):
    b = backbone("llama")
    entries = [{"labels": ["a", "b"], "split": "train"}, {"labels": ["c"], "split": "test"}, {"split": "train"}]
    items = [(toy_prompt(b, i), {"prompt_id": f"p{i}", **e}) for i, e in enumerate(entries)]
    bank = Bank.load(Bank.save(tmp_path / "b", items))
    pairs, counts = pairs_of(bank, "labels")
    assert [p.name for p in pairs] == ["p0"] and counts["other_split"] == counts["without_text"] == 1
    with pytest.raises(DataError, match="no prompt to learn instructions from in split 'train'"):
        pairs_of(bank, "instructions")


def test_prompts_of_one_text_stay_on_one_side(backbone, tmp_path):
    b = backbone("llama")
    sets = [SETS[i // 2][:: -1 if i % 2 else 1] for i in range(8)]  # each set twice, in both orders
    bank = toy_bank(b, tmp_path / "bank", sets)
    pairs, _ = pairs_of(bank, "labels")
    training, validation = held_out(pairs, 0.25, 0)
    assert len(validation) == 2 and len(training) == 6
    assert not {frozenset(p.labels) for p in training} & {frozenset(p.labels) for p in validation}
    assert held_out(pairs, 0.25, 0) == (training, validation)
    half, same = held_out(pairs, 0.25, 0, 0.5)
    assert same == validation and 0 < len(half) < 6 and all(p in training for p in half)
    assert all(p in half for p in held_out(pairs, 0.25, 0, 0.1)[0]), "smaller shares are part of larger ones"
    with pytest.raises(DataError, match="too few"):
        held_out(pairs[:2], 0.25, 0)


def test_presets_and_settings():
    paper = config("paper")
    assert (paper.rank, paper.alpha, paper.dropout, paper.epochs, paper.batch_size) == (4, 8, 0.1, 5, 16)
    assert (paper.learning_rate, paper.weight_decay, paper.max_tokens, paper.bos) == (1e-4, 0.1, 300, True)
    assert paper.rate(0, 100) == paper.rate(99, 100) == 1e-4
    fixed = config(learning_rate=1.0, warmup=0.1)
    assert [round(fixed.rate(s, 100), 3) for s in (0, 9, 10, 55)] == [0.1, 1.0, 1.0, 0.5]
    for wrong, message in (
        ({"preset": "papr"}, "Did you mean 'paper'"),
        ({"learnin_rate": 1}, "Did you mean 'learning_rate'"),
        ({"kind": "label"}, "Did you mean 'labels'"),
        ({"dropout": 1.0}, "dropout"),
        ({"rank": 0}, "rank"),
        ({"validation": 1.0}, "validation"),
        ({"schedule": "cosine"}, "schedule"),
    ):
        with pytest.raises(ConfigError, match=message):
            config(**wrong)
