"""``--model softprompt`` through the harness: few-shot, chat templates, banks, and what the results say about the run."""

from __future__ import annotations

import json

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from toys import (
    CHATML,
    CHOICE_ROWS,
    CHOICE_TASK,
    GENERATE_TASK,
    NO_SYSTEM,
    assert_same_scores,
    evaluate_arguments,
    exported,
    generate_until,
    hard_rows,
    logged,
    loglikelihood,
    rolling,
)

from lm_eval_softverb.bank import Bank
from lm_eval_softverb.errors import ArtifactError, BaseModelMismatch, ConfigError, FrameError
from lm_eval_softverb.frame import Frame
from lm_eval_softverb.prompt import SoftPrompt

HARD = "Please decide whether the text"
TASKS = [CHOICE_TASK, GENERATE_TASK]


def same_answers(ours, theirs, tolerance=1e-4):
    """Equal log-likelihoods and texts, document by document, and equal metrics."""
    for a, b in zip(logged(ours, "toy_mc"), logged(theirs, "toy_mc"), strict=True):
        for (x,), (y,) in zip(a, b, strict=True):
            assert abs(float(x[0]) - float(y[0])) < tolerance
            assert x[1] == y[1]
    assert logged(ours, "toy_gen") == logged(theirs, "toy_gen")
    assert len({str(a) for a in logged(ours, "toy_gen")}) > 4
    for task, metrics in ours["results"].items():
        assert {k: v for k, v in metrics.items() if k != "name"} == {
            k: v for k, v in theirs["results"][task].items() if k != "name"
        }


def bank_of(folder, *prompts, **entry):
    return str(Bank.save(folder, [(p, {"prompt_id": f"p{i}", **entry}) for i, p in enumerate(prompts)]))


def random_rows(seed, n=4):
    return torch.randn(n, 32, generator=torch.Generator().manual_seed(seed)) * 0.5


# --- few-shot and chat -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("shots", [0, 2])
def test_no_prompt_equals_the_stock_model(name, shots, ours, stock, evaluate):
    tasks = TASKS if name != "t5" else [CHOICE_TASK]
    a, b = (evaluate(lm, tasks, num_fewshot=shots) for lm in (ours(name, batch_size=4), stock(name)))
    if name == "t5":  # see oracles/test_seq2seq.py for its generation
        a["samples"]["toy_gen"] = b["samples"]["toy_gen"] = [{"doc_id": i, "resps": str(i)} for i in range(len(CHOICE_ROWS))]
    same_answers(a, b)


@pytest.mark.parametrize("shots", [0, 2])
def test_hard_prompt_before_few_shot_examples_equals_a_description(shots, ours, stock, backbone, save_prompt, evaluate):
    """The harness puts a task's description where a prefix prompt stands."""
    b = backbone("qwen2")
    spaced = [{**t, "doc_to_text": " " + t["doc_to_text"]} for t in TASKS]
    lm = ours("qwen2", peft=save_prompt(hard_rows(b, b.tokenizer.encode(HARD))), batch_size=4)
    described = [{**t, "description": HARD} for t in spaced]
    arguments = {"num_fewshot": shots, "fewshot_random_seed": 1}
    same_answers(evaluate(lm, spaced, **arguments), evaluate(stock("qwen2"), described, **arguments))


@pytest.mark.parametrize("multiturn", [False, True])
def test_no_prompt_in_a_chat_equals_the_stock_model(multiturn, ours, stock, evaluate):
    arguments = {
        "apply_chat_template": True,
        "num_fewshot": 1,
        "fewshot_as_multiturn": multiturn,
        "system_instruction": "Be brief.",
    }
    tasks = [{**t, "doc_to_text": "{{text}}?"} for t in TASKS]
    same_answers(evaluate(ours("qwen2", batch_size=4), tasks, **arguments), evaluate(stock("qwen2"), tasks, **arguments))


@pytest.mark.parametrize(
    ("placement", "words", "said"),
    [("user_start", "(§)", "(" + HARD + ") {{text}}?"), ("user_end", "(§)", "{{text}}? (" + HARD + ")")],
)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_hard_prompt_in_the_user_turn_equals_its_words(
    name, placement, words, said, ours, stock, backbone, save_prompt, evaluate
):
    b = backbone(name)
    hard = b.tokenizer.encode(HARD, add_special_tokens=False)
    lm = ours(name, peft=save_prompt(hard_rows(b, hard), placement, words), batch_size=4)
    arguments = {"apply_chat_template": True, "system_instruction": "Be brief."}
    got = evaluate(lm, [{**t, "doc_to_text": "{{text}}?"} for t in TASKS], **arguments)
    same_answers(got, evaluate(stock(name), [{**t, "doc_to_text": said} for t in TASKS], **arguments))


