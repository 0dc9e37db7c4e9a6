"""``softverb translate``: training, preferences, bridges and inputs from the command line, and what is refused at once."""

from __future__ import annotations

import json

import pytest
from toy_translators import toy_bank, toy_prompt
from toys import FakeDod

from lm_eval_softverb import cli
from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.bank import Bank
from lm_eval_softverb.verbalizers.bridge import Bridge
from lm_eval_softverb.verbalizers.rerank import read_inputs
from lm_eval_softverb.verbalizers.translator_adapter import TranslatorAdapter
from lm_eval_softverb.verbalizers.translator_config import Between


@pytest.fixture
def bank(backbone, tmp_path):
    return toy_bank(backbone("llama"), tmp_path / "bank")


@pytest.fixture
def inputs(tmp_path):
    path = tmp_path / "inputs.jsonl"
    path.write_text(json.dumps({"prompt_id": "*", "inputs": ["The film is"]}))
    return path


def no_model(monkeypatch):
    monkeypatch.setattr(Backbone, "load", lambda *_a, **_k: pytest.fail("the model was loaded"))


def on(tiny):
    return ["--model", tiny("llama"), "--device", "cpu", "--dtype", "float32", "--quiet"]


def test_train_on_two_banks(bank, backbone, tiny, tmp_path):
    entry = {"prompt_id": "q", "split": "train", "labels": ["a", "b"]}
    more = Bank.save(tmp_path / "more", [(toy_prompt(backbone("llama"), 9), entry)])
    command = ["translate", "train", "--bank", bank.source, "--bank", str(more), "--kind", "labels", "--epochs", "1", *on(tiny)]
    assert cli.main([*command, "--out", str(tmp_path / "t")]) == 0
    made = TranslatorAdapter.load(tmp_path / "t")
    assert sum(map(len, made.info["prompts"].values())) == len(bank.prompts) + 1 and made.info["bank"] == "bank, more"


@pytest.mark.parametrize(("most", "per_prompt"), [([], 4), (["--most-texts", "2"], 3)])
def test_paraphrases_as_many_as_wanted(most, per_prompt, bank, tiny, tmp_path):
    """Each prompt's own text, and the first paraphrases."""
    names = [str(e["prompt_id"]) for e in bank.entries]
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"prompt_id": n, "paraphrases": ["one", "two", "three"]}) + "\n" for n in names))
    command = ["translate", "train", "--bank", bank.source, "--kind", "labels", "--epochs", "1", *on(tiny), *most]
    assert cli.main([*command, "--texts", str(texts), "--out", str(tmp_path / "t")]) == 0
    info = TranslatorAdapter.load(tmp_path / "t").info
    assert info["counts"]["texts_per_epoch"] == per_prompt * len(info["prompts"]["training"])


def test_train_verbalize_rerank(bank, tiny, tmp_path, inputs, capsys):
    out = tmp_path / "t"
    arguments = ["translate", "train", "--bank", bank.source, "--kind", "labels", "--out", str(out), *on(tiny)]
    settings = [
        "--rank",
        "2",
        "--lr",
        "0.01",
        "--epochs",
        "2",
        "--no-bos",
        "--label-order",
        "given",
        "--seed",
        "3",
        "--dropout",
        "0.2",
    ]
    assert cli.main([*arguments, *settings]) == 0
    made = TranslatorAdapter.load(out)
    config = made.info["config"]
    assert (config["rank"], config["learning_rate"], config["epochs"], config["seed"], config["dropout"]) == (
        2,
        0.01,
        2,
        3,
        0.2,
    )
    assert made.between == Between(False) and config["label_order"] == "given" and made.info["preset"] == "fixed"
    assert made.id in capsys.readouterr().out
    assert cli.main(arguments) == 1
    assert "another run" in capsys.readouterr().err

    texts = tmp_path / "texts.jsonl"
    read = ["verbalize", "--method", "translator", "--bank", bank.source, "--out", str(texts), *on(tiny)]
    read += ["--set", f"adapter={out}", "--set", "samples=4", "--max-new-tokens", "4"]
    assert cli.main([*read, "--rerank", str(inputs)]) == 0
    lines = [json.loads(x) for x in texts.read_text().splitlines()]
    best = [x for x in lines if x["rank"] == 0]
    assert len(best) == 6 and len(lines) > 6
    for own in best:
        values = [x["details"]["kl"] for x in lines if x["prompt_id"] == own["prompt_id"]]
        assert values == sorted(values)
    assert best[0]["settings"]["method"] == "translator" and best[0]["settings"]["adapter_id"] == made.id


