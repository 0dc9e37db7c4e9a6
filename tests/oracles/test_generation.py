"""Generated text against the stock model: real tokens as a prompt, no prompt, batching, sampling, stop strings."""

from __future__ import annotations

import pytest
import torch
from oracles_common import HARD, hard_cases, pieces
from toys import CAUSAL, KINDS, SPECIAL, generate_until, hard_rows, make_instances

from lm_eval_softverb import decoding
from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.errors import ConfigError, DataError
from lm_eval_softverb.models import generating

NEW = 8


def stock_ids(hflm, ids, **settings):
    """``model.generate`` on one row of ids; the new ids only."""
    settings = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0} | settings
    with torch.no_grad():
        return hflm.model.generate(torch.tensor([ids]), **settings)[0, len(ids) :].tolist()


def whole_characters(text, size):
    """A piece of ``text`` some way in, without characters that a token border has cut in two."""
    return next(text[i : i + size] for i in range(2, len(text) - size) if "\ufffd" not in text[i : i + size])


# --- real tokens as a prompt -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "placement", "frame"), hard_cases([*KINDS, "mamba"]))
def test_hard_tokens_generate_like_their_text(name, placement, frame, ours, stock, backbone, save_prompt, texts):
    b = backbone(name)
    hard = b.tokenizer.encode(HARD, add_special_tokens=False)
    lm = ours(name, peft=save_prompt(hard_rows(b, hard), placement, frame), batch_size=4)
    expected = [
        lm.tok_decode(stock_ids(stock(name), pieces(b.tokenizer, placement, frame, hard, text))).split("</s>")[0]
        for text in texts
    ]
    assert generate_until(lm, texts) == expected
    assert len(set(expected)) > len(texts) // 2  # a model that always says the same would prove nothing


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "qwen2"])
def test_hard_prefix_generates_like_the_same_text_in_front(name, ours, stock, backbone, save_prompt, texts):
    b = backbone(name)
    lm = ours(name, peft=save_prompt(hard_rows(b, b.tokenizer.encode(HARD))), batch_size=4)
    spaced = [f" {t}" for t in texts]
    assert generate_until(lm, spaced) == generate_until(stock(name), [HARD + t for t in spaced])


def test_positive_control_another_prompt_generates_otherwise(ours, random_prompt, texts):
    answers = [
        generate_until(ours("llama", **kw), texts) for kw in ({}, {"peft": random_prompt(1)}, {"peft": random_prompt(2)})
    ]
    assert answers[0] != answers[1] != answers[2] != answers[0]


# --- no prompt -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CAUSAL)
def test_no_prompt_generates_like_the_stock_model(name, ours, stock, texts):
    assert generate_until(ours(name, batch_size=4), texts) == generate_until(stock(name), texts)


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "qwen2"])
def test_no_prompt_cuts_long_contexts_like_the_stock_model(name, ours, stock):
    long = ["A dull and slow story. " * 40, "Numbers: " + "1 2 3 " * 90, "short"]
    lm = ours(name, batch_size=2)
    assert generate_until(lm, long) == generate_until(stock(name), long)
    assert lm.counters.truncated == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
        {"num_beams": 3},
        {"min_new_tokens": 4},
        {"temperature": 0.0},
        {"do_sample": False, "temperature": 0.7},
        {"max_gen_toks": 3},
    ],
    ids=lambda s: "-".join(s),
)
@pytest.mark.parametrize("name", ["gpt2"])
def test_settings_mean_what_they_mean_in_the_stock_model(name, settings, ours, stock, texts):
    settings = {"max_gen_toks": 14} | settings
    expected = generate_until(stock(name), texts, settings)
    assert generate_until(ours(name), texts, settings) == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.7},
        {"num_beams": 3},
        {"bad_words_ids": [[i] for i in range(3, 200)]},
    ],
    ids=lambda s: "-".join(s),
)
def test_settings_do_not_depend_on_the_batch(settings, ours, random_prompt, texts):
    settings = {"max_gen_toks": 14} | settings
    for kwargs in ({}, {"peft": random_prompt(4)}):
        one, many = (generate_until(ours("llama", batch_size=size, **kwargs), texts, settings) for size in (1, 16))
        assert one == many
        assert one != generate_until(ours("llama", **kwargs), texts, {"max_gen_toks": 14})  # they do something


def test_no_repeat_ngram_sees_only_the_row_itself(ours):
    """A word that the model repeats: alone it may come twice, and so it may beside a longer row."""
    lm = ours("llama_tied", batch_size=2)
    with torch.no_grad():
        lm.model.get_input_embeddings().weight.mul_(1000)  # tied: the last token is now the likeliest next one
    context = "red"
    settings = {"no_repeat_ngram_size": 2}
    (alone,) = generate_until(lm, [context], settings)
    (last,) = lm.tok_encode(context)[-1:]
    assert alone.startswith(lm.tok_decode([last]))
    assert generate_until(lm, [context, "The film is a joy"], settings)[0] == alone


