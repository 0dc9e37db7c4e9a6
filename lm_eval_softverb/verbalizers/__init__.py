"""Turning soft prompts into text. One file per method; :mod:`lm_eval_softverb.verbalizers.base` says what a method is.

Adding a method: one file with a frozen dataclass, one line in :data:`METHODS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

Kind = Literal["labels", "instructions"]
"""What a text should say: the label set a prompt chooses from, or the instruction it acts on."""
KINDS: tuple[str, ...] = get_args(Kind)

METHODS = {
    "nearest": "lm_eval_softverb.verbalizers.nearest:Nearest",
    "inspect": "lm_eval_softverb.verbalizers.inspect_grid:Inspect",
    "elicit": "lm_eval_softverb.verbalizers.elicit:Elicit",
    "selfverb": "lm_eval_softverb.verbalizers.selfverb:SelfVerb",
    "translator": "lm_eval_softverb.verbalizers.translator:Translator",
}
CONTROLS = ("none", "random")
MAX_NEW_TOKENS: Mapping[str, int] = {"labels": 40, "instructions": 100}
"""Defaults by kind, the same as in the tasks ``verbalize_labels`` and ``verbalize_instructions``."""
