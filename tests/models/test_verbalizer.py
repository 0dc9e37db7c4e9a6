"""``--model verbalizer``: documents name prompts, answers are texts; what it refuses, and its cache."""

from __future__ import annotations

import pytest
import torch
from lm_eval.api.registry import get_model
from toys import make_instances

from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.bank import Bank
from lm_eval_softverb.errors import ArtifactError, BaseModelMismatch, ConfigError, DataError
from lm_eval_softverb.models.ledger import Ledger
from lm_eval_softverb.models.verbalizer import InspectLM, VerbalizerLM
from lm_eval_softverb.plugin import register
from lm_eval_softverb.prompt import SoftPrompt
from lm_eval_softverb.verbalizers.inspect_grid import Inspect

FIXED = {"source_layer": 0, "target_layer": 0}


@pytest.fixture(scope="module")
def model(tiny):
    return Backbone.load(tiny("llama", window=1024), dtype="float32", device="cpu")


@pytest.fixture
def bank(tmp_path, model):
    prompts = [
        SoftPrompt(torch.randn(3 + i, 32, generator=torch.Generator().manual_seed(i)), fingerprint=model.fingerprint)
        for i in range(3)
    ]
    entries = [{"prompt_id": f"p{i}", "labels": ["red", "blue"], "instruction": "Say a colour."} for i in range(3)]
    return Bank.load(Bank.save(tmp_path / "bank", zip(prompts, entries, strict=True)))


def requests(docs, new=6, **more):
    arguments = [(d.get("prompt_id", ""), {"until": [], "max_gen_toks": new, **more}) for d in docs]
    return make_instances("generate_until", arguments, docs=docs)


DOCS = [{"prompt_id": f"p{i}", "kind": kind} for kind in ("labels", "instructions") for i in (2, 0, 1)]


def test_answers_are_the_texts_of_the_prompts_named(bank, model):
    lm = InspectLM(pretrained=model, bank=bank.source, batch_size=2, **FIXED)
    answers = lm.generate_until(requests(DOCS), disable_tqdm=True)
    verbalizer = Inspect(**FIXED, avoid="blue|red")
    expected = [
        verbalizer.verbalize(model, [bank.prompts[i]], kind=kind, max_new_tokens=6)[0][0].text
        for kind in ("labels", "instructions")
        for i in (2, 0, 1)
    ]
    assert answers == expected
    info = lm.get_model_info()["verbalizer"]
    assert info["method"] == "inspect" and info["source_layer"] == 0 and info["n_prompts"] == 3
    assert set(info["answers"]) == {"p0", "p1", "p2"} and info["answers"]["p0"]["confidence"] > 0


def test_max_new_tokens_is_the_task_s(bank, model):
    lm = InspectLM(pretrained=model, bank=bank.source, **FIXED)
    long, short = (lm.generate_until(requests(DOCS[:3], new), disable_tqdm=True) for new in (8, 2))
    assert [a[: len(b)] for a, b in zip(long, short, strict=True)] == short and long != short


def test_f24_the_cache_keeps_settings_prompts_and_kinds_apart(bank, model, tmp_path, monkeypatch):
    def lm(**settings):
        out = VerbalizerLM(pretrained=model, bank=bank.source, method="inspect", **settings)
        out.ledger = Ledger(tmp_path / "cache.db")
        return out

    first = lm(**FIXED)
    answers = first.generate_until(requests(DOCS), disable_tqdm=True)
    again = lm(**FIXED)
    monkeypatch.setattr(Inspect, "verbalize", lambda *_a, **_k: pytest.fail("computed again"))
    assert again.generate_until(requests(DOCS), disable_tqdm=True) == answers
    assert again.counters.from_cache == 6
    assert again.get_model_info()["verbalizer"]["answers"] == first.get_model_info()["verbalizer"]["answers"]
    monkeypatch.undo()
    for changed in ({"source_layer": 1, "target_layer": 0}, {**FIXED, "control": "random"}, {**FIXED, "seed": 1}):
        other = lm(**changed)
        texts = other.generate_until(requests(DOCS), disable_tqdm=True)
        assert other.counters.from_cache == 0
        assert texts != answers


