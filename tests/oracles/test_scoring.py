"""Log-likelihoods against the stock harness: real tokens as a prompt, no prompt at all, and every way of batching."""

from __future__ import annotations

import pytest
import torch
from oracles_common import HARD, hard_cases, pieces
from toys import BOS, CAUSAL, KINDS, TINY, WINDOWED, assert_same_scores, hard_rows, loglikelihood, rolling

from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.errors import DataError
from lm_eval_softverb.models import softprompt


def scores_of_ids(hflm, requests):
    """Stock scoring of (context ids, continuation ids), one at a time."""
    return [hflm._loglikelihood_tokens([(("", ""), list(c), list(t))], disable_tqdm=True)[0] for c, t in requests]


# --- real tokens as a prompt -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "placement", "frame"), hard_cases(CAUSAL))
def test_hard_tokens_score_like_their_text(name, placement, frame, ours, stock, backbone, save_prompt, texts):
    b = backbone(name)
    hard = b.tokenizer.encode(HARD, add_special_tokens=False)
    lm = ours(name, peft=save_prompt(hard_rows(b, hard), placement, frame), batch_size=4)
    requests = [(t, c) for t in texts for c in (" good", " positive and good", " negative")]

    def more(part):
        return b.tokenizer.encode(part, add_special_tokens=False)

    expected = []
    for text, choice in requests:
        context = pieces(b.tokenizer, placement, frame, hard, text)
        if placement == "user_end":  # the slot stands between the text and its continuation
            continuation = more(frame.split("§")[1] + choice)[len(more(frame.split("§")[1])) :]
        else:
            continuation = pieces(b.tokenizer, placement, frame, hard, text + choice)[len(context) :]
        assert continuation
        expected.append((context, continuation))
    assert_same_scores(loglikelihood(lm, requests), scores_of_ids(stock(name), expected))


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "qwen2"])
def test_hard_prefix_equals_the_same_text_in_front(name, ours, stock, backbone, save_prompt, pairs):
    """No ids in the test: the stock model reads the words, ours their embeddings."""
    b = backbone(name)
    lm = ours(name, peft=save_prompt(hard_rows(b, b.tokenizer.encode(HARD))), batch_size=4)
    spaced = [(f" {c}" if c else c, k) for c, k in pairs if c]
    assert_same_scores(loglikelihood(lm, spaced), loglikelihood(stock(name), [(HARD + c, k) for c, k in spaced]))


def test_positive_control_another_prompt_scores_otherwise(ours, random_prompt, pairs):
    plain, a, b = (
        loglikelihood(lm, pairs)
        for lm in (ours("llama"), ours("llama", peft=random_prompt(1)), ours("llama", peft=random_prompt(2)))
    )
    for one, other in ((plain, a), (plain, b), (a, b)):
        assert max(abs(x - y) for (x, _), (y, _) in zip(one, other, strict=True)) > 0.1


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("placement", ["prefix", "after_bos"])
def test_hard_tokens_roll_like_their_ids(name, placement, ours, stock, backbone, save_prompt, texts):
    """Texts in one window: the prompt, the token that begins every text, then the text."""
    b, hflm = backbone(name), stock(name)
    hard = b.tokenizer.encode(HARD, add_special_tokens=False)
    lm = ours(name, peft=save_prompt(hard_rows(b, hard), placement), batch_size=2)
    head = [*hard, hflm.prefix_token_id] if placement == "prefix" else [BOS, *hard]
    expected = [value for value, _ in scores_of_ids(hflm, [(head, hflm.tok_encode(t)) for t in texts])]
    assert rolling(lm, texts) == pytest.approx(expected, abs=1e-3)


def test_rolling_windows_leave_room_for_the_prompt(ours, stock, random_prompt, backbone):
    """A text of several windows: each window is read after the prompt and fits the model's context with it."""
    b = backbone("gpt2")
    text = "The film is a joy from the first scene to the last. " * 20
    lm = ours("gpt2", peft=random_prompt(3, n=20), batch_size=4)
    seen = []
    forward = b.model.forward.__func__

    def spy(self, *args, **kwargs):
        cache = kwargs.get("past_key_values")
        seen.append(kwargs["inputs_embeds"].shape[1] + (cache.get_seq_length() if cache is not None else 0))
        return forward(self, *args, **kwargs)

    lm.model.forward = spy.__get__(lm.model)
    (total,) = rolling(lm, [text])
    assert max(seen) <= lm.window
    assert lm.max_length == lm.window - 20
    n_tokens = len(lm.tok_encode(text))
    assert n_tokens > 2 * lm.max_length
    assert -20 * n_tokens < total < -n_tokens / 10