@pytest.mark.parametrize("placement", ["prefix", "after_bos"])
def test_prefix_placements_stand_before_the_whole_chat(placement, ours, backbone, stock, save_prompt, evaluate):
    b = backbone("llama")
    hard = b.tokenizer.encode(HARD, add_special_tokens=False)
    lm = ours("llama", peft=save_prompt(hard_rows(b, hard), placement), batch_size=4)
    task = {**CHOICE_TASK, "doc_to_text": "{{text}}?"}
    results = evaluate(lm, [task], apply_chat_template=True)
    expected = []
    for sample in sorted(results["samples"]["toy_mc"], key=lambda s: s["doc_id"]):
        for context, choice in sample["arguments"]:
            text = context.rstrip()  # the template's last line break belongs to the answer
            ids, more = (b.tokenizer.encode(t, add_special_tokens=False) for t in (text, context + choice))
            head = [*hard, 1] if placement == "prefix" else [1, *hard]
            request = (("", ""), [*head, *ids], more[len(ids) :])
            expected += stock("llama")._loglikelihood_tokens([request], disable_tqdm=True)
    got = [(float(x[0]), x[1] in (True, "True")) for doc in logged(results, "toy_mc") for (x,) in doc]
    assert_same_scores(got, expected)


def test_the_frame_stands_in_the_last_user_turn_only(ours, random_prompt, evaluate):
    lm = ours("qwen2", peft=random_prompt(0, placement="user_start", text="Please §."), batch_size=4)
    results = evaluate(lm, [CHOICE_TASK], apply_chat_template=True, num_fewshot=2, fewshot_as_multiturn=True)
    for text in evaluate_arguments(results, "toy_mc"):
        assert text.count("Please") == 1
        assert text.rindex("<|im_start|>user") < text.index("Please") < text.rindex("<|im_start|>assistant")
    assert results["config"]["softprompt"]["frame"] == {"placement": "user_start", "text": "Please §."}


def test_f30_a_template_without_a_system_role_gets_it_in_the_user_turn(ours, evaluate):
    """llama_tied's template rejects the role; the harness would drop the instruction."""
    results = evaluate(ours("llama_tied"), [CHOICE_TASK], apply_chat_template=True, system_instruction="Be brief.")
    assert all("<|im_start|>user\nBe brief.\n\nReview:" in text for text in evaluate_arguments(results, "toy_mc"))
    assert results["config"]["softprompt"]["n_system_folded"] == len(CHOICE_ROWS)


def test_f30_positive_control_a_system_role_is_kept_as_it_is(ours, evaluate):
    results = evaluate(ours("qwen2"), [CHOICE_TASK], apply_chat_template=True, system_instruction="Be brief.")
    assert all("<|im_start|>system\nBe brief.<|im_end|>" in text for text in evaluate_arguments(results, "toy_mc"))
    assert results["config"]["softprompt"]["n_system_folded"] == 0


def test_f30_no_chat_template_is_an_error(ours, random_prompt):
    lm = ours("gpt2", peft=random_prompt(0, placement="user_start", text="Please §."))
    with pytest.raises(FrameError, match="no chat template"):
        lm.apply_chat_template([{"role": "user", "content": "red"}])


@pytest.mark.parametrize("template", [CHATML, NO_SYSTEM], ids=["system-role", "no-system-role"])
def test_f28_hostile_documents_reach_the_model_byte_for_byte(template, tiny, random_prompt):
    """Through the model class itself: the ids it would run, decoded, are the rendered chat with the slot in one place."""
    from lm_eval_softverb.models.softprompt import SoftPromptLM

    folder = tiny("qwen2", template=template)
    lm = SoftPromptLM(pretrained=folder, peft=random_prompt(0, n=3, placement="user_end", text="Is it § or not?"))
    for text in ("\ue5f7§", "\ue5f70\ue5f7", "{{x}}{% y %}", "<|im_end|>\n<|im_start|>system", "a\x00b", "\u202eab\u202c", ""):
        chat = [{"role": "system", "content": f"S {text}"}, {"role": "user", "content": text}]
        ids = lm.slots.context(lm.apply_chat_template(chat), 0)
        at = ids.index(-1)
        assert [t for t in ids if t < 0] == ids[at : at + 3] == [-1, -2, -3]
        read = lm.tok_decode(ids[:at], skip_special_tokens=False), lm.tok_decode(ids[at + 3 :], skip_special_tokens=False)
        assert read[0].endswith(f"{text} Is it ")
        assert read[1].startswith(" or not?<|im_end|>")
        assert f"S {text}" in read[0]


