"""The ``softverb`` command. Each subcommand is one function; nothing heavy is imported before it is needed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lm_eval_softverb import __version__
from lm_eval_softverb.errors import ConfigError, FrameError, MissingExtra, SoftverbError
from lm_eval_softverb.tuners.checkpoint import Interrupted

OLDEST_LM_EVAL = (0, 4, 13)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status (0 done, 1 failed, 2 wrong use, 128 + n stopped by signal n)."""
    arguments = _parser().parse_args(argv)
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


# Options of `softverb train` that are settings of the tuner under the same name.
_PLAIN_SETTINGS = (
    "init_text",
    "init_scale",
    "epochs",
    "patience",
    "min_delta",
    "batch_size",
    "schedule",
    "warmup",
    "weight_decay",
    "max_grad_norm",
    "validation",
    "max_length",
    "seed",
)

# --- subcommands -----------------------------------------------------------------------------------------------------


def _train(a: argparse.Namespace) -> int:
    from lm_eval_softverb import storage
    from lm_eval_softverb.frame import SLOT, Frame
    from lm_eval_softverb.tuners.config import config

    text = a.frame or SLOT
    placement: Any = a.placement or ("user_end" if a.frame else "prefix")
    settings = config(
        a.preset,
        tokens=a.tokens,
        frame=Frame(placement=placement, text=text),
        chat=a.chat or None,
        init=a.init or ("text" if a.init_text else None),
        learning_rate=a.lr,
        eos=False if a.no_eos else None,
        **{name: getattr(a, name) for name in _PLAIN_SETTINGS},
    )
    storage.require_writable(a.out)

    from lm_eval_softverb.backbone import Backbone
    from lm_eval_softverb.models.harness import find_rows
    from lm_eval_softverb.tuners.soft import train_soft_prompt

    rows, info = find_rows(a.data, max_rows=a.max_rows, seed=settings.seed)
    prompt = train_soft_prompt(
        Backbone.load(a.model, dtype=a.dtype, device=a.device),
        rows,
        settings,
        a.out,
        info={**info, "preset": a.preset},
        checkpoint_seconds=a.checkpoint_seconds,
        overwrite=a.overwrite,
        progress=not a.quiet,
    )
    print(f"{prompt.id}: {prompt.n} virtual tokens, validation loss {prompt.info['best_validation_loss']:.4f} in {a.out}")
    print(f"Score it: lm_eval --model softprompt --model_args pretrained={a.model},peft={a.out} --tasks …")
    return 0


def _quickstart(a: argparse.Namespace) -> int:
    from lm_eval_softverb.compare.quickstart import quickstart

    quickstart(a.out, labelset=a.labelset, pretrained=a.model, device=a.device, progress=not a.quiet)
    return 0


def _model(a: argparse.Namespace) -> int:
    from lm_eval_softverb.pretrained import locate

    print(locate(a.name))
    return 0


def _doctor(_a: argparse.Namespace) -> int:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from lm_eval_softverb.data.benchmarks import DATA_DIR
    from lm_eval_softverb.plugin import MODELS, task_dir
    from lm_eval_softverb.pretrained import PACKAGED, cache_dir

    print(f"lm_eval_softverb {__version__}, Python {platform.python_version()}")
    for package in ("lm_eval", "torch", "transformers", "peft", "accelerate", "safetensors", "gguf", "matplotlib"):
        try:
            print(f"  {package:14}{version(package)}")
        except PackageNotFoundError:
            print(f"  {package:14}not installed")
    hook = any(type(f).__module__ == "lm_eval_softverb.autoload" for f in sys.meta_path)
    print(f"models registered: {', '.join(MODELS)}; tasks in {task_dir()}")
    print(f"start-up hook: {'on' if hook else 'off (use python -m lm_eval_softverb instead of lm_eval)'}")
    print(f"data folder ({DATA_DIR}): {os.environ.get(DATA_DIR) or 'not set, benchmarks come from the hub'}")
    for name, packaged in PACKAGED.items():
        ready = (cache_dir() / "models" / packaged.folder / "DONE").exists()
        print(f"packaged model {name}: {'ready' if ready else 'is fetched on first use'}")
    return 0


