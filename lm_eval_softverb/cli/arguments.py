"""What the argument parsers of all commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

Run = Callable[[argparse.Namespace], int]


def command(subparsers: Any, name: str, run: Run, about: str, examples: str) -> argparse.ArgumentParser:
    """Adds one command with its examples; ``run`` gets the parsed arguments and returns the exit status."""
    p: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=about,
        description=about,
        epilog=f"examples:{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.set_defaults(run=run)
    return p


def model_arguments(p: argparse.ArgumentParser, dtype: bool = True) -> None:
    """Which model, where, and how loud."""
    p.add_argument("--model", default="smollm2-135m", help="hub id, folder, or packaged name (default: %(default)s)")
    p.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda where available)")
    p.add_argument("--quiet", action="store_true", help="no progress bars")
    if dtype:
        p.add_argument("--dtype", default="auto", help="dtype of the frozen model (default: the checkpoint's)")
