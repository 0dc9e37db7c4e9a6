"""``softverb select``: chosen on training prompts only, oracle, tuned and fixed apart, resumable."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch

from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.bank import Bank
from lm_eval_softverb.compare import selection
from lm_eval_softverb.compare.selection import Scored, report_lines, score_grid, select
from lm_eval_softverb.errors import ArtifactError, DataError
from lm_eval_softverb.prompt import SoftPrompt
from lm_eval_softverb.verbalizers.inspect_grid import Inspect, Selection, all_pairs

pytest.importorskip("matplotlib", reason="the page needs the extra [plots]")
GOLD = ["red", "blue"]


@pytest.fixture(scope="module")
def model(tiny):
    return Backbone.load(tiny("llama", window=256), dtype="float32", device="cpu")


@pytest.fixture
def bank(tmp_path, model):
    prompts = [
        SoftPrompt(torch.randn(3, 32, generator=torch.Generator().manual_seed(i)), fingerprint=model.fingerprint)
        for i in range(5)
    ]
    entries = [
        {"prompt_id": f"p{i}", "labels": GOLD, "instruction": "Name the colour.", "split": ("train", "test")[i % 2]}
        for i in range(5)
    ]
    return Bank.load(Bank.save(tmp_path / "bank", zip(prompts, entries, strict=True)))


@pytest.fixture
def texts(monkeypatch):
    """Grids by rule: on training prompts pair (0, 1) says everything; on test prompts (1, 0) does, and (0, 1) half."""
    calls = []

    def grid(self, backbone, prompts, *, kind, max_new_tokens, pairs=None, done=lambda _n: None):
        calls.append(len(prompts))
        out = []
        for prompt in prompts:
            training = int(prompt.source[-1]) % 2 == 0
            said = {(0, 1): "red blue", (1, 0): "no"} if training else {(0, 1): "red", (1, 0): "blue, red"}
            out.append({p: said.get(p, "nothing at all") for p in all_pairs(3)})
        done(9)
        return out

    monkeypatch.setattr(Inspect, "grid", grid)
    return calls


def run(model, bank, out, **changes):
    settings = {"kind": "labels", "inspect": Inspect(), "max_new_tokens": 5, "progress": False} | changes
    return select(model, bank, out, **settings)


def test_chosen_on_training_prompts_reported_on_test_prompts(model, bank, texts, tmp_path):
    chosen = run(model, bank, tmp_path)
    assert chosen.pairs == {"labels": (0, 1)} and chosen == Selection.load(tmp_path / "selection.json")
    assert chosen.info["labels"]["prompts"] == ["p0", "p2", "p4"]
    rows = {(r["arm"].split(" (")[0], r["metric"]): r for r in csv.DictReader((tmp_path / "report-labels.csv").open())}
    assert {k: float(r["value"]) for k, r in rows.items() if k[1] == "recall"} == {
        ("fixed", "recall"): 0.0, ("tuned", "recall"): 0.5, ("oracle", "recall"): 1.0, ("oracle per metric", "recall"): 1.0
    }  # fmt: skip
    assert float(rows["tuned", "f1"]["value"]) == pytest.approx(2 / 3, abs=1e-6) and rows["tuned", "f1"]["n"] == "2"
    lines = [json.loads(x) for x in (tmp_path / "texts-labels.jsonl").read_text().splitlines()]
    assert [(x["prompt_id"], x["arm"]) for x in lines[:3]] == [("p1", "fixed"), ("p1", "tuned"), ("p1", "oracle")]
    assert lines[2]["source_layer"] == 1 and lines[2]["text"] == "blue, red" and lines[2]["ground_truth"] == "red, blue"
    page = (tmp_path / "report-labels.html").read_text()
    assert "<svg" in page and "blue, red" in page and "needs the answer" in page


def test_grids_of_the_first_prompts_only(model, bank, texts, tmp_path):
    chosen = run(model, bank, tmp_path, most_train=2, most_test=1)
    assert chosen.info["labels"]["prompts"] == ["p0", "p2"] and len(texts) == 3
    assert {r["n"] for r in csv.DictReader((tmp_path / "report-labels.csv").open())} == {"1"}
    assert run(model, bank, tmp_path).info["labels"]["prompts"] == ["p0", "p2", "p4"]  # the grids there are kept
    assert len(texts) == 5


def test_the_pair_it_names_is_the_one_the_method_uses(model, bank, texts, tmp_path, monkeypatch):
    run(model, bank, tmp_path)
    assert Inspect(selection=str(tmp_path / "selection.json")).pair(3, "labels") == (0, 1)


def test_f04_finished_grids_are_kept(model, bank, texts, tmp_path):
    first = run(model, bank, tmp_path)
    (tmp_path / "grids" / f"labels-{bank.prompts[3].id}.json").unlink()
    texts.clear()
    assert run(model, bank, tmp_path) == first
    assert texts == [1]
    with pytest.raises(ArtifactError, match="another run"):
        run(model, bank, tmp_path, max_new_tokens=6)
    assert run(model, bank, tmp_path, max_new_tokens=6, overwrite=True).info["labels"]["max_new_tokens"] == 6


def test_kinds_share_one_file(model, bank, texts, tmp_path, hashing):
    run(model, bank, tmp_path)
    both = run(model, bank, tmp_path, kind="instructions")
    assert set(both.pairs) == {"labels", "instructions"} == set(both.info)
    assert (tmp_path / "report-instructions.csv").exists() and (tmp_path / "report-labels.csv").exists()


def test_a_bank_without_training_prompts(model, bank, texts, tmp_path):
    with pytest.raises(DataError, match=r"split 'dev'; its splits are \['test', 'train'\]"):
        select(model, bank, tmp_path, kind="labels", inspect=Inspect(), max_new_tokens=5, train="dev")


def test_arms_by_hand():
    """Two prompts, three pairs; the published oracle takes the best of each metric on its own."""

    def one(name, recall, f1):
        metrics = {"recall": np.array(recall), "f1": np.array(f1)}
        return Scored(name, "", ["", "", ""], metrics, (metrics["recall"] + metrics["f1"]) / 2)

    scored = [one("a", [1.0, 0.5, 0.0], [0.0, 0.6, 0.7]), one("b", [0.0, 0.4, 0.2], [0.0, 0.2, 0.3])]
    values = {(x.arm.split(" (")[0], x.metric): x.value for x in report_lines(scored, "labels", tuned=2, fixed=0)}
    assert values == pytest.approx(
        {
            ("fixed", "recall"): 0.5, ("fixed", "f1"): 0.0,
            ("tuned", "recall"): 0.1, ("tuned", "f1"): 0.5,
            ("oracle", "recall"): (0.5 + 0.4) / 2, ("oracle", "f1"): (0.6 + 0.2) / 2,
            ("oracle per metric", "recall"): (1.0 + 0.4) / 2, ("oracle per metric", "f1"): (0.7 + 0.3) / 2,
        }
    )  # fmt: skip


def test_scores_of_a_grid():
    pairs = [(0, 0), (0, 1)]
    found = score_grid({(0, 0): "red", (0, 1): "blue red x y"}, pairs, {"prompt_id": "p", "labels": GOLD}, "labels")
    assert found.metrics["recall"].tolist() == [0.5, 1.0]
    assert found.objective.tolist() == pytest.approx([(0.5 + 2 / 3) / 2, (1 + 2 / 3) / 2])


def test_the_map_has_sources_down_and_targets_across():
    image = selection.heat_map(np.arange(9.0).reshape(3, 3))
    assert image.startswith("<svg") and "target layer" in image