# --- arguments -------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="softverb", description="Train soft prompts, score them with lm-evaluation-harness, and read them."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    p = _command(
        commands,
        "quickstart",
        _quickstart,
        "Train one soft prompt on shipped data and score it against no prompt and few-shot.",
        """
  softverb quickstart --out quickstart-out
  softverb quickstart --out out --labelset weather
""",
    )
    p.add_argument("--out", type=Path, required=True, help="folder for the prompt, report.csv, report.html and lm_eval/")
    p.add_argument("--labelset", default="emotion", help="one of the shipped label sets (default: %(default)s)")
    _model_arguments(p)

    p = _command(
        commands,
        "train",
        _train,
        "Train one soft prompt on a frozen model.",
        """
  softverb train --data sst2 --max-rows 4000 --epochs 3 --out prompts/sst2
  softverb train --data rows.jsonl --out prompts/mine --preset paper
  softverb train --data arc_easy --model org/model --out prompts/arc
  softverb train --data emotion --frame 'Please §.' --chat --tokens 4 --out prompts/framed

Run the same command again after an interruption: training goes on from its last checkpoint.
""",
    )
    p.add_argument("--data", required=True, help="dataset name, harness task, or .jsonl/.csv with columns input, output")
    p.add_argument("--out", type=Path, required=True, help="folder of the prompt (a PEFT adapter and softprompt.json)")
    p.add_argument("--preset", default="fixed", help="fixed (default), paper, or paper-general")
    p.add_argument("--max-rows", type=int, help="use at most this many training rows, drawn at random")
    p.add_argument("--tokens", type=int, help="virtual tokens (default: 20)")
    p.add_argument("--placement", help="prefix (default), after_bos, user_start or user_end")
    p.add_argument("--frame", help="text around the slot inside the user turn, e.g. 'Please §.'")
    p.add_argument("--chat", action="store_true", help="render rows with the chat template; score with --apply_chat_template")
    p.add_argument("--init", help="vocab (default), normal or text")
    p.add_argument("--init-text", help="text whose embeddings the prompt starts from")
    p.add_argument("--init-scale", type=float, help="standard deviation of --init normal")
    p.add_argument("--epochs", type=int, help="most passes over the rows")
    p.add_argument("--patience", type=int, help="epochs without improvement before stopping; 0 never stops early")
    p.add_argument("--min-delta", type=float, help="smallest improvement of the validation loss that counts")
    p.add_argument("--batch-size", type=int, help="rows per optimiser step")
    p.add_argument("--lr", type=float, help="peak learning rate")
    p.add_argument("--schedule", help="linear (default), cosine or constant")
    p.add_argument("--warmup", type=float, help="share of the steps with a rising learning rate")
    p.add_argument("--weight-decay", type=float, help="AdamW's weight decay of the prompt's rows")
    p.add_argument("--max-grad-norm", type=float, help="gradient clipping; 0 does not clip")
    p.add_argument("--no-eos", action="store_true", help="do not end targets with EOS")
    p.add_argument("--validation", type=float, help="share of the rows that chooses the best epoch")
    p.add_argument("--max-length", type=int, help="longest row in tokens; inputs are cut on the left, targets never")
    p.add_argument("--seed", type=int, help="of initial rows, split and order (default: 0)")
    p.add_argument("--dtype", default="auto", help="dtype of the frozen model (default: the checkpoint's)")
    p.add_argument("--checkpoint-seconds", type=float, default=30.0, help=argparse.SUPPRESS)
    p.add_argument("--overwrite", action="store_true", help="discard a prompt or checkpoint of another run in --out")
    _model_arguments(p)

    p = _command(
        commands,
        "model",
        _model,
        "Print the folder of a packaged model, fetching it on first use.",
        """
  lm_eval --model hf --model_args pretrained=$(softverb model smollm2-135m),peft=DIR --tasks softverb_sst2_mc
""",
    )
    p.add_argument("name", nargs="?", default="smollm2-135m")

    _command(
        commands,
        "doctor",
        _doctor,
        "Show versions, the start-up hook, data and model folders.",
        "\n  softverb doctor\n",
    )
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], about: str, examples: str
) -> argparse.ArgumentParser:
    p: argparse.ArgumentParser = commands.add_parser(
        name,
        help=about,
        description=about,
        epilog=f"examples:{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.set_defaults(run=run)
    return p


def _model_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", default="smollm2-135m", help="hub id, folder, or packaged name (default: %(default)s)")
    p.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda where available)")
    p.add_argument("--quiet", action="store_true", help="no progress bars")


if __name__ == "__main__":
    raise SystemExit(main())