# --- no prompt at all ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_no_prompt_scores_like_the_stock_model(name, ours, stock, pairs):
    assert_same_scores(loglikelihood(ours(name, batch_size=4), pairs), loglikelihood(stock(name), pairs))


@pytest.mark.parametrize("name", TINY)
def test_no_prompt_rolls_like_the_stock_model(name, ours, stock, texts):
    long = ["The film is a joy from the first scene to the last. " * 12, "Numbers: " + "0 1 2 3 " * 60, ""]
    got = rolling(ours(name, batch_size=4), texts + long)
    assert got == pytest.approx(rolling(stock(name), texts + long), abs=2e-3)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "qwen2", "t5"])
def test_no_prompt_cuts_long_contexts_like_the_stock_model(name, ours, stock):
    requests = [("A dull and slow story. " * 40, " good"), ("Numbers: " + "1 2 3 " * 90, " positive and bad")]
    lm = ours(name, batch_size=2)
    assert_same_scores(loglikelihood(lm, requests), loglikelihood(stock(name), requests))
    assert lm.counters.truncated == 2


def test_max_length_argument_counts(ours, stock, tiny):
    from lm_eval.models.huggingface import HFLM

    requests = [("A dull and slow story. " * 5, " good")]
    small = HFLM(pretrained=tiny("gpt2"), device="cpu", max_length=24)
    assert_same_scores(loglikelihood(ours("gpt2", max_length=24), requests), loglikelihood(small, requests))


# --- ways of batching ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*KINDS, "t5"])
def test_batch_sizes_agree(name, ours, random_prompt, pairs, texts):
    prompt = random_prompt(5, n=7)
    reference = ours(name, peft=prompt, batch_size=1)
    scores, rolled = loglikelihood(reference, pairs), rolling(reference, texts)
    for size in (4, 16, "auto", "auto:4"):
        lm = ours(name, peft=prompt, batch_size=size)
        assert_same_scores(loglikelihood(lm, pairs), scores)
        assert rolling(lm, texts) == pytest.approx(rolled, abs=1e-3)


@pytest.mark.parametrize("name", [*KINDS, "gemma3_vision"])
def test_branching_on_and_off_agree(name, ours, random_prompt, pairs):
    """Choices with common beginnings in one row against one row each, with and without a prompt."""
    for kwargs in ({}, {"peft": random_prompt(6)}):
        on, off = ours(name, batch_size=4, **kwargs), ours(name, batch_size=4, **kwargs)
        off.branching = False
        assert on.branching == (name not in WINDOWED)
        assert_same_scores(loglikelihood(on, pairs), loglikelihood(off, pairs))


def test_branching_runs_fewer_rows(ours, pairs):
    def rows_run(branching):
        lm, rows = ours("llama", batch_size=1), 0
        lm.branching = branching

        def count(_module, _inputs, kwargs):
            nonlocal rows
            rows += kwargs["inputs_embeds"].shape[0]

        with lm.model.register_forward_pre_hook(count, with_kwargs=True):
            loglikelihood(lm, pairs)
        return rows

    assert rows_run(True) < rows_run(False) / 2


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("n", [5, 40])
def test_prefix_sharing_on_and_off_agree(name, n, ours, random_prompt, pairs, texts, monkeypatch):
    """40 virtual tokens reach beyond the sliding windows of Gemma (16), 5 do not."""
    prompt = random_prompt(7, n=n)
    shared = ours(name, peft=prompt, batch_size=4)
    scores, rolled = loglikelihood(shared, pairs), rolling(shared, texts)
    assert (shared.counters.prefix_tokens > 0) == (n == 5 or not name.startswith("gemma"))
    monkeypatch.setattr(Backbone, "prefix", lambda self, ids, rows: None)
    plain = ours(name, peft=prompt, batch_size=4)
    assert_same_scores(loglikelihood(plain, pairs), scores)
    assert rolling(plain, texts) == pytest.approx(rolled, abs=1e-3)
    assert plain.counters.prefix_tokens == 0


def test_common_text_is_part_of_the_prefix(ours, random_prompt):
    """Few-shot examples in front of every document run once, with or without a prompt."""
    shots = "Review: the food was cold. Sentiment: negative\n\n"
    requests = [(shots + t, " good") for t in ("red", "seven", "table and chair")]
    for kwargs in ({}, {"peft": random_prompt()}):
        lm = ours("llama", batch_size=2, **kwargs)
        loglikelihood(lm, requests)
        assert lm.counters.prefix_tokens > len(lm.tok_encode(shots)) - 3


