"""The import graph of the design: down only, the harness in a few rooms, heavy packages where they are needed."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import lm_eval_softverb

PACKAGE = Path(lm_eval_softverb.__file__).resolve().parent
NAME = "lm_eval_softverb"

# From the ground up; a room may import what stands in the rows above its own, and its own files.
FLOORS = [
    {"errors"},
    {"storage", "plugin"},
    {"frame", "checkpoint"},
    {"prompt"},
    {"bank", "chat", "pretrained"},
    {"data", "backbone"},
    {"batching", "decoding", "residual", "endpoints", "fitting"},
    {"metrics"},
    {"tuners", "verbalizers", "analysis"},
    {"models", "generators"},
    {"compare"},
    {"cli"},
    {"autoload", "__main__"},
]
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
SEES_LM_EVAL = {"plugin", "models", "metrics", "compare", "cli", "__main__"}
WITHOUT_TORCH = {
    "__init__",
    "__main__",
    "autoload",
    "plugin",
    "errors",
    "storage",
    "prompt",
    "frame",
    "bank",
    "chat",
    "checkpoint",
    "cli",
}
INSIDE_FUNCTIONS = {"sae_lens", "vllm", "ray", "sentence_transformers", "matplotlib", "openai", "pandas"}


class Import(NamedTuple):
    """One import of a module: what, and whether it runs when the module is imported."""

    name: str
    at_import: bool
    line: int


def imports_of(tree: ast.AST, lazy: bool = False) -> list[Import]:
    found = []
    for node in ast.iter_child_nodes(tree):
        inside = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(node, ast.Import):
            found += [Import(alias.name, not inside, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            base = node.module or ""
            submodules = [a.name for a in node.names if (PACKAGE.parent / base.replace(".", "/") / f"{a.name}.py").exists()]
            folders = [a.name for a in node.names if (PACKAGE.parent / base.replace(".", "/") / a.name).is_dir()]
            names = [f"{base}.{n}" for n in submodules + folders] or [base]
            found += [Import(name, not inside, node.lineno) for name in names]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            found += imports_of(node, True)
        else:
            found += imports_of(node, inside)
    return found


def room_of(module: str) -> str:
    """``lm_eval_softverb.models.scoring`` → ``models``; the package itself → ``__init__``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


MODULES = {
    ".".join((NAME, *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): imports_of(
        ast.parse(path.read_text("utf-8"))
    )
    for path in sorted(PACKAGE.rglob("*.py"))
}


def our_own(name: str) -> bool:
    return name == NAME or name.startswith(NAME + ".")


def violations(modules: dict[str, list[Import]]) -> list[str]:
    """Imports that go up or sideways."""
    found = []
    for module, imports in modules.items():
        room = room_of(module)
        if room == "__init__":
            continue
        for name, _, line in imports:
            other = room_of(name)
            if not our_own(name) or other in ("__init__", room) or room == "autoload":
                continue
            if FLOOR[other] >= FLOOR[room]:
                found.append(f"{module}:{line} imports {name}")
    return found


def test_every_module_has_its_floor():
    assert {room_of(m) for m in MODULES} - {"__init__"} <= set(FLOOR)


def test_imports_go_down_only():
    assert violations(MODULES) == []


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from lm_eval_softverb.models import scoring", "lm_eval_softverb.tuners.new"),
        ("def f():\n    import lm_eval_softverb.cli", "lm_eval_softverb.models.new"),
        ("from lm_eval_softverb.backbone import Backbone", "lm_eval_softverb.prompt"),
        ("from lm_eval_softverb import backbone", "lm_eval_softverb.storage"),
        ("if TYPE_CHECKING:\n    from lm_eval_softverb.tuners import soft", "lm_eval_softverb.verbalizers.new"),
    ],
)
def test_positive_control_an_import_upwards_is_found(source, module):
    assert len(violations({module: imports_of(ast.parse(source))})) == 1


def test_no_module_imports_itself_through_others():
    """Without what is imported inside functions, the modules stand in one order."""
    graph = {m: {i.name for i in imports if i.at_import and i.name in MODULES} - {NAME} for m, imports in MODULES.items()}
    while graph:
        free = {m for m, needs in graph.items() if not needs & set(graph)}
        assert free, f"these import each other: {sorted(graph)}"
        graph = {m: needs for m, needs in graph.items() if m not in free}


def test_the_harness_is_imported_in_a_few_rooms_only():
    rooms = {room_of(m) for m, imports in MODULES.items() for i in imports if i.name.split(".")[0] == "lm_eval"}
    assert rooms <= SEES_LM_EVAL
    assert {"plugin", "models"} <= rooms


def test_one_file_at_most_talks_to_the_openai_package():
    assert sum(any(i.name.split(".")[0] == "openai" for i in imports) for imports in MODULES.values()) <= 1


def test_packages_that_not_everybody_has_are_imported_where_they_are_used():
    found = [
        f"{m}:{i.line}"
        for m, imports in MODULES.items()
        for i in imports
        if i.at_import and i.name.split(".")[0] in INSIDE_FUNCTIONS
    ]
    assert found == []


def test_the_light_modules_do_not_import_torch():
    heavy = {"torch", "transformers", "lm_eval", "datasets", "peft"}
    found = [
        f"{m}:{i.line} imports {i.name}"
        for m, imports in MODULES.items()
        for i in imports
        if i.at_import and room_of(m) in WITHOUT_TORCH and i.name.split(".")[0] in heavy
    ]
    assert found == []


def test_the_light_modules_stay_light_when_they_run():
    """Also through what they import: the parser of the command line and the artifact's module come up without torch."""
    light = [f"{NAME}.{m}" for m in sorted(WITHOUT_TORCH - {"__init__", "__main__", "chat"})]
    source = f"import json, sys\nimport {', '.join(light)}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True, cwd=PACKAGE.parent, timeout=60
    )
    assert not {"torch", "transformers", "lm_eval", "numpy"} & set(json.loads(done.stdout))
