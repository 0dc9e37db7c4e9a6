"""PEFT's own reading of our folders, and our reading of PEFT's: same rows, same scores, same text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from toys import assert_same_scores, generate_until, loglikelihood, rolling

from lm_eval_softverb.prompt import SIDECAR, SoftPrompt

NAMES = ["llama", "llama_tied", "gpt2", "qwen2", "gemma2", "gemma3"]


@pytest.fixture
def with_peft(tiny):
    """``with_peft(name, folder)`` → the harness's ``--model hf,peft=DIR``."""
    from lm_eval.models.huggingface import HFLM

    def build(name, folder, **kwargs):
        return HFLM(pretrained=tiny(name), peft=folder, device="cpu", **{"batch_size": 1, **kwargs})

    return build


@pytest.fixture
def made_by_peft(tiny, tmp_path):
    """``made_by_peft(config)`` → folder that PEFT itself wrote for a random prompt."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    def build(name, config):
        auto = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
        torch.manual_seed(5)
        model = get_peft_model(auto.from_pretrained(tiny(name)), config)
        model.save_pretrained(tmp_path / "made")
        return str(tmp_path / "made")

    return build


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_scores_equal_hf_with_the_same_folder(name, batch_size, ours, with_peft, random_prompt, pairs):
    folder = random_prompt(1, n=6)
    theirs = loglikelihood(with_peft(name, folder, batch_size=batch_size), pairs)
    assert_same_scores(loglikelihood(ours(name, peft=folder, batch_size=4), pairs), theirs)


@pytest.mark.parametrize("name", NAMES)
def test_text_equals_hf_with_the_same_folder_at_batch_size_one(name, ours, with_peft, random_prompt, texts):
    folder = random_prompt(2, n=6)
    theirs = generate_until(with_peft(name, folder), texts)
    assert generate_until(ours(name, peft=folder, batch_size=4), texts) == theirs


def test_rolling_scores_equal_hf_for_texts_of_one_window(ours, with_peft, random_prompt, texts):
    folder = random_prompt(3, n=6)
    theirs = rolling(with_peft("llama", folder), texts)
    assert rolling(ours("llama", peft=folder, batch_size=4), texts) == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_prompt_tuning_folders_made_by_peft(name, ours, with_peft, made_by_peft, pairs):
    from peft import PromptTuningConfig, TaskType

    folder = made_by_peft(name, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4))
    theirs = loglikelihood(with_peft(name, folder), pairs)
    assert_same_scores(loglikelihood(ours(name, peft=folder, batch_size=4), pairs), theirs)


@pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
def test_p_tuning_folders_made_by_peft(encoder, ours, with_peft, made_by_peft, pairs, texts):
    """PEFT folds the encoder into the rows it saves, so the folder reads like any other."""
    from peft import PromptEncoderConfig, TaskType

    config = PromptEncoderConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=4,
        encoder_hidden_size=16,
        encoder_reparameterization_type=encoder,
    )
    folder = made_by_peft("llama", config)
    stock = with_peft("llama", folder)
    lm = ours("llama", peft=folder, batch_size=4)
    assert_same_scores(loglikelihood(lm, pairs), loglikelihood(stock, pairs))
    assert generate_until(lm, texts) == generate_until(stock, texts)


def test_peft_loads_our_folder_with_the_same_rows(tiny, random_prompt):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = random_prompt(4, n=6)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny("llama")), folder)
    rows = model.get_prompt(batch_size=1)[0]
    assert torch.equal(rows, SoftPrompt.load(folder).embeddings)


def test_without_our_file_a_working_adapter_is_left(ours, with_peft, random_prompt, pairs):
    folder = random_prompt(4, n=6)
    before = loglikelihood(ours("llama", peft=folder), pairs)
    (Path(folder) / SIDECAR).unlink()
    assert_same_scores(loglikelihood(with_peft("llama", folder), pairs), before)
    assert_same_scores(loglikelihood(ours("llama", peft=folder), pairs), before)


def test_peft_reads_the_folder_without_warnings(tiny, random_prompt, recwarn):
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(random_prompt(n=6))
    assert config.peft_type.value == "PROMPT_TUNING"
    assert (config.num_virtual_tokens, config.token_dim) == (6, 32)
    assert [str(w.message) for w in recwarn if "peft" in str(w.filename).lower()] == []


def test_seq2seq_folders_made_by_peft_use_the_first_half(ours, made_by_peft):
    """PEFT saves twice the rows for an encoder-decoder and reads only the half before the encoder's input."""
    from peft import PromptTuningConfig, TaskType

    folder = made_by_peft("t5", PromptTuningConfig(task_type=TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=4))
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    from safetensors.torch import load_file

    rows = load_file(Path(folder) / "adapter_model.safetensors")["prompt_embeddings"]
    assert (config["num_transformer_submodules"], len(rows)) == (2, 8)
    prompt = SoftPrompt.load(folder)
    assert torch.equal(prompt.embeddings, rows[:4])