def test_preferences(bank, tiny, tmp_path, inputs):
    arguments = ["translate", "train", "--bank", bank.source, "--kind", "labels", "--out", str(tmp_path / "t"), *on(tiny)]
    by_heart = "--epochs 40 --lr 0.02 --rank 8 --alpha 16 --min-delta=-1e9 --patience 0 --batch-size 3 --dropout 0"
    by_heart += " --weight-decay 0 --label-order given --max-tokens 20 --temperature 1.5"
    preferring = ["--dpo", str(inputs), "--dpo-epochs", "2", "--dpo-lr", "0.001", "--beta", "0.2"]
    assert cli.main([*arguments, *by_heart.split(), *preferring]) == 0
    first, made = TranslatorAdapter.load(tmp_path / "t" / "supervised"), TranslatorAdapter.load(tmp_path / "t")
    assert made.info["start"]["id"] == first.id != made.id
    config = made.info["config"]
    assert (config["beta"], config["epochs"], config["learning_rate"], config["dropout"]) == (0.2, 2, 0.001, 0.0)


def test_bridge(tiny, tmp_path, capsys):
    arguments = ["translate", "bridge", "--from", tiny("llama"), "--to", tiny("qwen2"), "--out", str(tmp_path / "b")]
    assert cli.main([*arguments, "--ridge", "0.5"]) == 0
    found = Bridge.load(tmp_path / "b")
    assert found.info["ridge"] == 0.5 and "common tokens" in capsys.readouterr().out
    assert found.id in {Bridge.load(tmp_path / "b").id}


def test_inputs_are_those_the_prompts_were_tuned_on(backbone, tmp_path, monkeypatch):
    dod, b = FakeDod(3), backbone("llama")
    monkeypatch.setattr("lm_eval_softverb.data.dod.opening.open_dod", lambda source: dod if source == "fake" else None)
    plain = toy_bank(b, tmp_path / "plain")
    items = [(p, {"prompt_id": f"p{i}", "task": f"task{i}"}) for i, p in enumerate(plain.prompts[:3])]
    bank = Bank.save(tmp_path / "bank", items)
    out = tmp_path / "inputs.jsonl"
    assert cli.main(["translate", "inputs", "--dod", "fake", "--bank", str(bank), "--out", str(out), "--most", "4"]) == 0
    assert read_inputs(out) == {f"p{i}": [r.input for r in dod.task(f"task{i}").train[:4]] for i in range(3)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "papr"], "Did you mean 'paper'"),
        (["--schedule", "cosine"], "Unknown schedule 'cosine'"),
        (["--start", "x"], "need --dpo FILE"),
        (["--beta", "0.2"], "need --dpo FILE"),
        (["--rank", "0"], "rank is 0"),
        (["--most-texts", "3"], "--texts FILE"),
        (["--name-answers", "--answers"], "kind 'instructions'"),
    ],
)
def test_f39_wrong_settings_exit_2_before_the_model_loads(arguments, message, bank, tmp_path, capsys, monkeypatch):
    no_model(monkeypatch)
    command = ["translate", "train", "--bank", bank.source, "--kind", "labels", "--out", str(tmp_path / "t"), *arguments]
    assert cli.main(command) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "bridge", "inputs"])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["translate", command, "--help"])
    assert stop.value.code == 0
    assert f"softverb translate {command}" in capsys.readouterr().out.partition("examples:")[2]
