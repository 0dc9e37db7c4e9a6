"""The start-up shim: lets a bare ``lm_eval --model softprompt`` find us on lm_eval 0.4.13, which discovers no plugins.

``lm_eval_softverb.pth`` (``.start`` from Python 3.15 on, PEP 829) calls :func:`install` in every interpreter of the
environment. It puts one finder on ``sys.meta_path`` that answers for two module names only, lets the real loader run,
and then hands over to :mod:`lm_eval_softverb.plugin`. No import is ever prevented: if we fail, one line goes to stderr
and lm_eval goes on without us. ``SOFTVERB_AUTOLOAD=0`` switches it off.

Only built-in modules are imported here, since every interpreter of the environment pays for them.
"""

from __future__ import annotations

import os
import sys
from _thread import get_ident

TYPE_CHECKING = False  # typing itself would cost more than all the rest of this file
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

SWITCH = "SOFTVERB_AUTOLOAD"

AFTER_IMPORT = {"lm_eval.models": "add_models", "lm_eval.tasks.manager": "add_tasks"}
"""Module of lm_eval → function of :mod:`lm_eval_softverb.plugin` to call once that module is complete."""

_complained = False


def install() -> None:
    """Put the finder in front of ``sys.meta_path``, once; do nothing when ``SOFTVERB_AUTOLOAD=0``."""
    if os.environ.get(SWITCH) == "0" or any(type(finder).__module__ == __name__ for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds the two modules of ``AFTER_IMPORT`` through the other finders, and wraps the loader they return."""

    def __init__(self) -> None:
        self._searching: set[tuple[int, str]] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec any other finder gives for a watched name; None for all other names."""
        search = (get_ident(), fullname)
        if fullname not in AFTER_IMPORT or search in self._searching:  # the latter: another hook asks us back
            return None
        self._searching.add(search)
        try:
            for finder in list(sys.meta_path):
                find = getattr(finder, "find_spec", None)
                spec: ModuleSpec | None = find(fullname, path, target) if find and finder is not self else None
                if spec is not None:
                    if hasattr(spec.loader, "exec_module"):
                        spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
                    return spec
            return None
        finally:
            self._searching.discard(search)


class _Loader:
    """Stands in for a real loader until its module runs; the finished module carries the real one again."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._real.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._real
        if module.__spec__ is not None:
            module.__spec__.loader = self._real
        self._real.exec_module(module)
        _hand_over(module.__name__)


def _hand_over(module: str) -> None:
    """Call the plugin for a module that has just been imported; never raise into somebody else's import."""
    global _complained
    try:
        from lm_eval_softverb import plugin

        getattr(plugin, AFTER_IMPORT[module])()
    except Exception as error:  # noqa: BLE001  (any failure of ours must leave lm_eval usable)
        if _complained or sys.stderr is None:
            return
        _complained = True
        what = " ".join(f"{type(error).__name__}: {error}".split())
        print(
            f"lm_eval_softverb could not add itself to {module} ({what}); lm_eval goes on without it. "
            f"Reinstall lm_eval_softverb, or set {SWITCH}=0 to silence this.",
            file=sys.stderr,
        )
