"""Every way into lm_eval finds our models and tasks, costs next to nothing, and leaves lm_eval as it was."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest

import lm_eval_softverb
from lm_eval_softverb import autoload, plugin
from lm_eval_softverb.errors import ConfigError

ROOT = Path(lm_eval_softverb.__file__).resolve().parent.parent
HEAVY = {"torch", "transformers", "datasets", "lm_eval", "numpy"}
PROBE = "task: {name}\ndataset_path: json\noutput_type: generate_until\ndoc_to_text: x\ndoc_to_target: y\n"


def environment(**extra):
    return {key: value for key, value in os.environ.items() if key != autoload.SWITCH} | extra


def python(*args, cwd=None, **extra):
    """Run this environment's interpreter, with the start-up hook unless ``extra`` switches it off."""
    command = [sys.executable, *args]
    return subprocess.run(
        command, env=environment(**extra), cwd=cwd, capture_output=True, text=True, encoding="utf-8", timeout=240
    )


def script(source, *flags, **extra):
    """Run a script and return what it printed as JSON on its last line; it must leave stderr empty."""
    done = python(*flags, "-c", textwrap.dedent(source), **extra)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def bare(source):
    """The same without site-packages: nothing but the standard library and this package can be imported."""
    return script(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + textwrap.dedent(source), "-S")


def our_tasks():
    from lm_eval.tasks._index import TaskIndex

    return TaskIndex.build([plugin.task_dir()])


