"""F27 texts that do not fit, F29 templates in data, F31 requests at the edge of having a context."""

from __future__ import annotations

import jinja2
import pytest
import torch
from toys import BOS, CHOICE_TASK, GENERATE_TASK, evaluate_arguments, generate_until, hard_rows, loglikelihood, rolling

from lm_eval_softverb.errors import DataError
from lm_eval_softverb.prompt import SoftPrompt

HUGE = "The food was cold and the waiter was rude. " * 2500  # more than 10^5 characters
PLACES = [("prefix", "§"), ("after_bos", "§"), ("user_start", "Please §."), ("user_end", "Is it § or not?")]


def spy_on_inputs(lm):
    """Embeddings that enter the model, and how many tokens it holds at once, call by call."""
    seen = []

    def look(_module, _arguments, kwargs):
        cache = kwargs.get("past_key_values")
        seen.append((kwargs["inputs_embeds"].detach().clone(), cache.get_seq_length() if cache is not None else 0))

    lm.model.register_forward_pre_hook(look, with_kwargs=True)
    return seen


def rows_in(lm, seen):
    """Which rows of the prompt entered the model."""
    entered = torch.cat([e.flatten(0, 1) for e, _ in seen])
    return [bool((entered == row).all(-1).any()) for row in lm.rows]


# --- F27 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("placement", "words"), PLACES)
@pytest.mark.parametrize("kind", ["loglikelihood", "generate_until"])
def test_f27_huge_documents_are_cut_on_the_left_and_counted(kind, placement, words, ours, random_prompt):
    lm = ours("llama", peft=random_prompt(0, n=6, placement=placement, text=words))
    seen = spy_on_inputs(lm)
    text = HUGE + "red"
    if kind == "loglikelihood":
        loglikelihood(lm, [(text, " good"), ("short", " good")])
    else:
        generate_until(lm, [text, "short"])
    assert rows_in(lm, seen) == [True] * 6
    assert max(e.shape[1] + held for e, held in seen) <= lm.window
    assert lm.get_model_info()["softprompt"]["n_truncated"] == 1


@pytest.mark.parametrize("placement", ["prefix", "after_bos"])
def test_f27_what_is_left_is_the_end_of_the_document(placement, ours, random_prompt):
    lm = ours("llama", peft=random_prompt(0, n=6, placement=placement))
    whole = lm.slots.context(HUGE + "red", 0)
    kept = lm.slots.fit(tuple(whole), lm.window)
    assert len(kept) == lm.window
    assert [t for t in kept if t < 0] == [-1, -2, -3, -4, -5, -6]
    text = [t for t in kept if t >= 0 and t != BOS]
    assert whole[-len(text) :] == text
    loglikelihood(lm, [(HUGE + "red", " good")])


def test_f27_what_is_cut_does_not_count(ours, random_prompt):
    """Two documents that differ only where it does not fit score the same; where it fits, they do not."""
    prompt = random_prompt(0, n=6)
    one, other, control = loglikelihood(
        ours("llama", peft=prompt), [("A joy. " + HUGE, " good"), ("A bore. " + HUGE, " good"), (HUGE + "A bore.", " good")]
    )
    assert one == other
    assert abs(one[0] - control[0]) > 1e-3


def test_f27_rolling_reads_every_token_of_a_huge_text_without_cutting(ours, random_prompt):
    lm = ours("llama", peft=random_prompt(0, n=6), batch_size=16)
    text = HUGE[:6000]
    (total,) = rolling(lm, [text])
    assert total < -len(lm.tok_encode(text)) / 10
    assert lm.counters.truncated == 0


def test_f27_positive_control_what_fits_is_not_cut(ours, random_prompt):
    lm = ours("llama", peft=random_prompt(0, n=6))
    ids = lm.tok_encode("red " * 200, add_special_tokens=False)
    fits = lm.tok_decode(ids[: lm.max_length - 8])
    loglikelihood(lm, [(fits, " good")])
    assert lm.counters.truncated == 0


@pytest.mark.parametrize("prompt", [False, True])
def test_f27_a_huge_label_is_an_error_that_says_what_fits(prompt, ours, random_prompt):
    lm = ours("llama", **({"peft": random_prompt(0, n=6)} if prompt else {}))
    with pytest.raises(DataError, match=r"context of 96 tokens.*Shorten the continuation"):
        loglikelihood(lm, [("Good.", " good" * 500)])
    assert loglikelihood(lm, [("Good.", " good" * 20)])


# --- F29 -------------------------------------------------------------------------------------------------------------


