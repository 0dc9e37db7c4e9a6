"""Every command of the README and of the example for CI exists, with arguments that parse and tasks that are there."""

from __future__ import annotations

import re
import shlex

import pytest
import yaml
from toys import ROOT

from lm_eval_softverb import cli
from lm_eval_softverb.data import benchmarks, labelsets


def commands() -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    steps = yaml.safe_load((ROOT / "examples" / "github-actions.yml").read_text())["jobs"]["gate"]["steps"]
    lines += [line for step in steps for line in step.get("run", "").splitlines() if not line.startswith("python ")]
    return [line.split("   #")[0].strip() for line in lines if line.strip()]


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("make ")])
def test_make_targets_exist(command):
    assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(), flags=re.M)


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("softverb ")])
def test_softverb_commands_parse(command):
    arguments = cli.parser().parse_args(shlex.split(command)[1:])
    data = getattr(arguments, "data", None)
    assert data is None or data in (*benchmarks.BENCHMARKS, *labelsets.names(), "rows.jsonl", "arc_easy")


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("lm_eval ")])
def test_lm_eval_commands_parse(command, monkeypatch):
    from lm_eval._cli.harness import HarnessCLI
    from lm_eval.tasks import TaskManager

    from lm_eval_softverb.plugin import task_dir

    monkeypatch.setattr("sys.argv", shlex.split(command))
    arguments = HarnessCLI().parse_args()
    known = TaskManager(include_path=str(task_dir()), include_defaults=False).all_tasks
    tasks = arguments.tasks if isinstance(arguments.tasks, str) else ",".join(arguments.tasks)
    assert set(tasks.split(",")) <= set(known)


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("transformers serve ")])
def test_options_of_the_server_exist(command):
    import inspect

    from transformers.cli.serve import Serve

    given = re.findall(r" --([a-z-]+)", command)
    assert {name.replace("-", "_") for name in given} <= set(inspect.signature(Serve.__init__).parameters)


def test_there_is_something_to_check():
    assert {c.split()[0] for c in commands()} >= {"make", "softverb", "lm_eval", "transformers"}


def test_ci_runs_the_test_command():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