def test_wrong_arguments_are_refused_before_the_model_loads(bank, monkeypatch):
    monkeypatch.setattr("lm_eval_softverb.backbone.Backbone.load", lambda *_a, **_k: pytest.fail("the model was loaded"))
    for arguments, message in (
        ({"bank": bank.source}, "needs method="),
        ({"bank": bank.source, "method": "inspekt"}, "Did you mean 'inspect'"),
        ({"bank": bank.source, "method": "inspect", "sorce_layer": 1}, "Did you mean 'source_layer'"),
        ({"bank": bank.source, "method": "inspect", "control": "rand"}, "Did you mean 'random'"),
        ({"bank": bank.source, "method": "inspect", "kind": "label"}, "Did you mean 'labels'"),
        ({"method": "inspect"}, "pass bank=DIR"),
    ):
        with pytest.raises(ConfigError, match=message):
            VerbalizerLM(**arguments)
    with pytest.raises(ConfigError, match="has its method already"):
        InspectLM(bank=bank.source, method="nearest")
    with pytest.raises(ArtifactError, match="no bank"):
        InspectLM(bank="nowhere")


def test_f11_prompts_of_another_model_are_refused_unless_forced(bank, tiny):
    other = Backbone.load(tiny("llama_tied", window=1024), dtype="float32", device="cpu")
    with pytest.raises(BaseModelMismatch):
        InspectLM(pretrained=other, bank=bank.source, **FIXED)
    lm = InspectLM(pretrained=other, bank=bank.source, force=True, **FIXED)
    assert len(lm.get_model_info()["verbalizer"]["forced_despite"]) == 3


def test_what_a_verbalizer_cannot_do(bank, model):
    lm = InspectLM(pretrained=model, bank=bank.source, **FIXED)
    for scoring in (lm.loglikelihood, lm.loglikelihood_rolling):
        with pytest.raises(ConfigError, match="writes texts"):
            scoring([])
    with pytest.raises(ConfigError, match="samples="):
        lm.generate_until(requests(DOCS[:1], do_sample=True), disable_tqdm=True)
    with pytest.raises(DataError, match="kind 'poem'"):
        lm.generate_until(requests([{"prompt_id": "p0", "kind": "poem"}]), disable_tqdm=True)
    with pytest.raises(ArtifactError, match="no prompt for 'p9'"):
        lm.generate_until(requests([{"prompt_id": "p9", "kind": "labels"}]), disable_tqdm=True)


def test_f24_documents_of_another_bank_are_refused(bank, model):
    """The harness's request cache hands out the documents of whatever bank came first."""
    lm = InspectLM(pretrained=model, bank=bank.source, **FIXED)
    doc = {"prompt_id": "p0", "kind": "labels", "labels": ["red", "blue"], "target": "red, blue"}
    lm.generate_until(requests([doc]), disable_tqdm=True)
    with pytest.raises(DataError, match="--cache_requests"):
        lm.generate_until(requests([{**doc, "target": "green, yellow"}]), disable_tqdm=True)


@pytest.mark.parametrize("alias", ["inspect", "elicit", "selfverb", "nearest"])
def test_the_aliases_run_both_tasks_through_the_harness(bank, tiny, alias, monkeypatch, hashing):
    import lm_eval
    from lm_eval.tasks import TaskManager

    from lm_eval_softverb.plugin import task_dir

    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _results: None)
    register()
    assert issubclass(get_model(alias), VerbalizerLM)
    arguments = {"pretrained": tiny("llama", window=1024), "bank": bank.source, "dtype": "float32"}
    results = lm_eval.simple_evaluate(
        model=alias,
        model_args=arguments,
        tasks=["verbalize_labels", "verbalize_instructions"],
        task_manager=TaskManager(include_path=str(task_dir()), include_defaults=False, metadata=arguments),
        gen_kwargs="max_gen_toks=6",
        bootstrap_iters=10,
    )
    for task, metric in (("verbalize_labels", "f1"), ("verbalize_instructions", "rouge_l")):
        scores = results["results"][task]
        assert 0 <= scores[f"{metric},none"] <= 1 and scores[f"{metric}_stderr,none"] != "N/A"
        assert [s["doc"]["prompt_id"] for s in results["samples"][task]] == ["p0", "p1", "p2"]
    assert results["config"]["verbalizer"]["method"] == alias