def test_f29_templates_in_documents_frames_and_prompts_stay_text(ours, random_prompt, evaluate, tmp_path):
    canary = tmp_path / "canary"
    payload = "{{ cycler.__init__.__globals__.os.mkdir('" + str(canary) + "') }}{% set x = 1 %}"
    rows = [{"text": f"{payload} {i}", "label": 0, "prompt_id": payload} for i in range(2)]
    prompt = random_prompt(0, placement="user_start", text=f"{payload} §", info={"note": payload})
    for chat in (False, True):
        lm = ours("qwen2", peft=prompt, batch_size=2, max_length=800)
        arguments = {"apply_chat_template": True, "system_instruction": payload} if chat else {}
        results = evaluate(lm, [{**t, "rows": rows} for t in (CHOICE_TASK, GENERATE_TASK)], **arguments)
        for task in ("toy_mc", "toy_gen"):
            contexts = evaluate_arguments(results, task)
            assert all(f"Review: {payload} {i} Sentiment:" in c for i, c in enumerate(contexts))
        assert results["config"]["softprompt"]["frame"]["text"] == f"{payload} §"
        assert lm.counters.truncated == 0
        ids = lm.slots.context(contexts[0], 0)
        assert lm.tok_decode([t for t in ids if t >= 0], skip_special_tokens=False).count(payload) == 2 + chat
    assert not canary.exists()


def test_f29_positive_control_the_payload_runs_where_it_is_a_template(tmp_path):
    canary = tmp_path / "canary"
    jinja2.Template("{{ cycler.__init__.__globals__.os.mkdir('" + str(canary) + "') }}").render()
    assert canary.is_dir()


# --- F31 -------------------------------------------------------------------------------------------------------------


def by_hand(backbone, head, ids):
    """Log-probability of ``ids`` behind the embeddings ``head`` [n, d], one forward pass, no cache."""
    embeds = torch.cat([head, backbone.embedding(torch.tensor(ids))]).unsqueeze(0)
    with torch.no_grad():
        logprobs = backbone.model(inputs_embeds=embeds).logits[0].log_softmax(-1)
    return float(logprobs[range(len(head) - 1, len(head) + len(ids) - 1), ids].sum())


@pytest.mark.parametrize("placement", [None, "prefix", "after_bos", "user_start"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_f31_an_empty_context_is_the_prompt_and_a_bos(name, placement, ours, backbone, random_prompt):
    b = backbone(name)
    bos = hard_rows(b, [BOS])
    head, arguments = bos, {}
    if placement:
        folder = random_prompt(4, placement=placement, text="Please §." if placement == "user_start" else "§")
        rows = SoftPrompt.load(folder).embeddings
        head, arguments = torch.cat([bos, rows] if placement == "after_bos" else [rows, bos]), {"peft": folder}
    ids = b.tokenizer.encode("a film", add_special_tokens=False)
    got = loglikelihood(ours(name, **arguments), [("", "a film"), ("", "<s>a film")])
    expected = by_hand(b, head, ids)
    # A continuation that brings the BOS itself: it is the context then, and not scored.
    assert [value for value, _ in got] == pytest.approx([expected, expected], abs=1e-4)


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_f31_a_context_without_a_token_of_its_own(name, ours, backbone, random_prompt):
    """Blanks belong to the continuation; with a prompt in front, that is all the context there need be."""
    b, folder = backbone(name), random_prompt(4)
    rows = SoftPrompt.load(folder).embeddings
    ((value, _),) = loglikelihood(ours(name, peft=folder), [("  ", "good")])
    assert value == pytest.approx(by_hand(b, rows, b.tokenizer.encode("  good")), abs=1e-4)


def test_f31_without_any_context_token_it_is_an_error(ours):
    with pytest.raises(DataError, match="0 context"):
        loglikelihood(ours("qwen2"), [("  ", "good")])
    with pytest.raises(DataError, match="0 continuation"):
        loglikelihood(ours("qwen2"), [("red", "")])
    with pytest.raises(DataError, match="0 continuation"):
        loglikelihood(ours("qwen2"), [("", "<s>")])


def test_f31_positive_control_one_token_each(ours, backbone):
    b = backbone("qwen2")
    (red,), (dot,) = b.tokenizer.encode("r"), b.tokenizer.encode(".")
    ((value, _),) = loglikelihood(ours("qwen2"), [("r", ".")])
    assert value == pytest.approx(by_hand(b, hard_rows(b, [red]), [dot]), abs=1e-4)
