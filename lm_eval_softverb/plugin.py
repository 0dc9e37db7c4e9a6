"""The only door from lm_eval: what we register there, and where our tasks are.

:func:`register` is called by ``python -m lm_eval_softverb`` and by programs; its two halves are called by the start-up
shim (:mod:`lm_eval_softverb.autoload`) as soon as the module that each one extends has been imported. lm_eval itself is
imported inside the functions only.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
from itertools import chain
from pathlib import Path
from typing import Any

from lm_eval_softverb.errors import ConfigError

MODELS = {
    "softprompt": "lm_eval_softverb.models.softprompt:SoftPromptLM",
    "verbalizer": "lm_eval_softverb.models.verbalizer:VerbalizerLM",
    "inspect": "lm_eval_softverb.models.verbalizer:InspectLM",
    "elicit": "lm_eval_softverb.models.verbalizer:ElicitLM",
    "selfverb": "lm_eval_softverb.models.verbalizer:SelfVerbLM",
    "translator": "lm_eval_softverb.models.verbalizer:TranslatorLM",
    "nearest": "lm_eval_softverb.models.verbalizer:NearestLM",
    "hardprompt": "lm_eval_softverb.models.hardprompt:HardPromptLM",
    "hardprompt-chat": "lm_eval_softverb.models.hardprompt_chat:HardPromptChatLM",
    "replay": "lm_eval_softverb.models.replay:ReplayLM",
}
"""Alias for ``--model`` → the module that defines the class, and the class. pyproject.toml lists the same pairs."""

_MARK = "__softverb__"  # on our TaskManager.__init__; functools.wraps carries it through wrappers that others add

_log = logging.getLogger(__name__)


def register() -> None:
    """Make our models and tasks known to lm_eval in this process. Calling it again changes nothing.

    Raises:
        ConfigError: our task folder is missing, or this lm_eval has no place to add it.
    """
    add_models()
    add_tasks()


def task_dir() -> Path:
    """The folder with our task YAMLs: inside the package in a wheel, beside the package in a checkout.

    Raises:
        ConfigError: neither folder exists.
    """
    package = Path(__file__).resolve().parent
    candidates = [package / "task_configs", package.parent / "task_configs"]
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise ConfigError(
        f"The task folder of lm_eval_softverb is missing: looked for {' and '.join(map(str, candidates))}. "
        "Reinstall the package: pip install --force-reinstall --no-deps lm_eval_softverb"
    )


def add_models() -> None:
    """Register ``MODELS`` where the alias is free: built-in models win. The classes are imported on first use."""
    import lm_eval.models  # noqa: F401  first: lm_eval skips its own models once its registry holds anything
    from lm_eval.api.registry import model_registry

    if _discovered_by_lm_eval("lm_eval.models"):
        return
    taken = dict(model_registry.items())
    for alias, target in MODELS.items():
        if alias not in taken:
            model_registry.register(alias, target=target)
        elif _target(taken[alias]) != target:
            _log.warning("lm_eval already has a model %r (%s); %s is not registered.", alias, taken[alias], target)


def add_tasks() -> None:
    """Let every ``TaskManager()`` with default tasks read our folder too: after lm_eval's, before the user's paths.

    Later paths override earlier ones, so a user's task of the same name still wins over ours.

    Raises:
        ConfigError: our task folder is missing, or ``TaskManager`` no longer takes the arguments we build on.
    """
    from lm_eval.tasks.manager import TaskManager

    original = TaskManager.__init__
    if hasattr(original, _MARK) or _discovered_by_lm_eval("lm_eval.tasks"):
        return
    signature = inspect.signature(original)
    missing = {"include_path", "include_defaults"} - signature.parameters.keys()
    if missing:
        raise ConfigError(
            f"lm_eval's TaskManager takes {', '.join(signature.parameters)}; {', '.join(sorted(missing))} expected. "
            f"Pass our tasks yourself: --include_path {task_dir()}"
        )
    folder = task_dir()

    @functools.wraps(original)
    def init(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments["include_path"]
        if bound.arguments["include_defaults"]:
            bound.arguments["include_path"] = _with_folder(folder, given)
        original(*bound.args, **bound.kwargs)
        args[0].include_path = given

    setattr(init, _MARK, True)
    TaskManager.__init__ = init


def _with_folder(folder: Path, given: Any) -> Any:
    """``folder`` and then the given include path or paths; the latter alone where they hold ``folder`` already."""
    paths = list(given) if isinstance(given, (list, tuple)) else [given] if given else []
    if any(folder.is_relative_to(Path(path).resolve()) for path in paths):
        return given  # reading the folder twice would log an override per task
    return [folder, *paths]


def _target(registered: Any) -> str:
    """``module:name`` of a registry entry: a string as it is, an entry point's value, or the place of a class."""
    if isinstance(registered, str):
        return registered
    return getattr(registered, "value", None) or f"{registered.__module__}:{registered.__name__}"


@functools.lru_cache
def _discovered_by_lm_eval(group: str) -> bool:
    """Whether the installed lm_eval reads the entry points of ``group`` itself, so that we must stay out of the way.

    Releases after 0.4.13 do so for models, and may or may not for tasks; their version does not tell which, their
    source does: it must call ``entry_points(`` and name the group in the same file.
    """
    import lm_eval

    name = re.compile(rf"""["']{re.escape(group)}["']""")
    root = Path(lm_eval.__file__).parent
    sources = (path.read_text("utf-8", "replace") for path in chain(root.glob("*.py"), root.glob("*/*.py")))
    return any("entry_points(" in source and name.search(source) is not None for source in sources)