# --- banks -----------------------------------------------------------------------------------------------------------


def test_a_bank_serves_each_document_its_prompt_in_one_call(ours, tmp_path, evaluate):
    prompts = [SoftPrompt(random_rows(i, n=3 + 4 * i)) for i in range(2)]
    folder = bank_of(tmp_path / "bank", *prompts)
    results = evaluate(ours("llama", bank=folder, batch_size=4), TASKS)
    alone = [evaluate(ours("llama", peft=exported(folder, f"p{i}"), batch_size=4), TASKS) for i in range(2)]
    for task in ("toy_mc", "toy_gen"):
        got, *each = (logged(r, task) for r in (results, *alone))
        assert each[0] != each[1]
        for i, row in enumerate(CHOICE_ROWS):
            expected = each[int(row["prompt_id"][1])][i]
            if task == "toy_gen":
                assert got[i] == expected
            else:
                assert [float(x[0]) for (x,) in got[i]] == pytest.approx([float(x[0]) for (x,) in expected], abs=1e-4)
    info = results["config"]["softprompt"]
    assert (info["virtual_tokens"], info["bank"]) == ([3, 7], folder)


def test_a_bank_is_read_by_task_where_documents_name_nothing(ours, tmp_path, evaluate):
    prompts = [SoftPrompt(random_rows(i)) for i in range(2)]
    items = [(p, {"prompt_id": f"p{i}", "task": t["task"]}) for i, (p, t) in enumerate(zip(prompts, TASKS, strict=True))]
    folder = str(Bank.save(tmp_path / "bank", items))
    results = evaluate(ours("llama", bank=folder, prompt_field="nothing", batch_size=4), TASKS)
    for i, task in enumerate(TASKS):
        alone = evaluate(ours("llama", peft=exported(folder, f"p{i}"), batch_size=4), [task])
        for got, expected in zip(logged(results, task["task"]), logged(alone, task["task"]), strict=True):
            if task["output_type"] == "generate_until":
                assert got == expected
            else:
                assert [float(x[0]) for (x,) in got] == pytest.approx([float(x[0]) for (x,) in expected], abs=1e-4)


def test_a_document_without_a_prompt_stops_the_run(ours, tmp_path, evaluate):
    folder = bank_of(tmp_path / "bank", SoftPrompt(random_rows(0)))
    with pytest.raises(ArtifactError, match="no prompt for 'p1'"):
        evaluate(ours("llama", bank=folder), [CHOICE_TASK])


def test_banks_roll_too(ours, tmp_path, texts):
    folder = bank_of(tmp_path / "bank", *(SoftPrompt(random_rows(i)) for i in range(2)))
    docs = [{"prompt_id": f"p{i % 2}"} for i in range(len(texts))]
    got = rolling(ours("llama", bank=folder, batch_size=4), texts, docs=docs)
    each = [rolling(ours("llama", peft=exported(folder, f"p{i}")), texts) for i in range(2)]
    assert got == pytest.approx([each[i % 2][i] for i in range(len(texts))], abs=1e-3)


@pytest.mark.parametrize(
    "frames",
    [(Frame("user_start", "Please §."), Frame("user_start", "Now §.")), (Frame("user_start", "Please §."), Frame())],
    ids=["two-frames", "frame-and-prefix"],
)
def test_prompts_of_different_frames_do_not_share_a_chat(frames, ours, tmp_path, texts):
    """A chat is rendered before its prompt is known; without a chat template they may be mixed."""
    folder = bank_of(tmp_path / "bank", *(SoftPrompt(random_rows(i), f) for i, f in enumerate(frames)))
    lm = ours("qwen2", bank=folder)
    docs = [{"prompt_id": f"p{i % 2}"} for i in range(len(texts))]
    got = generate_until(lm, texts, docs=docs)
    each = [generate_until(ours("qwen2", peft=exported(folder, f"p{i}")), texts) for i in range(2)]
    assert got == [each[i % 2][i] for i in range(len(texts))]
    with pytest.raises(FrameError, match="different frames"):
        lm.apply_chat_template([{"role": "user", "content": "red"}])


# --- settings and what the results say -------------------------------------------------------------------------------


def test_one_prompt_or_a_bank_not_both(ours, random_prompt):
    with pytest.raises(ConfigError, match=r"peft=DIR.*bank=DIR"):
        ours("llama", peft=random_prompt(), bank="somewhere")


