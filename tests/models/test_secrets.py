"""F32: keys in model arguments are refused by every model of ours, and not repeated."""

from __future__ import annotations

import traceback

import pytest
from lm_eval.api.registry import get_model

from lm_eval_softverb.errors import ConfigError
from lm_eval_softverb.models.secrets import refuse_secrets

CANARY = "sk-canary0123456789"
MODELS = [
    "softprompt",
    "verbalizer",
    "translator",
    "inspect",
    "elicit",
    "selfverb",
    "nearest",
    "hardprompt",
    "hardprompt-chat",
    "replay",
]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("argument", ["api_key", "token", "revision", "adapter"])
def test_f32_no_model_takes_a_key(name, argument):
    with pytest.raises(ConfigError, match=f"'{argument}' looks like a secret") as caught:
        get_model(name)(**{argument: CANARY})
    assert CANARY not in "".join(traceback.format_exception_only(caught.value))


def test_f32_a_key_of_the_environment_is_known_wherever_it_stands(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "plain-looking-value")
    with pytest.raises(ConfigError, match="'pretrained'"):
        refuse_secrets({"pretrained": "https://hub/plain-looking-value/model"})


@pytest.mark.parametrize(
    "arguments",
    [
        {"token": None},
        {"token": False},
        {"think_end_token": "</think>"},
        {"bank": "banks/tokens"},
        {"base_url": "http://h:1/v1"},
    ],
)
def test_what_is_no_secret(arguments):
    refuse_secrets(arguments)


def test_user_and_password_of_an_address():
    with pytest.raises(ConfigError, match="'base_url'"):
        refuse_secrets({"base_url": "https://me:pass@host/v1"})
