"""A text in the slot of a soft prompt: equal to HFLM on the same strings, the prompt never cut, everything recorded."""

from __future__ import annotations

import json

import pytest
from toys import (
    CHOICE_ROWS,
    CHOICE_TASK,
    GENERATE_TASK,
    WINDOW,
    assert_same_scores,
    evaluate_arguments,
    generate_until,
    logged,
    loglikelihood,
    make_instances,
    rolling,
)

from lm_eval_softverb.errors import ConfigError, DataError
from lm_eval_softverb.frame import escape
from lm_eval_softverb.models.hardprompt import HardPromptLM
from lm_eval_softverb.models.ledger import Ledger

PROMPT = "Is the text good or bad, positive or negative?"
TASKS = [CHOICE_TASK, GENERATE_TASK]


@pytest.fixture
def hard(tiny, tmp_path):
    """``hard(name, text or lines, …)`` → model; None is no prompt."""

    def build(name, content=None, batch_size=4, **kwargs):
        if isinstance(content, str):
            (tmp_path / "p.txt").write_text(content + "\n", encoding="utf-8")
            kwargs["prompt_file"] = str(tmp_path / "p.txt")
        elif content is not None:
            (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content), encoding="utf-8")
            kwargs["prompt_file"] = str(tmp_path / "p.jsonl")
        return HardPromptLM(pretrained=tiny(name), batch_size=batch_size, **kwargs)

    return build


def lines(*texts, **more):
    return [{"prompt_id": f"p{i}", "text": t, "rank": 0, **more} for i, t in enumerate(texts)]


# --- equal to the harness's own model --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "t5"])
def test_without_a_prompt_it_is_hflm(name, hard, stock, ours, pairs, texts):
    lm = hard(name)
    assert_same_scores(loglikelihood(lm, pairs), loglikelihood(stock(name), pairs))
    other = ours(name) if name == "t5" else stock(name)  # HFLM counts an encoder's tokens as new ones
    assert generate_until(lm, texts) == generate_until(other, texts)


def test_rolling_without_a_prompt_is_hflms_and_with_one_is_refused(hard, stock, texts):
    assert rolling(hard("llama"), texts) == pytest.approx(rolling(stock("llama"), texts), abs=1e-3)
    with pytest.raises(ConfigError, match="no slot"):
        rolling(hard("llama", PROMPT), texts)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_a_prompt_is_hflm_on_the_joined_strings(name, hard, stock, ours, pairs, texts):
    lm = hard(name, PROMPT)
    joined = [(f"{PROMPT}\n\n{c}", t) for c, t in pairs]
    assert_same_scores(loglikelihood(lm, pairs), loglikelihood(stock(name), joined))
    other = ours(name) if name == "t5" else stock(name)
    assert generate_until(lm, texts) == generate_until(other, [f"{PROMPT}\n\n{t}" for t in texts])


def test_the_prompt_is_chosen_per_document_and_else_by_task(hard, stock):
    own = [*lines("Good or bad?", "Red or seven?"), {"prompt_id": "p0", "text": "second choice", "rank": 1}]
    own.append({"prompt_id": "toy", "text": "Say it."})
    lm = hard("llama", own)
    docs = [{"prompt_id": "p1"}, {"prompt_id": "p0"}, {}]
    expected = ["Red or seven?", "Good or bad?", "Say it."]
    got = loglikelihood(lm, [("a film", " good")] * 3, docs=docs)
    assert_same_scores(got, loglikelihood(stock("llama"), [(f"{p}\n\na film", " good") for p in expected]))
    facts = lm.get_model_info()["hardprompt"]
    assert facts["requests_by_prompt"] == {"p0": 1, "p1": 1, "toy": 1} and facts["n_texts"] == 3
    assert facts["tokens_added"]["toy"] == len(lm.tok_encode("Say it.", add_special_tokens=False))
    with pytest.raises(DataError, match=r"'p7'.*prompt_id"):
        loglikelihood(lm, [("a", " b")], docs=[{"prompt_id": "p7"}])


# --- through the harness ---------------------------------------------------------------------------------------------


def test_few_shot_goes_behind_the_prompt(hard, stock, evaluate):
    ours = evaluate(hard("llama", PROMPT), TASKS, num_fewshot=1)
    contexts = evaluate_arguments(ours, "toy_gen")
    assert all(PROMPT not in c and "\n\n" in c for c in contexts)  # the documents stay those of every other arm
    settings = {"until": ["\n"], "max_gen_toks": 6}
    assert [a[0][0] for a in logged(ours, "toy_gen")] == generate_until(
        stock("llama"), [f"{PROMPT}\n\n{c}" for c in contexts], settings
    )
    facts = ours["config"]["hardprompt"]
    assert (facts["template"], facts["n_texts"], facts["requests_by_prompt"]) == ("paper", 1, {"(all)": 24})
    assert len(facts["prompt_sha256"]) == 64 and "softprompt" not in ours["config"]
    json.dumps(facts)


