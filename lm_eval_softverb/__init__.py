"""Make soft prompts readable, and score them with lm-evaluation-harness.

Names below load on first use: the start-up shim imports this package in every interpreter of the
environment, so importing it must stay free of torch, transformers and lm_eval.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing itself would cost more than the rest of this file, in every interpreter start
if TYPE_CHECKING:
    from typing import Any

    from lm_eval_softverb.backbone import Backbone
    from lm_eval_softverb.errors import SoftverbError
    from lm_eval_softverb.frame import Frame
    from lm_eval_softverb.prompt import Fingerprint, SoftPrompt

__version__ = "0.1.0"

_HOME = {
    "SoftPrompt": "prompt",
    "Fingerprint": "prompt",
    "Frame": "frame",
    "Backbone": "backbone",
    "SoftverbError": "errors",
}

__all__ = ["Backbone", "Fingerprint", "Frame", "SoftPrompt", "SoftverbError", "__version__"]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