def test_beams_go_through_the_stock_generate(ours, random_prompt, texts, monkeypatch):
    calls = []
    original = generating.generate_stock

    def spy(*args, **kwargs):
        calls.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(generating, "generate_stock", spy)
    lm = ours("llama", peft=random_prompt(), batch_size=4)
    generate_until(lm, texts)
    assert calls == []
    generate_until(lm, texts, {"num_beams": 3})
    assert calls
    assert all(c["num_beams"] == 3 for c in calls)


def test_beams_with_hard_tokens_equal_beams_on_their_text(ours, stock, backbone, save_prompt, texts):
    b = backbone("qwen2")
    lm = ours("qwen2", peft=save_prompt(hard_rows(b, b.tokenizer.encode(HARD))), batch_size=4)
    spaced = [f" {t}" for t in texts]
    settings = {"num_beams": 3}
    assert generate_until(lm, spaced, settings) == generate_until(stock("qwen2"), [HARD + t for t in spaced], settings)


# --- ways of batching ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*KINDS, "mamba", "t5"])
def test_batch_sizes_agree(name, ours, random_prompt, texts):
    prompt = random_prompt(5, n=7)
    reference = generate_until(ours(name, peft=prompt, batch_size=1), texts, {"max_gen_toks": 24})
    for size in (4, 16, "auto"):
        assert generate_until(ours(name, peft=prompt, batch_size=size), texts, {"max_gen_toks": 24}) == reference


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("n", [5, 40])
def test_prefix_sharing_on_and_off_agree(name, n, ours, random_prompt, texts, monkeypatch):
    prompt = random_prompt(7, n=n)
    shared = ours(name, peft=prompt, batch_size=4)
    expected = generate_until(shared, texts)
    assert (shared.counters.prefix_tokens > 0) == (n == 5 or not name.startswith("gemma"))
    monkeypatch.setattr(Backbone, "prefix", lambda self, ids, rows: None)
    assert generate_until(ours(name, peft=prompt, batch_size=4), texts) == expected


def test_finished_rows_leave_the_batch(ours, texts):
    """Rows that meet their stop string stop costing anything; the others are not disturbed."""
    lm = ours("llama", batch_size=16)
    full = generate_until(lm, texts, {"max_gen_toks": 20})
    stop = whole_characters(full[0], 2)
    widths = []

    def count(_module, _inputs, kwargs):
        widths.append(kwargs["inputs_embeds"].shape[0])

    with lm.model.register_forward_pre_hook(count, with_kwargs=True):
        stopped = generate_until(lm, texts, {"max_gen_toks": 20, "until": [stop]})
    assert stopped == [t.split(stop)[0] for t in full]
    assert widths[0] in (1, len(texts))
    assert widths[-1] < len(texts)


def test_different_settings_in_one_call_keep_their_order(ours, random_prompt, texts):
    lm = ours("llama", peft=random_prompt(), batch_size=4)
    settings = [{"until": [], "max_gen_toks": 3 + i % 3} for i in range(len(texts))]
    requests = make_instances("generate_until", list(zip(texts, settings, strict=True)))
    expected = [generate_until(lm, [t], s)[0] for t, s in zip(texts, settings, strict=True)]
    assert lm.generate_until(requests, disable_tqdm=True) == expected


# --- stop strings and room -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_stop_strings_end_the_text_like_in_the_stock_model(name, ours, stock, texts):
    full = generate_until(stock(name), texts, {"max_gen_toks": 24})
    stops = {whole_characters(t, 2) for t in full} | {" "}
    stops = {s for s in stops if s not in "".join(SPECIAL)}  # special tokens end a row too, but are not in its text
    for stop in sorted(stops):
        settings = {"until": [stop], "max_gen_toks": 24}
        got = generate_until(ours(name, batch_size=4), texts, settings)
        assert got == generate_until(stock(name), texts, settings) == [t.split(stop)[0] for t in full]


def test_stop_strings_across_token_borders_are_seen(ours):
    """Whatever the tokens are, a stop string in the decoded text ends the row at once."""
    lm = ours("llama")
    text = generate_until(lm, ["Good."], {"max_gen_toks": 30})[0]
    for start in range(0, min(len(text) - 3, 12)):
        stop = text[start : start + 3]
        if "�" in stop:
            continue
        steps = 0

        def count(_module, _inputs):
            nonlocal steps
            steps += 1

        with lm.model.register_forward_pre_hook(count):
            assert generate_until(lm, ["Good."], {"max_gen_toks": 30, "until": [stop]})[0] == text.split(stop)[0]
        assert steps < 30


def test_end_of_sequence_ends_a_row_and_is_not_in_the_text(ours, stock):
    """The end-of-sequence token made likely: rows stop at different steps."""
    lm, hflm = ours("gpt2", batch_size=4), stock("gpt2")
    texts = [f"Numbers: {i} {i + 1}" for i in range(8)]
    with torch.no_grad():
        for m in (lm.model, hflm.model):
            m.get_input_embeddings().weight[2] *= 6
    got, expected = (generate_until(m, texts, {"max_gen_toks": 20}) for m in (lm, hflm))
    with torch.no_grad():
        hflm.model.get_input_embeddings().weight[2] /= 6
    assert got == expected
    assert all("</s>" not in t for t in got)
    assert len({len(t) for t in got}) > 2


