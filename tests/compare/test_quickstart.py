"""The quickstart on a tiny model: everything is written, a second call repeats nothing, arms are one table."""

from __future__ import annotations

import csv

import pytest

from lm_eval_softverb.compare import quickstart as module
from lm_eval_softverb.errors import ConfigError
from lm_eval_softverb.models.softprompt import SoftPromptLM
from lm_eval_softverb.prompt import SoftPrompt
from lm_eval_softverb.tuners.config import config

pytest.importorskip("matplotlib", reason="the page needs the extra [plots]")


def test_quickstart_writes_everything_and_resumes(tiny, tmp_path, monkeypatch):
    # shots of real sentences are longer than the default tiny window
    settings = {"pretrained": tiny("llama", window=1024), "config": config(tokens=4, epochs=1), "progress": False}
    lines = module.quickstart(tmp_path, labelset="weather", **settings)
    rows = list(csv.DictReader((tmp_path / "report.csv").open()))
    assert [r["arm"] for r in rows if r["metric"] == "acc"] == [
        "none", "fewshot", "softprompt", "softprompt - none", "softprompt - fewshot"
    ]  # fmt: skip
    assert {r["task"] for r in rows} == {"softverb_labels_weather", "softverb_labels_weather_mc"}
    assert {r["n"] for r in rows} == {"50"}
    assert SoftPrompt.load(tmp_path / "prompt").n == 4
    page = (tmp_path / "report.html").read_text()
    assert "<svg" in page and "InSPEcT of random vectors" not in page and "self-verbalization" in page
    assert "<details><summary>softverb_labels_weather_mc (acc" in page and "lm_eval --model softprompt" in page
    for arm in module.arms_of("weather", tmp_path / "prompt", "x"):
        written = sorted(p.name.split("_20")[0] for p in (tmp_path / "lm_eval" / arm.name).rglob("*.json*"))
        assert written == ["arm.json", "results", "samples_softverb_labels_weather", "samples_softverb_labels_weather_mc"]

    def computed(*_a, **_k):
        raise AssertionError("an answered request was computed again")

    monkeypatch.setattr(SoftPromptLM, "_score", computed)
    monkeypatch.setattr("lm_eval_softverb.models.softprompt.answer_generations", computed)
    assert module.quickstart(tmp_path, labelset="weather", **settings) == lines


def test_unknown_label_set(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'weather'"):
        module.quickstart(tmp_path, labelset="wether")
