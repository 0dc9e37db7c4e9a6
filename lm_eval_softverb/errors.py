"""One exception tree. Every message says what is wrong, what was found, what was expected, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class SoftverbError(Exception):
    """Base of every error a user can cause or fix. The command line prints it without a traceback."""


class ArtifactError(SoftverbError):
    """A soft prompt, bank or other file of ours cannot be used as it stands."""


class NonFiniteError(ArtifactError):
    """A tensor holds NaN or infinity; it would score a plausible but meaningless number."""


class BaseModelMismatch(ArtifactError):
    """The artifact was made on another frozen model or tokenizer than the one in use."""


class FrameError(SoftverbError):
    """A frame cannot be rendered for this tokenizer, chat template or text."""


class DataError(SoftverbError):
    """Rows that cannot be read; the message carries ``file:line`` where there is one."""


class ConfigError(SoftverbError):
    """Settings that contradict each other or are out of range."""


class OutputError(SoftverbError):
    """A result cannot be written (read-only folder, full disk). The old file is intact."""


class ModelUnavailable(SoftverbError):
    """A model or dataset is neither on disk nor reachable; the message says how to fetch it beforehand."""


class MissingExtra(SoftverbError):
    """An optional dependency is absent or too old; the message carries the pip command."""


class BackendError(SoftverbError):
    """A chat model cannot be used: key, quota, unknown model, or nothing but failures. ``replies``: what came before."""

    def __init__(self, message: str, replies: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.replies = tuple(replies)


class PlanOnly(SoftverbError):
    """A plan was asked for instead of a run; ``plan`` says what would be sent at most. Nothing was sent."""

    def __init__(self, message: str, plan: Any) -> None:
        super().__init__(message)
        self.plan = plan


class BudgetExceeded(SoftverbError):
    """Going on might cost more than allowed; nothing of the refused step was sent."""


def did_you_mean(name: str, options: list[str]) -> str:
    """A sentence that lists close matches of ``name`` among ``options``, or all of them when none is close."""
    import difflib

    close = difflib.get_close_matches(name, options, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(repr(c) for c in close)}?"
    return f"Known names: {', '.join(sorted(options))}."
