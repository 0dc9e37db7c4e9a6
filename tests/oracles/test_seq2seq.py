"""Encoder-decoders: the prompt stands before (or in) the encoder's input; the decoder is the stock model's."""

from __future__ import annotations

import pytest
import torch
from oracles_common import HARD, pieces
from toys import assert_same_scores, generate_until, hard_rows, loglikelihood, rolling

PLACES = [("prefix", "§"), ("user_start", "Please §."), ("user_end", "Is it § or not?")]


def hard_ids(tokenizer, placement, frame, hard, text):
    """As for causal models, with the end of sequence that T5 expects where the text ends."""
    if placement == "prefix":
        return pieces(tokenizer, placement, frame, hard, text)
    before, after = frame.split("§")

    def plain(part):
        return tokenizer.encode(part, add_special_tokens=False)

    if placement == "user_start":
        return [*plain(before), *hard, *plain(f"{after} {text}"), tokenizer.eos_token_id]
    return [*plain(f"{text} {before}"), *hard, *plain(after), tokenizer.eos_token_id]


def forward_by_hand(backbone, context, continuation):
    decoder = torch.tensor([[backbone.model.config.decoder_start_token_id, *continuation[:-1]]])
    with torch.no_grad():
        logits = backbone.model(input_ids=torch.tensor([context]), decoder_input_ids=decoder).logits[0]
    logprobs = logits.log_softmax(-1)[range(len(continuation)), continuation]
    return float(logprobs.sum()), bool((logits.argmax(-1) == torch.tensor(continuation)).all())


@pytest.mark.parametrize(("placement", "frame"), PLACES)
def test_hard_tokens_act_like_their_text(placement, frame, ours, backbone, save_prompt, texts):
    b = backbone("t5")
    hard = b.tokenizer.encode(HARD, add_special_tokens=False)
    lm = ours("t5", peft=save_prompt(hard_rows(b, hard), placement, frame), batch_size=4)
    choices = [" good", " positive and good"]
    contexts = [hard_ids(b.tokenizer, placement, frame, hard, t) for t in texts]
    expected = [
        forward_by_hand(b, context, b.tokenizer.encode(choice, add_special_tokens=False))
        for context in contexts
        for choice in choices
    ]
    assert_same_scores(loglikelihood(lm, [(t, c) for t in texts for c in choices]), expected)
    with torch.no_grad():
        out = [
            b.model.generate(torch.tensor([c]), max_new_tokens=8, do_sample=False, pad_token_id=0)[0].tolist() for c in contexts
        ]
    assert generate_until(lm, texts) == [lm.tok_decode(ids).split("</s>")[0] for ids in out]


def test_hard_prefix_equals_the_same_text_in_front(ours, stock, backbone, save_prompt, texts):
    b = backbone("t5")
    lm = ours("t5", peft=save_prompt(hard_rows(b, b.tokenizer.encode(HARD, add_special_tokens=False))), batch_size=4)
    requests = [(f" {t}", " good") for t in texts]
    assert_same_scores(loglikelihood(lm, requests), loglikelihood(stock("t5"), [(HARD + c, k) for c, k in requests]))


def test_no_prompt_generates_what_the_stock_generate_gives_for_max_gen_toks(ours, stock, texts):
    """HFLM itself gives an encoder-decoder max_gen_toks plus the length of the context (lm_eval 0.4.13), so its text is
    longer, with the same beginning."""
    hflm, lm = stock("t5"), ours("t5", batch_size=4)
    got = generate_until(lm, texts)
    for text, ours_text, theirs in zip(texts, got, generate_until(hflm, texts), strict=True):
        ids = torch.tensor([hflm.tok_encode(text)])
        with torch.no_grad():
            out = hflm.model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0].tolist()
        assert ours_text == hflm.tok_decode(out)
        assert theirs.startswith(ours_text.rstrip("\ufffd"))  # a character may be cut in two


def test_stop_strings_and_beams(ours, texts):
    lm = ours("t5", batch_size=4)
    full = generate_until(lm, texts, {"max_gen_toks": 16})
    stop = next(t[i : i + 2] for t in full for i in range(1, len(t) - 2) if "\ufffd" not in t[i : i + 2])
    assert generate_until(lm, texts, {"max_gen_toks": 16, "until": [stop]}) == [t.split(stop)[0] for t in full]
    one, many = (generate_until(ours("t5", batch_size=size), texts, {"num_beams": 3}) for size in (1, 4))
    assert one == many


def test_two_prompts_differ_and_the_window_counts_the_virtual_tokens(ours, random_prompt, texts):
    requests = [(t, " good") for t in texts]
    a, b = (loglikelihood(ours("t5", peft=random_prompt(seed)), requests) for seed in (1, 2))
    assert max(abs(x - y) for (x, _), (y, _) in zip(a, b, strict=True)) > 0.1
    lm = ours("t5", peft=random_prompt(1, n=10))
    assert lm.max_length == lm.window - 10
    loglikelihood(lm, [("A dull and slow story. " * 40, " good")])
    assert lm.counters.truncated == 1


def test_rolling_has_the_prompt_in_the_encoder(ours, backbone, save_prompt, texts):
    """The harness gives an encoder-decoder one token of context and the text to the decoder; the prompt stands before it."""
    b = backbone("t5")
    hard = b.tokenizer.encode(HARD, add_special_tokens=False)
    lm = ours("t5", peft=save_prompt(hard_rows(b, hard)), batch_size=4)
    expected = [forward_by_hand(b, [*hard, lm.prefix_token_id], lm.tok_encode(t))[0] for t in texts]
    assert rolling(lm, texts) == pytest.approx(expected, abs=1e-3)


def test_no_branches_and_no_shared_prefix_for_encoder_decoders(ours, random_prompt, texts):
    lm = ours("t5", peft=random_prompt())
    loglikelihood(lm, [(t, " good") for t in texts])
    assert not lm.branching
    assert lm.counters.prefix_tokens == 0