@pytest.mark.parametrize("name", ["qwen2", "llama_tied"])  # the template of the latter rejects system messages
@pytest.mark.parametrize("template", ["paper", "system"])
def test_chats_carry_the_prompt_of_each_document(name, template, hard, stock, evaluate):
    lm = hard(name, lines("Good or bad?", "Red or \ue5f70 seven?"), template=template)
    results = evaluate(lm, [GENERATE_TASK], apply_chat_template=True)
    chats = []
    for row in CHOICE_ROWS:
        prompt = ["Good or bad?", "Red or \ue5f70 seven?"][row["label"]]
        text = f"Review: {row['text']} Sentiment:"
        if template == "paper" or name == "llama_tied":
            chats.append([{"role": "user", "content": f"{prompt}\n\n{text}"}])
        else:
            chats.append([{"role": "system", "content": prompt}, {"role": "user", "content": text}])
    plain = stock(name)
    expected = generate_until(plain, [plain.apply_chat_template(c) for c in chats], {"until": ["\n"], "max_gen_toks": 6})
    assert [a[0][0] for a in logged(results, "toy_gen")] == expected
    assert results["config"]["hardprompt"]["n_system_folded"] == (8 if (template, name) == ("system", "llama_tied") else 0)


def test_document_text_cannot_forge_the_slot(hard, stock):
    lm, plain = hard("qwen2", PROMPT), stock("qwen2")
    text = "a \ue5f7§ joy " + escape("\ue5f7")
    chat = lm.apply_chat_template([{"role": "user", "content": text}])
    wanted = plain.apply_chat_template([{"role": "user", "content": f"{PROMPT}\n\n{text}"}])
    assert generate_until(lm, [chat]) == generate_until(plain, [wanted])


def test_system_without_a_chat_is_refused(hard):
    with pytest.raises(ConfigError, match="--apply_chat_template"):
        generate_until(hard("qwen2", PROMPT, template="system"), ["a"])


# --- what is cut -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True])
def test_a_long_document_is_cut_on_the_left_and_the_prompt_never(chat, hard):
    lm = hard("qwen2", PROMPT)
    text = " ".join(f"word{i}" for i in range(60))
    if chat:
        text = lm.apply_chat_template([{"role": "user", "content": text}])
    ids = lm.slots.whole(text, 0)
    room = WINDOW - 8
    assert len(ids) > room
    cut = lm.slots.fit(ids, room)
    shown = lm.tokenizer.decode(cut)
    assert len(cut) == room and f"{PROMPT}\n\n" in shown and "word59" in shown and "word1 " not in shown
    generate_until(lm, [text])
    assert lm.get_model_info()["hardprompt"]["n_truncated"] == 2


def test_without_a_prompt_the_cut_is_hflms(hard, stock):
    long = [(" ".join(f"word{i}" for i in range(60)), " good")]
    lm = hard("llama")
    assert_same_scores(loglikelihood(lm, long), loglikelihood(stock("llama"), long))
    assert lm.counters.truncated == 1


def test_a_prompt_that_leaves_no_room_is_an_error(hard):
    with pytest.raises(DataError, match="never cut"):
        generate_until(hard("llama", "word " * 100), ["a film"])


# --- cache -----------------------------------------------------------------------------------------------------------


def test_the_cache_goes_by_the_prompts_text(hard, tmp_path):
    for text, template, cached in [(PROMPT, None, 0), ("Another", None, 0), (PROMPT, None, 1), (None, None, 0)]:
        lm = hard("llama", text, template=template)
        lm.ledger = Ledger(tmp_path / "a.db")
        generate_until(lm, ["a film"])
        lm.ledger.close()
        assert lm.counters.from_cache == cached, text
    lm = hard("llama", [{"prompt_id": "toy", "text": PROMPT}])  # the same text under a name
    lm.ledger = Ledger(tmp_path / "a.db")
    generate_until(lm, ["a film"])
    assert lm.counters.from_cache == 1


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"prompt": "Answer yes"}, "commas"),
        ({"api_key": "abc"}, "secret"),
        ({"token": "hf_x"}, "secret"),
        ({"revision": "sk-0123456789abcdef"}, "secret"),
        ({"peft": "x"}, "softprompt"),
        ({"template": "paper"}, "control"),
        ({"template": "papers"}, "Did you mean"),
        ({"prompt_file": "x.yaml"}, r"\.txt"),
    ],
)
def test_refused_arguments(arguments, reason):
    with pytest.raises(ConfigError, match=reason) as stop:
        HardPromptLM(pretrained="/nowhere", **arguments)
    assert not any(str(v) in str(stop.value) for k, v in arguments.items() if k in ("api_key", "revision"))


@pytest.mark.parametrize(
    "content",
    ["", [{"prompt_id": "a"}], [{"text": "a"}], lines("a") + lines("b"), [{"prompt_id": "a", "text": "b", "rank": 1}]],
)
def test_bad_files(content, hard):
    with pytest.raises(DataError, match=r"p\.(txt|jsonl)"):
        hard("llama", content)


def test_a_prompt_is_data(hard, evaluate):
    results = evaluate(hard("llama", "{{7*7}} {% raise %} ${x}"), [GENERATE_TASK])
    assert results["results"]["toy_gen"]["sample_len"] == 8


def test_requests_are_counted_once_for_repeats(hard):
    lm = hard("llama", PROMPT)
    lm.generate_until(make_instances("generate_until", [("a", {"until": [], "max_gen_toks": 2})] * 2), disable_tqdm=True)
    assert lm.get_model_info()["hardprompt"]["requests_by_prompt"] == {"(all)": 2}
