"""F33 a harness too old, F34 no network, F35 no memory."""

from __future__ import annotations

import importlib.metadata
import socket

import pytest
import torch
from toys import assert_same_scores, generate_until, loglikelihood, rolling

from lm_eval_softverb import cli
from lm_eval_softverb.errors import MissingExtra, ModelUnavailable
from lm_eval_softverb.prompt import SoftPrompt

# --- F33 -------------------------------------------------------------------------------------------------------------


def pretend_version(monkeypatch, found):
    real = importlib.metadata.version

    def version(name):
        if name != "lm_eval":
            return real(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize("found", ["0.4.12", "0.4.9.1", "0.4", "0.3.0", None])
def test_f33_a_harness_too_old_or_missing_is_named_with_the_command(found, monkeypatch, capsys):
    pretend_version(monkeypatch, found)
    with pytest.raises(MissingExtra, match=r"pip install 'lm_eval>=0\.4\.13"):
        cli.require_lm_eval()
    assert cli.main(["model"]) == 2
    assert "pip install" in capsys.readouterr().err


@pytest.mark.parametrize("found", ["0.4.13", "0.4.14", "0.4.13.dev0+abc", "0.5", "1.0.0"])
def test_f33_positive_control_newer_ones_pass(found, monkeypatch):
    pretend_version(monkeypatch, found)
    cli.require_lm_eval()


# --- F34 -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to open a connection fails, as without a network."""
    tried = []

    def refuse(*arguments, **_kwargs):
        tried.append(arguments)
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tried


def test_f34_a_model_that_is_not_there_says_how_to_fetch_it(no_network):
    from lm_eval_softverb.models.softprompt import SoftPromptLM

    with pytest.raises(ModelUnavailable, match=r"'nobody/no-model'.*hf download nobody/no-model.*pretrained=smollm2-135m"):
        SoftPromptLM(pretrained="nobody/no-model")


def test_f34_a_prompt_that_is_not_there_says_how_to_fetch_it(no_network):
    with pytest.raises(ModelUnavailable, match=r"'nobody/no-prompt'.*hf download nobody/no-prompt"):
        SoftPrompt.load("nobody/no-prompt")


def test_f34_positive_control_local_files_need_no_network(no_network, ours, random_prompt, pairs):
    assert loglikelihood(ours("llama", peft=random_prompt()), pairs)
    assert no_network == []


# --- F35 -------------------------------------------------------------------------------------------------------------


def limit_memory(lm, rows, error=None):
    """Forward passes of more than ``rows`` rows run out of memory; returns how many did."""
    failed = []

    def check(_module, _arguments, kwargs):
        embeds = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["encoder_outputs"][0]
        if embeds.shape[0] > rows:
            failed.append(embeds.shape[0])
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    lm.model.register_forward_pre_hook(check, with_kwargs=True)
    return failed


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
@pytest.mark.parametrize("size", [8, "auto"])
def test_f35_batches_are_halved_until_they_fit_and_it_is_counted(name, size, ours, random_prompt, pairs, texts):
    prompt = random_prompt()
    plain = ours(name, peft=prompt, batch_size=1)
    lm = ours(name, peft=prompt, batch_size=size)
    failed = limit_memory(lm, 2)
    assert_same_scores(loglikelihood(lm, pairs), loglikelihood(plain, pairs))
    assert rolling(lm, texts) == pytest.approx(rolling(plain, texts), abs=1e-3)
    assert generate_until(lm, texts) == generate_until(plain, texts)
    assert failed
    assert lm.get_model_info()["softprompt"]["n_out_of_memory_splits"] == len(failed)


def test_f35_memory_that_runs_out_while_decoding(ours, random_prompt, texts):
    """The first steps fit, a later one does not: the halves begin again and the text is the same."""
    prompt = random_prompt()
    lm, steps = ours("llama", peft=prompt, batch_size=8), []

    def check(_module, _arguments, kwargs):
        steps.append(kwargs["inputs_embeds"].shape[0])
        if len(steps) == 6 and steps[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    lm.model.register_forward_pre_hook(check, with_kwargs=True)
    assert generate_until(lm, texts) == generate_until(ours("llama", peft=prompt), texts)
    assert lm.counters.out_of_memory == 1


def test_f35_answers_are_reported_once_each(ours, pairs, tmp_path):
    from lm_eval_softverb.models.ledger import Ledger

    lm = ours("llama", batch_size=8)
    lm.ledger = Ledger(tmp_path / "a.db")
    stored, put = [], lm.ledger.put
    lm.ledger.put = lambda key, answer: (stored.append(key), put(key, answer))
    limit_memory(lm, 3)
    loglikelihood(lm, pairs)
    assert len(stored) == len(set(stored)) == len(pairs)


def test_f35_other_messages_of_no_memory_count_too(ours, pairs):
    lm = ours("llama", batch_size=8)
    limit_memory(
        lm, 2, RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory")
    )
    loglikelihood(lm, pairs)
    assert lm.counters.out_of_memory > 0


def test_f35_one_row_that_does_not_fit_and_other_errors_are_raised(ours, pairs):
    lm = ours("llama", batch_size=8)
    limit_memory(lm, 0)
    with pytest.raises(torch.OutOfMemoryError):
        loglikelihood(lm, pairs)
    lm = ours("llama", batch_size=8)
    limit_memory(lm, 2, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        loglikelihood(lm, pairs)
    assert lm.counters.out_of_memory == 0


def test_f35_positive_control_with_memory_nothing_is_split(ours, pairs):
    lm = ours("llama", batch_size=8)
    assert limit_memory(lm, 64) == []
    loglikelihood(lm, pairs)
    assert lm.counters.out_of_memory == 0