def listed(table):
    """The names in the first column of what ``lm_eval ls tasks`` prints."""
    return {line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")}


# ---------------------------------------------------------------- cost


@pytest.mark.parametrize("module", ["lm_eval_softverb", "lm_eval_softverb.autoload"])
def test_import_is_light(module):
    runs = [
        bare(f"""
            import json, time
            start = time.perf_counter()
            import {module}
            print(json.dumps([time.perf_counter() - start, sorted(sys.modules)]))
        """)
        for _ in range(3)
    ]
    assert min(seconds for seconds, _ in runs) < 0.05
    assert not HEAVY & set(runs[0][1])


def test_interpreter_start_imports_only_the_shim():
    modules = set(script("import json, sys; print(json.dumps(sorted(sys.modules)))"))
    assert {name for name in modules if name.startswith("lm_eval")} == {"lm_eval_softverb", "lm_eval_softverb.autoload"}
    assert not HEAVY & modules


# ---------------------------------------------------------------- the start-up shim


def test_hook_files_are_installed_and_owned_by_the_distribution():
    purelib = Path(sysconfig.get_path("purelib"))
    recorded = {str(path) for path in importlib.metadata.files("lm_eval_softverb") or []}
    for name in ("lm_eval_softverb.pth", "lm_eval_softverb.start"):
        assert (purelib / name).read_text() == (ROOT / "autoload" / name).read_text()
        assert name in recorded, "pip uninstall would leave it behind"


def test_finder_is_first_and_present_once():
    found = script("""
        import json, sys
        from lm_eval_softverb import autoload
        first = type(sys.meta_path[0]).__module__
        autoload.install(); autoload.install()
        print(json.dumps([first, sum(type(f).__module__ == autoload.__name__ for f in sys.meta_path)]))
    """)
    assert found == ["lm_eval_softverb.autoload", 1]


@pytest.mark.parametrize("flag", ["-I", "-E", "-B"])
def test_finder_survives_interpreter_flags(flag):
    assert script("import json, sys; print(json.dumps(type(sys.meta_path[0]).__module__))", flag) == autoload.__name__


def test_environment_variable_switches_it_off():
    found = script(
        """
        import json, sys
        import lm_eval.models
        from lm_eval.api.registry import model_registry
        hooked = any(type(f).__module__ == "lm_eval_softverb.autoload" for f in sys.meta_path)
        print(json.dumps([hooked, dict(model_registry.items()) == lm_eval.models.MODEL_MAPPING]))
        """,
        SOFTVERB_AUTOLOAD="0",
    )
    assert found == [False, True]


def test_silent_without_lm_eval():
    found = bare("""
        import json, importlib, importlib.util
        from lm_eval_softverb import autoload
        autoload.install()
        try:
            importlib.import_module("lm_eval.models")
        except ModuleNotFoundError as error:
            print(json.dumps([error.name, importlib.util.find_spec("lm_eval")]))
    """)
    assert found == ["lm_eval", None]


def test_models_register_on_import_and_builtins_keep_their_place():
    found = script("""
        import json
        import lm_eval.models
        from lm_eval.api.registry import model_registry
        loaders = [type(x).__name__ for x in (lm_eval.models.__loader__, lm_eval.models.__spec__.loader)]
        print(json.dumps([dict(model_registry.items()), lm_eval.models.MODEL_MAPPING, loaders]))
    """)
    registry, builtin, loaders = found
    assert registry == builtin | plugin.MODELS
    assert loaders == ["SourceFileLoader", "SourceFileLoader"], "no trace of the shim in the finished module"


def test_get_model_finds_us_before_anything_imported_the_models():
    found = script("""
        import json
        from lm_eval_softverb import plugin
        plugin.MODELS["softprompt"] = "lm_eval.models.dummy:DummyLM"
        from lm_eval.api.registry import get_model
        print(json.dumps([get_model("softprompt").__name__, get_model("dummy").__name__]))
    """)
    assert found == ["DummyLM", "DummyLM"]


def test_our_failure_is_one_line_and_lm_eval_goes_on(tmp_path):
    for module in ("__init__", "models/__init__", "tasks/__init__", "tasks/manager"):  # an lm_eval we do not know
        path = tmp_path / "lm_eval" / f"{module}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text("done = True\n")
    done = python("-c", "import lm_eval.models as m, lm_eval.tasks.manager as t; print(m.done, t.done)", cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "True True")
    assert len(done.stderr.splitlines()) == 1
    assert "SOFTVERB_AUTOLOAD=0" in done.stderr


def test_reload_pickle_and_spawned_processes():
    found = script("""
        import importlib, json, multiprocessing, pickle, sys
        import lm_eval.models, lm_eval.tasks.manager as manager
        from lm_eval.api.registry import model_registry
        from lm_eval_softverb import plugin
        for _ in range(2):
            importlib.reload(lm_eval.models); importlib.reload(manager)
        plugin.register()
        tasks = manager.TaskManager(include_path=plugin.task_dir(), include_defaults=False)
        copy = pickle.loads(pickle.dumps(tasks))
        depth, init = 0, manager.TaskManager.__init__
        while hasattr(init, "__wrapped__"):
            depth, init = depth + 1, init.__wrapped__
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            child = pool.apply(eval, ("[type(f).__module__ for f in __import__('sys').meta_path]",))
        print(json.dumps([dict(model_registry.items())["softprompt"], depth, copy.all_tasks == tasks.all_tasks,
                          child.count("lm_eval_softverb.autoload")]))
    """)
    assert found == [plugin.MODELS["softprompt"], 1, True, 1]


def test_two_hooks_of_this_kind_do_not_call_each_other_forever(monkeypatch):
    class Neighbour:
        """Another plugin's hook: asks all finders but itself, like ours."""

        def find_spec(self, name, path=None, target=None):
            specs = (f.find_spec(name, path, target) for f in sys.meta_path if f is not self)
            return next((spec for spec in specs if spec), None)

    import lm_eval

    others = [finder for finder in sys.meta_path if type(finder).__module__ != autoload.__name__]
    for finders in ([Neighbour(), autoload._Finder()], [autoload._Finder(), Neighbour()]):
        monkeypatch.setattr(sys, "meta_path", [*finders, *others])
        spec = finders[0].find_spec("lm_eval.models", lm_eval.__path__)
        assert spec is not None and spec.origin.endswith("__init__.py")
        assert finders[0].find_spec("lm_eval.no_such_module", lm_eval.__path__) is None


# ---------------------------------------------------------------- the plugin


def test_entry_points_name_the_same_targets():
    declared = {
        point.name: point.value
        for point in importlib.metadata.entry_points(group="lm_eval.models")
        if point.value.startswith("lm_eval_softverb")
    }
    assert declared == plugin.MODELS
    (tasks,) = importlib.metadata.entry_points(group="lm_eval.tasks", name="lm_eval_softverb")
    assert tasks.load()() == plugin.task_dir()


def test_targets_name_the_module_that_defines_the_class():
    for target in plugin.MODELS.values():
        module, _, name = target.partition(":")
        source = (ROOT / Path(*module.split("."))).with_suffix(".py").read_text(encoding="utf-8")
        assert f"class {name}(" in source


def test_a_taken_alias_stays_and_is_reported(monkeypatch, caplog):
    import lm_eval.models  # noqa: F401
    from lm_eval.api.registry import model_registry

    before = dict(model_registry.items())
    monkeypatch.setitem(plugin.MODELS, "dummy", "lm_eval_softverb.nowhere:Dummy")
    with caplog.at_level(logging.WARNING):
        plugin.add_models()
    assert dict(model_registry.items())["dummy"] == before["dummy"]
    assert "dummy" in caplog.text and "softprompt" not in caplog.text


def test_lm_eval_of_today_discovers_nothing_and_tomorrows_is_left_alone(monkeypatch, tmp_path):
    import lm_eval

    assert not plugin._discovered_by_lm_eval.__wrapped__("lm_eval.models")
    (tmp_path / "api").mkdir()
    (tmp_path / "api" / "registry.py").write_text('for point in md.entry_points(group="lm_eval.models"): ...')
    monkeypatch.setattr(lm_eval, "__file__", str(tmp_path / "__init__.py"))
    assert plugin._discovered_by_lm_eval.__wrapped__("lm_eval.models")
    assert not plugin._discovered_by_lm_eval.__wrapped__("lm_eval.tasks"), "decided per facility"


@pytest.fixture
def manager(monkeypatch, tmp_path):
    """lm_eval.tasks.manager with our wrapper and a default task folder of one task instead of 14,000 files."""
    import lm_eval.tasks.manager as module

    plugin.register()
    (tmp_path / "default").mkdir()
    (tmp_path / "default" / "builtin.yaml").write_text(PROBE.format(name="builtin_probe"))
    monkeypatch.setattr(module, "__file__", str(tmp_path / "default" / "manager.py"))
    return module


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A task folder of ours with one task, in place of the real one."""
    import lm_eval.tasks.manager as module

    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "probe.yaml").write_text(PROBE.format(name="softverb_probe"))
    monkeypatch.setattr(plugin, "task_dir", lambda: ours)
    monkeypatch.setattr(module.TaskManager, "__init__", inspect.unwrap(module.TaskManager.__init__))
    return ours


def test_default_tasks_include_every_task_of_ours(manager):
    names = manager.TaskManager().all_tasks
    assert "builtin_probe" in names
    assert set(our_tasks()) <= set(names)


def test_without_default_tasks_only_the_given_paths_count(manager, tmp_path):
    assert manager.TaskManager(include_path=str(tmp_path / "default"), include_defaults=False).all_tasks == ["builtin_probe"]


@pytest.mark.parametrize("shape", [str, lambda path: path, lambda path: [str(path)], lambda path: (path,)])
def test_the_users_path_is_kept_and_wins(folder, manager, tmp_path, shape):
    user = tmp_path / "user"
    user.mkdir()
    (user / "probe.yaml").write_text(PROBE.format(name="softverb_probe"))
    given = shape(user)
    tasks = manager.TaskManager(None, given)
    assert tasks.include_path == given
    assert tasks.all_tasks == ["builtin_probe", "softverb_probe"]
    assert tasks.task_index["softverb_probe"].yaml_path == user / "probe.yaml"
    assert manager.TaskManager().task_index["softverb_probe"].yaml_path == folder / "probe.yaml"


@pytest.mark.parametrize("given", [".", "..", "../ours"])
def test_a_path_that_holds_our_folder_is_read_once(folder, manager, monkeypatch, caplog, given):
    monkeypatch.chdir(folder)
    with caplog.at_level(logging.WARNING):
        tasks = manager.TaskManager(include_path=given)
    assert "softverb_probe" in tasks.all_tasks
    assert "softverb_probe" not in caplog.text


def test_wrong_arguments_fail_as_before(manager):
    with pytest.raises(TypeError, match="includes"):
        manager.TaskManager(includes="x")


def test_a_task_manager_we_do_not_know_is_left_alone(manager, monkeypatch):
    def init(self, paths):
        """A later signature."""

    monkeypatch.setattr(manager.TaskManager, "__init__", init)
    with pytest.raises(ConfigError, match="include_defaults"):
        plugin.add_tasks()
    assert manager.TaskManager.__init__ is init


def test_missing_task_folder_says_where_it_looked(monkeypatch, tmp_path):
    monkeypatch.setattr(plugin, "__file__", str(tmp_path / "lm_eval_softverb" / "plugin.py"))
    with pytest.raises(ConfigError, match=r"task_configs.*Reinstall"):
        plugin.task_dir()
    inside = tmp_path / "lm_eval_softverb" / "task_configs"
    inside.mkdir(parents=True)
    assert plugin.task_dir() == inside


# ---------------------------------------------------------------- the command lines


def test_register_needs_no_hook():
    found = script(
        """
        import json, logging
        from lm_eval_softverb import plugin
        plugin.register(); plugin.register()
        import lm_eval.models, lm_eval.tasks
        from lm_eval.api.registry import model_registry
        print(json.dumps([dict(model_registry.items()) == lm_eval.models.MODEL_MAPPING | plugin.MODELS,
                          hasattr(lm_eval.tasks.TaskManager.__init__, "__softverb__")]))
        """,
        SOFTVERB_AUTOLOAD="0",
    )
    assert found == [True, True]


@pytest.mark.parametrize("args", [[], ["-h"], ["run", "--help"]])
def test_our_module_shows_the_harness_help(args):
    done = python("-m", "lm_eval_softverb", *args, SOFTVERB_AUTOLOAD="0")
    assert done.returncode == 0, done.stderr
    assert "usage: lm-eval" in done.stdout.lower()


def test_lm_eval_lists_builtin_tasks_and_ours_without_a_clash():
    done = python(shutil.which("lm_eval", path=str(Path(sys.executable).parent)), "ls", "tasks")
    assert done.returncode == 0, done.stderr
    assert {"hellaswag", *our_tasks()} <= listed(done.stdout)
    assert "override" not in done.stderr, "a task or tag of ours has the name of a built-in one"


@pytest.mark.parametrize(
    ("run", "switch"),
    [
        ("run_path({bin!r} + '/lm-eval', run_name='__main__')", "1"),
        ("run_module('lm_eval', run_name='__main__', alter_sys=True)", "1"),
        ("run_module('lm_eval_softverb', run_name='__main__', alter_sys=True)", "0"),
    ],
    ids=["lm-eval", "python -m lm_eval", "python -m lm_eval_softverb"],
)
def test_every_command_line_lists_our_tasks(run, switch, tmp_path):
    (tmp_path / "probe.yaml").write_text(PROBE.format(name="user_probe"))
    skip_builtin_tasks = f"""
        import pathlib, runpy, sys
        import lm_eval.tasks._index as index
        files = index.TaskIndex._iter_yaml_files
        builtin = pathlib.Path(index.__file__).parent
        index.TaskIndex._iter_yaml_files = staticmethod(lambda root: [] if root == builtin else files(root))
        sys.argv = ["lm_eval", "ls", "tasks", "--include_path", {str(tmp_path)!r}]
        runpy.{run.format(bin=str(Path(sys.executable).parent))}
    """
    done = python("-c", textwrap.dedent(skip_builtin_tasks), SOFTVERB_AUTOLOAD=switch)
    assert done.returncode == 0, done.stderr
    assert {"user_probe", *our_tasks()} <= listed(done.stdout)