def test_end_of_sequence_is_not_among_the_ids(backbone):
    b = backbone("qwen2")
    rows = torch.zeros(0, b.hidden_size)
    contexts = [tuple(b.tokenizer.encode(f"Numbers: {i}")) for i in range(4)]
    free = decoding.generate(b, rows, contexts, max_new_tokens=6, finished=lambda _ids: False)
    b.model.generation_config.eos_token_id = [2, free[0][2]]
    try:
        ended = decoding.generate(b, rows, contexts, max_new_tokens=6, finished=lambda _ids: False)
    finally:
        b.model.generation_config.eos_token_id = 2
    assert ended[0] == free[0][: free[0].index(free[0][2])]
    assert all(e == f[: f.index(free[0][2])] if free[0][2] in f else e == f for e, f in zip(ended, free, strict=True))


def test_empty_context_begins_with_the_prompt_or_bos(ours, stock, random_prompt):
    assert generate_until(ours("llama"), [""]) == generate_until(stock("llama"), [""])
    lm = ours("llama", peft=random_prompt())
    assert len(generate_until(lm, [""])[0]) > 0


def test_max_gen_toks_that_leave_no_room_are_refused(ours, random_prompt):
    lm = ours("llama", peft=random_prompt(n=20))
    with pytest.raises(DataError, match="max_gen_toks"):
        generate_until(lm, ["Good."], {"max_gen_toks": lm.window - 19})
    with pytest.raises(ConfigError, match="max_gen_toks"):
        generate_until(lm, ["Good."], {"max_length": 10})


# --- sampling --------------------------------------------------------------------------------------------------------

SAMPLED = {"do_sample": True, "temperature": 0.9, "max_gen_toks": 16}


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_sampling_is_reproducible_and_independent_of_the_batch(name, ours, random_prompt, texts):
    prompt = random_prompt()
    torch.manual_seed(1234)
    one = generate_until(ours(name, peft=prompt, batch_size=1), texts, SAMPLED)
    for size in (1, 4, 16):
        torch.manual_seed(1234)
        torch.rand(size)  # what else was drawn from the global stream does not matter
        assert generate_until(ours(name, peft=prompt, batch_size=size), texts, SAMPLED) == one
    torch.manual_seed(99)
    assert generate_until(ours(name, peft=prompt, batch_size=4), texts, SAMPLED) != one
    assert generate_until(ours(name, peft=prompt), texts, {"max_gen_toks": 16}) != one


def test_repeats_of_a_sampled_request_differ(ours):
    lm = ours("llama", batch_size=4)
    (request,) = make_instances("generate_until", [("Good.", {"until": [], **SAMPLED})])
    answers = lm.generate_until([request] * 4, disable_tqdm=True)
    assert len(set(answers)) > 2
    assert lm.generate_until([request] * 4, disable_tqdm=True) == answers


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.6},
        {"do_sample": True, "temperature": 1.3, "top_k": 5},
        {"do_sample": True, "top_k": 0},
        {"do_sample": True, "top_p": 0.7},
        {"do_sample": True, "min_p": 0.1},
        {"do_sample": True, "typical_p": 0.6},
        {"do_sample": True, "repetition_penalty": 1.4, "top_k": 9, "top_p": 0.9},
    ],
    ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()),
)
def test_sampled_distribution_is_that_of_the_stock_generate(settings, ours, stock, monkeypatch):
    """Same probabilities at the first step, to the last filter, as ``model.generate`` draws from."""
    seen = []
    original = torch.multinomial

    def spy(probabilities, *args, **kwargs):
        seen.append(probabilities.detach().reshape(-1, probabilities.shape[-1])[0].cpu())
        return original(probabilities, *args, **kwargs)

    monkeypatch.setattr(torch, "multinomial", spy)
    settings = {"max_gen_toks": 1, "temperature": 1.0} | settings
    generate_until(stock("llama"), ["Question: which of these is a colour? red"], settings)
    generate_until(ours("llama"), ["Question: which of these is a colour? red"], settings)
    theirs, our = (p.sort(descending=True).values for p in seen)  # ours are only the top_k likeliest, where that is set
    assert torch.allclose(theirs[: len(our)], our, atol=1e-4) and not theirs[len(our) :].any()


def test_sampling_defaults_come_from_the_model(ours, tiny):
    """A model's own generation settings count for sampling, and do not turn sampling on."""
    lm = ours("llama")
    lm.model.generation_config.top_k = 7
    lm.model.generation_config.do_sample = True
    assert decoding.Sampling.of(lm.model.generation_config, {"do_sample": True, "temperature": 0.5}).top_k == 7
    assert not decoding.Sampling.of(lm.model.generation_config, {}).do_sample
