"""The ``softverb`` command: ``parser`` has the arguments, ``commands`` what they do."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from lm_eval_softverb.checkpoint import Interrupted
from lm_eval_softverb.cli.parser import parser
from lm_eval_softverb.errors import ConfigError, FrameError, MissingExtra, SoftverbError

OLDEST_LM_EVAL = (0, 4, 13)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status (0 done, 1 failed, 2 wrong use, 128 + n stopped by signal n)."""
    arguments = parser().parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        require_lm_eval()
        return int(arguments.run(arguments) or 0)
    except (ConfigError, FrameError, MissingExtra) as error:
        print(f"softverb: {error}", file=sys.stderr)
        return 2
    except SoftverbError as error:
        print(f"softverb: {error}", file=sys.stderr)
        return 1
    except Interrupted as stop:
        print(f"softverb: {stop}; run the same command again to go on.", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("softverb: interrupted; run the same command again to go on.", file=sys.stderr)
        return 130


def require_lm_eval() -> None:
    """Refuses a missing or too old harness before any work is done.

    Raises:
        MissingExtra: with the pip command.
    """
    from importlib.metadata import PackageNotFoundError, version

    wanted = ".".join(map(str, OLDEST_LM_EVAL))
    try:
        found = version("lm_eval")
    except PackageNotFoundError as error:
        raise MissingExtra(f"lm_eval is not installed: pip install 'lm_eval>={wanted},<0.5'.") from error
    numbers = tuple(int(part) for part in found.split(".")[:3] if part.isdigit())
    if numbers < OLDEST_LM_EVAL:
        raise MissingExtra(f"lm_eval {found} is too old, at least {wanted} is needed: pip install 'lm_eval>={wanted},<0.5'.")
