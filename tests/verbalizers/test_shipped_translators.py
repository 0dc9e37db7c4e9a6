"""The translators that come with the package: small, with a card, and able to read prompts they have not seen."""

from __future__ import annotations

import pytest
from toys import ROOT

from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.bank import Bank
from lm_eval_softverb.metrics import label_scores
from lm_eval_softverb.pretrained import DEFAULT
from lm_eval_softverb.verbalizers import MAX_NEW_TOKENS
from lm_eval_softverb.verbalizers.base import random_like
from lm_eval_softverb.verbalizers.translator import Translator
from lm_eval_softverb.verbalizers.translator_adapter import SHIPPED, TranslatorAdapter, shipped
from lm_eval_softverb.verbalizers.translator_config import Between
from lm_eval_softverb.verbalizers.translator_heads import heads

BANKS = ROOT / "benchmarks" / "banks"


@pytest.fixture(scope="module")
def default():
    return Backbone.load(DEFAULT, dtype="float32", device="cpu")


def mean_recall(backbone, prompts, entries, adapter, ends=True):
    found = Translator(adapter=adapter).verbalize(backbone, prompts, kind="labels", max_new_tokens=MAX_NEW_TOKENS["labels"])
    assert not ends or not any(text.details["cut"] for [text] in found)
    return sum(label_scores(text.text, e["labels"])["recall"] for [text], e in zip(found, entries, strict=True)) / len(entries)


def test_each_has_its_card_and_fits_the_packaged_default(default):
    assert shipped() == ["instructions", "labels"]
    for name in shipped():
        adapter = TranslatorAdapter.load(name)
        assert adapter.kind == name and adapter.check_fits(default.fingerprint) == []
        assert adapter.info["prompts"]["training"]
        card = (SHIPPED / name / "README.md").read_text()
        for heading in ("## How it was trained", "## Scores", "## Limits", "## Licence"):
            assert heading in card
        assert adapter.id in card
        assert sum(file.stat().st_size for file in (SHIPPED / name).iterdir()) < 5_500_000


def test_it_reads_label_sets_it_has_not_seen(default):
    bank = Bank.load(BANKS / "tight")
    held_out = [(p, e) for p, e in zip(bank.prompts, bank.entries, strict=True) if e["split"] == "test"][:3]
    prompts, entries = zip(*held_out, strict=True)
    seen = TranslatorAdapter.load("labels").info["prompts"]
    assert not {e["prompt_id"] for e in entries} & {*seen["training"], *seen["validation"]}
    assert mean_recall(default, prompts, entries, "labels") > 0.6
    assert mean_recall(default, random_like(prompts), entries, "labels", ends=False) == 0


def test_instructions_end_and_name_what_the_prompt_answers(default):
    bank = Bank.load(BANKS / "general")
    held_out = [p for p, e in zip(bank.prompts, bank.entries, strict=True) if e["split"] == "test"][:3]
    found = Translator(adapter="instructions").verbalize(
        default, held_out, kind="instructions", max_new_tokens=MAX_NEW_TOKENS["instructions"]
    )
    for prompt, [text] in zip(held_out, found, strict=True):
        [head] = heads(default, [prompt], Between(bos=False, answers=True), "instructions").values()
        often = next(iter(head.shown))
        assert not text.details["cut"] and text.text.endswith(".") and f"'{often}'" in text.text.replace("' ", "'")
