"""The command line: what it refuses before work begins, and one training run end to end."""

from __future__ import annotations

import json

import pytest
from toys import exported

from lm_eval_softverb import cli
from lm_eval_softverb.prompt import SoftPrompt


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [{"input": f"Sentence: number {i} Label:", "output": ("good", "dull")[i % 2]} for i in range(12)]
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    return path


def no_model(monkeypatch):
    from lm_eval_softverb.backbone import Backbone

    monkeypatch.setattr(Backbone, "load", lambda *_a, **_k: pytest.fail("the model was loaded"))


def test_train_end_to_end(tiny, rows, tmp_path, capsys):
    arguments = ["train", "--data", str(rows), "--model", tiny("llama"), "--out", str(tmp_path / "p"), "--tokens", "3"]
    assert cli.main([*arguments, "--epochs", "2", "--frame", "Please §.", "--quiet", "--device", "cpu", "--seed", "7"]) == 0
    prompt = SoftPrompt.load(tmp_path / "p")
    assert (prompt.n, prompt.frame.placement, prompt.frame.text) == (3, "user_end", "Please §.")
    assert prompt.info["config"]["seed"] == 7
    assert prompt.info["source"] == {"file": "rows.jsonl", "rows_available": 12, "rows_used": 12}
    assert prompt.id in capsys.readouterr().out


def test_train_on_a_task_of_ours(tiny, tmp_path):
    arguments = ["train", "--data", "weather", "--model", tiny("llama"), "--out", str(tmp_path), "--max-rows", "10"]
    assert cli.main([*arguments, "--epochs", "1", "--quiet", "--preset", "paper", "--device", "cpu"]) == 0
    info = SoftPrompt.load(tmp_path).info
    assert info["source"] == {"task": "softverb_labels_weather", "rows_available": 70, "rows_used": 10}
    assert info["preset"] == "paper"


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (["--data", "wether"], "weather"),
        (["--data", "weather", "--preset", "papr"], "paper"),
        (["--data", "weather", "--placement", "prefx"], "prefix"),
    ],
)
def test_f39_unknown_names_exit_2_with_a_suggestion(arguments, suggestion, tmp_path, capsys, monkeypatch):
    no_model(monkeypatch)
    assert cli.main(["train", *arguments, "--out", str(tmp_path / "p")]) == 2
    assert f"Did you mean '{suggestion}'" in capsys.readouterr().err


def test_f39_control_known_names_pass(tmp_path, monkeypatch):
    from lm_eval_softverb.models.harness import find_rows

    assert len(find_rows("weather")[0]) == 70
    assert find_rows("softverb_labels_weather_mc")[0] == find_rows("weather")[0]


def test_f08_an_output_folder_that_cannot_be_written_fails_before_the_model_loads(rows, tmp_path, capsys, monkeypatch):
    no_model(monkeypatch)
    (tmp_path / "file").write_text("")
    assert cli.main(["train", "--data", str(rows), "--out", str(tmp_path / "file" / "p")]) == 1
    assert "Cannot write to the output folder" in capsys.readouterr().err


def test_f33_a_harness_that_is_too_old_is_refused_at_once(monkeypatch, capsys):
    monkeypatch.setattr("importlib.metadata.version", lambda _name: "0.4.9")
    assert cli.main(["doctor"]) == 2
    assert "pip install 'lm_eval>=0.4.13,<0.5'" in capsys.readouterr().err


def test_f33_a_missing_extra_names_the_pip_command(monkeypatch):
    import sys

    from lm_eval_softverb.compare.report import Line, plot_svg
    from lm_eval_softverb.errors import MissingExtra

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"pip install 'lm_eval_softverb\[plots\]'"):
        plot_svg([Line("a", "t", "acc", 0.5, 0.4, 0.6, 10)])


def test_f33_control_doctor_runs(capsys):
    assert cli.main(["doctor"]) == 0
    assert "models registered: softprompt" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["quickstart", "train", "model", "doctor"])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert "examples:" in capsys.readouterr().out


# --- verbalize and select --------------------------------------------------------------------------------------------


@pytest.fixture
def bank(tiny, tmp_path):
    import torch

    from lm_eval_softverb.backbone import Backbone
    from lm_eval_softverb.bank import Bank

    fingerprint = Backbone.load(tiny("llama", window=256), device="cpu").fingerprint
    items = [
        (
            SoftPrompt(torch.randn(3, 32, generator=torch.Generator().manual_seed(i)), fingerprint=fingerprint),
            {"prompt_id": f"p{i}", "labels": ["red", "blue"], "split": ("train", "test")[i % 2]},
        )
        for i in range(3)
    ]
    return Bank.save(tmp_path / "bank", items)


def test_verbalize_end_to_end(bank, tiny, tmp_path, capsys):
    out = tmp_path / "texts.jsonl"
    model = ["--model", tiny("llama", window=256), "--device", "cpu", "--quiet"]
    arguments = ["verbalize", "--bank", str(bank), "--out", str(out), "--max-new-tokens", "4", *model]
    assert cli.main([*arguments, "--method", "inspect", "--set", "source_layer=-1", "--set", "target_layer=1"]) == 0
    lines = [json.loads(x) for x in out.read_text().splitlines()]
    assert [x["prompt_id"] for x in lines] == ["p0", "p1", "p2"]
    assert lines[0]["settings"]["source_layer"] == -1 and lines[0]["max_new_tokens"] == 4
    assert "3 texts of 3 soft prompts" in capsys.readouterr().out
    assert cli.main([*arguments, "--method", "nearest"]) == 1
    assert "another run" in capsys.readouterr().err
    assert cli.main([*arguments, "--method", "nearest", "--split", "test", "--overwrite"]) == 0
    assert len(out.read_text().splitlines()) == 1


def test_verbalize_one_prompt(bank, tiny, tmp_path):
    out = tmp_path / "texts.jsonl"
    folder = exported(bank, "p0")
    arguments = ["verbalize", "--prompt", folder, "--out", str(out), "--method", "nearest", "--quiet"]
    assert cli.main([*arguments, "--model", tiny("llama", window=256), "--device", "cpu"]) == 0
    [line] = [json.loads(x) for x in out.read_text().splitlines()]
    assert line["prompt_id"] == SoftPrompt.load(folder).id and line["kind"] == "instructions"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--prompt DIR for one"),
        (["--bank", "BANK", "--split", "dev"], "no prompts of split 'dev'"),
        (["--bank", "BANK", "--set", "source_layer"], "NAME=VALUE"),
        (["--bank", "BANK", "--set", "sauce_layer=1"], "Did you mean 'source_layer'"),
    ],
)
def test_verbalize_refuses_before_the_model_loads(arguments, message, bank, tmp_path, capsys, monkeypatch):
    no_model(monkeypatch)
    arguments = [str(bank) if a == "BANK" else a for a in arguments]
    assert cli.main(["verbalize", "--method", "inspect", "--out", str(tmp_path / "t.jsonl"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_verbalize_help_describes_the_settings(capsys):
    with pytest.raises(SystemExit):
        cli.main(["verbalize", "--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in ("source_layer", "distance", "per_frame", "examples:"))


def test_select_end_to_end(bank, tiny, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the page needs the extra [plots]")
    arguments = ["select", "--bank", str(bank), "--out", str(tmp_path / "s"), "--max-new-tokens", "3", "--quiet"]
    assert cli.main([*arguments, "--model", tiny("llama", window=256), "--device", "cpu"]) == 0
    assert "Selected for labels: source layer" in capsys.readouterr().out
    assert json.loads((tmp_path / "s" / "selection.json").read_text())["layers"] == 3