def test_padded_vocabulary_is_not_resized(ours, tiny, stock, random_prompt, pairs):
    lm = ours("llama_padded", peft=random_prompt(8))
    rows = lm.backbone.vocab_size
    assert rows == len(lm.tokenizer) + TINY["llama_padded"].extra_rows
    assert lm.model.get_output_embeddings().weight.shape[0] == rows == lm.model.config.vocab_size
    assert_same_scores(loglikelihood(ours("llama_padded"), pairs), loglikelihood(stock("llama_padded"), pairs))
    # Logits of the padding rows count in the softmax, as they do in the stock model.
    (got, _), *_ = loglikelihood(lm, [("Good.", " good")])
    lm.model.get_input_embeddings().weight.data[-TINY["llama_padded"].extra_rows :] = 0.0
    (other, _), *_ = loglikelihood(lm, [("Good.", " good")])
    assert got != other


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_stays_near_float32(dtype, ours, random_prompt, pairs):
    prompt = random_prompt(9)
    exact = loglikelihood(ours("llama", peft=prompt), pairs)
    rough = loglikelihood(ours("llama", peft=prompt, dtype=dtype, batch_size=4), pairs)
    assert max(abs(a - b) / (1 + abs(a)) for (a, _), (b, _) in zip(exact, rough, strict=True)) < 0.1


def test_mixed_precision_argument_runs(ours, random_prompt, pairs):
    prompt = random_prompt(9)
    exact = loglikelihood(ours("llama", peft=prompt), pairs)
    rough = loglikelihood(ours("llama", peft=prompt, mixed_precision_dtype="bfloat16"), pairs)
    differences = [abs(a - b) / (1 + abs(a)) for (a, _), (b, _) in zip(exact, rough, strict=True)]
    assert 0 < max(differences) < 0.1


# --- where the harness's rules need a prompt's help ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_blank_contexts_score_like_the_stock_model(name, ours, stock):
    """A context of blanks only: its blanks belong to the continuation, and a BOS the tokenizer adds is the context."""
    requests = [(" ", "good"), ("\n\n", "bad")]
    lm, hflm = ours(name), stock(name)
    if TINY[name].bos:
        assert_same_scores(loglikelihood(lm, requests), loglikelihood(hflm, requests))
        return
    with pytest.raises(AssertionError):  # the stock model's only answer to no context tokens at all
        loglikelihood(hflm, requests)
    with pytest.raises(DataError, match="0 context"):
        loglikelihood(lm, requests)


@pytest.mark.parametrize("placement", ["prefix", "after_bos"])
def test_blank_contexts_never_score_the_bos(placement, ours, stock, backbone, save_prompt):
    b = backbone("llama")
    hard = b.tokenizer.encode(HARD, add_special_tokens=False)
    lm = ours("llama", peft=save_prompt(hard_rows(b, hard), placement))
    head = [*hard, BOS] if placement == "prefix" else [BOS, *hard]
    continuation = b.tokenizer.encode(" good", add_special_tokens=False)
    assert_same_scores(loglikelihood(lm, [(" ", "good")]), scores_of_ids(stock("llama"), [(head, continuation)]))


def test_single_requests_equal_a_forward_pass_by_hand(ours, random_prompt, backbone, pairs):
    """[P; E(text)] through the model, log-softmax, gather: nothing of ours and nothing of the harness in between."""
    from lm_eval_softverb.prompt import SoftPrompt

    folder = random_prompt(10)
    b, rows = backbone("llama"), SoftPrompt.load(folder).embeddings
    lm = ours("llama", peft=folder, batch_size=4)
    expected = []
    for context, continuation in pairs:
        if not context or context.endswith(" "):
            continue
        whole, n = b.tokenizer.encode(context + continuation), len(b.tokenizer.encode(context))
        embeds = torch.cat([rows, b.embedding(torch.tensor(whole))]).unsqueeze(0)
        with torch.no_grad():
            logits = b.model(inputs_embeds=embeds).logits[0, len(rows) + n - 1 : -1]
        logprobs = logits.log_softmax(-1)[range(len(whole) - n), whole[n:]]
        expected.append((float(logprobs.sum()), bool((logits.argmax(-1) == torch.tensor(whole[n:])).all())))
    assert_same_scores(loglikelihood(lm, [p for p in pairs if p[0] and not p[0].endswith(" ")]), expected)


def test_softmax_dtype_is_float32_unless_asked(ours, pairs, monkeypatch):
    seen = set()
    original = softprompt.loglikelihoods

    def spy(*args, **kwargs):
        seen.add(kwargs["softmax_dtype"])
        return original(*args, **kwargs)

    monkeypatch.setattr(softprompt, "loglikelihoods", spy)
    loglikelihood(ours("llama", softmax_dtype="float64"), pairs[:2])
    loglikelihood(ours("llama"), pairs[:2])
    assert seen == {torch.float64, None}
