"""Checkpoints that survive a kill at any moment, and signals that ask for one."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from lm_eval_softverb import storage
from lm_eval_softverb.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

_KEEP = 2


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Writes one checkpoint as a single atomic file and removes all but the last two."""
    storage.write_tensors(folder / f"step-{step:08d}.safetensors", tensors, {"state": json.dumps(state)})
    for old in sorted(folder.glob("step-*.safetensors"))[:-_KEEP]:
        old.unlink(missing_ok=True)


def load(folder: Path, expected: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest readable checkpoint of the run ``expected`` (a hash of model, rows and settings); None if there is none.

    Raises:
        ArtifactError: the checkpoints belong to another run.
    """
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("step-*.safetensors"), reverse=True):
        try:
            with safe_open(str(path), framework="pt") as f:
                state = json.loads((f.metadata() or {})["state"])
                tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118  (not a dict)
        except (SafetensorError, OSError, KeyError, ValueError):
            continue  # damaged from outside; the one before it is still there
        if state.get("run") != expected:
            raise ArtifactError(
                f"{folder} holds a checkpoint of another run (other rows, settings or base model). Continue with the "
                "settings it was started with, choose another --out, or pass --overwrite to start again."
            )
        return tensors, state
    return None


class Interrupted(BaseException):
    """Training stopped by a signal after its checkpoint was written; not an error of the program."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


@dataclass
class StopRequest:
    """Set to the signal's number once one has arrived."""

    number: int | None = None


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turns SIGTERM and SIGINT into a request that the loop honours after the current step."""
    request = StopRequest()

    def handle(number: int, _frame: FrameType | None) -> None:
        request.number = number

    try:
        before = {n: signal.signal(n, handle) for n in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread: the caller's business
        yield request
        return
    try:
        yield request
    finally:
        for n, old in before.items():
            signal.signal(n, old)