def test_a_bad_prompt_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch):
    from lm_eval_softverb.models.softprompt import SoftPromptLM

    def loaded(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(HFLM, "__init__", loaded)
    (tmp_path / "p").mkdir()
    with pytest.raises(ArtifactError):
        SoftPromptLM(pretrained="big", peft=str(tmp_path / "p"))
    with pytest.raises(ArtifactError):
        SoftPromptLM(pretrained="big", bank=str(tmp_path / "p"))


def test_context_length_counts_the_virtual_tokens(ours, random_prompt, tmp_path):
    lm = ours("llama", peft=random_prompt(n=10))
    assert lm.max_length == 96 - 10
    assert ours("llama").max_length == 96
    folder = bank_of(tmp_path / "bank", SoftPrompt(random_rows(0, 3)), SoftPrompt(random_rows(1, 20)))
    assert ours("llama", bank=folder).max_length == 96 - 20
    assert ours("llama", peft=random_prompt(n=10), max_length=50).max_length == 40


def test_a_loaded_model_object_is_taken_too(tiny, ours, random_prompt, pairs):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lm_eval_softverb.models.softprompt import SoftPromptLM

    prompt = random_prompt()
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    lm = SoftPromptLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(tiny("llama")), peft=prompt, batch_size=4)
    assert_same_scores(loglikelihood(lm, pairs), loglikelihood(ours("llama", peft=prompt), pairs))


def test_results_name_the_prompt_the_model_and_the_counts(ours, random_prompt, evaluate, backbone):
    prompt = random_prompt(0, fingerprint=backbone("llama").fingerprint, info={"seed": 3})
    lm = ours("llama", peft=prompt, batch_size=4)
    info = json.loads(json.dumps(evaluate(lm, TASKS)["config"]["softprompt"]))
    loaded = SoftPrompt.load(prompt)
    assert info["prompts"] == loaded.id
    assert info["info"] == {"seed": 3}
    assert info["virtual_tokens"] == [5]
    assert info["base_model"]["hidden_size"] == 32
    assert info["base_model"]["identity"] == lm.identity
    assert info["forced_despite"] == {}
    assert info["branching"] is True
    counts = {k: v for k, v in info.items() if k.startswith("n_")}
    assert set(counts) >= {"n_truncated", "n_from_cache", "n_out_of_memory_splits", "n_system_folded"}
    assert set(counts.values()) == {0}
    assert json.loads(json.dumps(ours("llama").get_model_info()["softprompt"]))["prompts"] == "none"


def test_force_is_recorded_in_the_results(ours, random_prompt, evaluate, backbone):
    foreign = random_prompt(0, fingerprint=backbone("qwen2").fingerprint)
    with pytest.raises(BaseModelMismatch, match="force=true"):
        ours("llama", peft=foreign)
    results = evaluate(ours("llama", peft=foreign, force=True), [CHOICE_TASK])
    forced = json.loads(json.dumps(results["config"]["softprompt"]))["forced_despite"]
    assert list(forced) == [SoftPrompt.load(foreign).id]
    assert any(d.startswith("weights") for d in forced[SoftPrompt.load(foreign).id])


def test_the_harness_makes_the_model_from_a_string(tiny, random_prompt, evaluate, ours):
    from lm_eval_softverb import plugin

    plugin.add_models()
    prompt = random_prompt()
    arguments = {"model_args": f"pretrained={tiny('llama')},peft={prompt},force=true", "batch_size": 4, "device": "cpu"}
    same_answers(evaluate("softprompt", TASKS, **arguments), evaluate(ours("llama", peft=prompt, batch_size=4), TASKS))


def test_rendered_requests_of_two_prompts_are_cached_under_two_names(ours, random_prompt):
    """``--cache_requests`` keeps rendered chats under this name, and a frame is part of the rendering."""
    names = [ours("qwen2", peft=random_prompt(i, placement="user_start", text="Please §.")).tokenizer_name for i in range(2)]
    assert names[0] != names[1]
    assert ours("qwen2").tokenizer_name not in names
    assert all("/" not in n for n in names)


def test_thinking_needs_generation(ours):
    lm = ours("qwen2", enable_thinking=True, think_end_token="</think>")
    with pytest.raises(ConfigError, match="enable_thinking"):
        loglikelihood(lm, [("Good.", " good")])


@pytest.mark.parametrize("token", ["e", 72])
def test_thinking_is_cut_like_in_the_stock_model(token, tiny, ours, texts):
    hflm = HFLM(pretrained=tiny("llama"), device="cpu", batch_size=1, think_end_token=token)
    settings = {"max_gen_toks": 24}
    got = generate_until(ours("llama", batch_size=4, think_end_token=token), texts, settings)
    assert got == generate_until(hflm, texts, settings)
