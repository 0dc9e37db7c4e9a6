"""Model arguments reach logs and results, so no key may travel in them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from lm_eval_softverb.errors import ConfigError

_NAME = re.compile(r"(^|_)(api_?key|key|secret|password|passwd|token|bearer|credentials?|authorization)$", re.IGNORECASE)
_VALUE = re.compile(r"\b(sk-|hf_|Bearer )[A-Za-z0-9_\-]{8,}|://[^/@\s]+@")
_HARMLESS = frozenset({"think_end_token", "add_bos_token"})  # of HFLM
_KEYS = ("OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def refuse_secrets(arguments: Mapping[str, Any]) -> None:
    """Looks at names, at what keys look like, and for the keys of the environment themselves.

    Raises:
        ConfigError: an argument that looks like a secret; its value is not repeated.
    """
    keys = [key for name in _KEYS if (key := os.environ.get(name, ""))]
    for name, value in arguments.items():
        text = value if isinstance(value, str) else ""
        named = _NAME.search(name) and name not in _HARMLESS and value not in (None, False)
        if named or _VALUE.search(text) or any(key in text for key in keys):
            raise ConfigError(
                f"Model argument {name!r} looks like a secret; arguments are written to logs and results. Its value is not "
                "repeated here. Set OPENAI_API_KEY (or HF_TOKEN) in the environment and leave the argument out."
            )
