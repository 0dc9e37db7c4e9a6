"""``softverb verbalize``: one file of texts, resumable, never mixed with another run's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from lm_eval_softverb.errors import ArtifactError
from lm_eval_softverb.prompt import SoftPrompt
from lm_eval_softverb.verbalizers.base import Verbalization
from lm_eval_softverb.verbalizers.texts import kind_of, verbalize_to


@dataclass(frozen=True)
class Telling:
    """Two texts per prompt that say what was asked for; fails on the prompt whose rows are ``broken``."""

    method: ClassVar[str] = "telling"
    broken: float = -1.0
    calls: ClassVar[list[int]] = []

    def verbalize(self, backbone, prompts, *, kind, max_new_tokens):
        self.calls.append(len(prompts))
        values = [float(p.embeddings[0, 0]) for p in prompts]
        if self.broken in values:
            raise KeyboardInterrupt
        return [[Verbalization(f"{v} {kind} {max_new_tokens}", 0.5), Verbalization("second")] for v in values]


@pytest.fixture
def bank():
    prompts = [SoftPrompt(torch.full((2, 32), float(i))) for i in range(5)]
    entries = [{"prompt_id": f"p{i}", **({"labels": ["a"]} if i % 2 else {"instruction": "b"})} for i in range(5)]
    return prompts, entries


def test_every_prompt_is_asked_for_what_it_has(backbone, bank, tmp_path):
    out = tmp_path / "texts.jsonl"
    lines = verbalize_to(out, Telling(), backbone("llama"), *bank, batch_size=2, progress=False)
    assert [json.loads(x) for x in out.read_text().splitlines()] == lines
    best = [x for x in lines if x["rank"] == 0]
    assert [x["prompt_id"] for x in best] == ["p0", "p1", "p2", "p3", "p4"]
    assert [x["text"] for x in best] == [f"{float(i)} {'labels 40' if i % 2 else 'instructions 100'}" for i in range(5)]
    assert [kind_of(e) for e in bank[1][:2]] == ["instructions", "labels"]


def test_f04_a_kill_loses_one_batch(backbone, bank, tmp_path):
    out, model = tmp_path / "texts.jsonl", backbone("llama")
    whole = verbalize_to(tmp_path / "whole.jsonl", Telling(), model, *bank, batch_size=1, progress=False)
    Telling.calls.clear()

    class Killed(Telling):
        pass

    with pytest.raises(KeyboardInterrupt):
        killed = Killed()
        object.__setattr__(killed, "broken", 4.0)  # the same settings as far as the run is told
        verbalize_to(out, _as(Telling(), killed), model, *bank, batch_size=1, progress=False)
    kept = len(out.read_text().splitlines())
    assert kept == 4  # p0, p2 were finished when p4 failed
    Telling.calls.clear()
    assert verbalize_to(out, Telling(), model, *bank, batch_size=1, progress=False) == whole
    assert Telling.calls == [1, 1, 1]


def _as(settings, acting):
    """A verbalizer with the fields of one and the acts of another."""

    @dataclass(frozen=True)
    class Both(Telling):
        def verbalize(self, backbone, prompts, *, kind, max_new_tokens):
            return acting.verbalize(backbone, prompts, kind=kind, max_new_tokens=max_new_tokens)

    return Both(**settings.__dict__)


def test_texts_of_another_run_are_not_mixed(backbone, bank, tmp_path):
    out, model = tmp_path / "texts.jsonl", backbone("llama")
    verbalize_to(out, Telling(), model, *bank, progress=False)
    for changed in ({"max_new_tokens": 7}, {"kind": "labels"}, {"control": "random"}):
        with pytest.raises(ArtifactError, match="--overwrite"):
            verbalize_to(out, Telling(), model, *bank, progress=False, **changed)
    lines = verbalize_to(out, Telling(), model, *bank, progress=False, max_new_tokens=7, overwrite=True)
    assert {x["max_new_tokens"] for x in lines} == {7}


def test_the_control_reads_other_rows(backbone, bank, tmp_path):
    lines = verbalize_to(tmp_path / "t.jsonl", Telling(), backbone("llama"), *bank, control="random", progress=False)
    assert all(x["settings"]["control"] == "random" for x in lines)
    assert lines[2]["text"].split()[0] != "1.0"
