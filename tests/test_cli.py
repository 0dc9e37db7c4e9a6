"""The command line: what it refuses before work begins, and one training run end to end."""

from __future__ import annotations

import json

import pytest

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
