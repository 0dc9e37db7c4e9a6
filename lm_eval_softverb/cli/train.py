"""``softverb train`` and ``bank``: soft prompts, one or many."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_softverb.cli.arguments import command, model_arguments
from lm_eval_softverb.errors import ConfigError

if TYPE_CHECKING:
    from lm_eval_softverb.tuners.config import SoftConfig

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


def add_arguments(group: Any) -> None:
    p = command(
        group,
        "train",
        train,
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
    p.add_argument("--max-rows", type=int, help="use at most this many training rows, drawn at random")
    tuner_arguments(p)
    p.add_argument("--checkpoint-seconds", type=float, default=30.0, help=argparse.SUPPRESS)
    p.add_argument("--overwrite", action="store_true", help="discard a prompt or checkpoint of another run in --out")
    model_arguments(p)

    p = command(
        group,
        "bank",
        bank,
        "Train one soft prompt for every task of a dataset of datasets, side by side on one frozen model.",
        """
  softverb bank --dod classification:labels.sqlite --out banks/labels
  softverb bank --dod general:natural-instructions --out banks/general --preset paper-general --no-texts
  softverb bank --dod general --most-train 60 --most-test 30 --out banks/small
  softverb bank --dod general --out /shared/bank --shard 3/16          # on each of 16 machines

Run the same command again after an interruption: finished prompts are kept, the others go on from their last checkpoint.
Whoever finishes the last prompt writes the bank; until then prompts lie in <out>.work.
""",
    )
    p.add_argument(
        "--dod", required=True, help="general, general:PATH, classification (the shipped sets), classification:FILE, or a path"
    )
    p.add_argument("--out", type=Path, required=True, help="folder of the bank")
    p.add_argument("--tasks", help="only these, separated by commas")
    p.add_argument("--exclude", help="all but these, separated by commas")
    p.add_argument("--most-train", type=int, help="at most this many tasks of the DoD's training split")
    p.add_argument("--most-test", type=int, help="at most this many of its test split")
    p.add_argument("--most-rows", type=int, help="general: at most this many rows per task")
    p.add_argument("--most-row-tokens", type=int, help="general: leave out longer rows")
    p.add_argument("--heldout-rows", type=int, default=100, help="held-out rows to score a prompt on (default: %(default)s)")
    p.add_argument("--width", type=int, default=32, help="prompts to train at a time (default: %(default)s)")
    p.add_argument("--tokens-per-pass", type=int, help="of one forward and backward pass (default: by device)")
    p.add_argument("--shard", default="1/1", help="i/n: the i-th of n parts of the tasks (default: %(default)s)")
    p.add_argument("--no-texts", action="store_true", help="hashes instead of labels and instructions in the manifest")
    tuner_arguments(p)
    p.add_argument("--checkpoint-seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    p.add_argument("--overwrite", action="store_true", help="discard prompts and checkpoints of another run")
    model_arguments(p)


def tuner_arguments(p: argparse.ArgumentParser) -> None:
    """The settings of :class:`~lm_eval_softverb.tuners.config.SoftConfig`."""
    p.add_argument("--preset", default="fixed", help="fixed (default), paper, or paper-general")
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


def tuner_config(a: argparse.Namespace) -> SoftConfig:
    from lm_eval_softverb.frame import SLOT, Frame
    from lm_eval_softverb.tuners.config import config

    text = a.frame or SLOT
    placement: Any = a.placement or ("user_end" if a.frame else "prefix")
    return config(
        a.preset,
        tokens=a.tokens,
        frame=Frame(placement=placement, text=text),
        chat=a.chat or None,
        init=a.init or ("text" if a.init_text else None),
        learning_rate=a.lr,
        eos=False if a.no_eos else None,
        **{name: getattr(a, name) for name in _PLAIN_SETTINGS},
    )


def train(a: argparse.Namespace) -> int:
    from lm_eval_softverb import storage

    settings = tuner_config(a)
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


def bank(a: argparse.Namespace) -> int:
    from lm_eval_softverb import storage

    settings, shard = tuner_config(a), _shard(a.shard)
    storage.require_writable(a.out)

    from lm_eval_softverb.backbone import Backbone
    from lm_eval_softverb.tuners.bank import train_bank, unfinished

    dod = _open(a)
    tasks = _tasks(a, dod)
    test = set(dod.names("test"))
    left = len(unfinished(a.out, tasks))
    print(f"{len(tasks)} tasks, {sum(t in test for t in tasks)} of them for testing; {left} prompts left to train")
    made = train_bank(
        Backbone.load(a.model, dtype=a.dtype, device=a.device),
        dod,
        settings,
        a.out,
        tasks=tasks,
        width=a.width,
        shard=shard,
        heldout_rows=a.heldout_rows,
        texts=not a.no_texts,
        max_tokens=a.tokens_per_pass,
        checkpoint_seconds=a.checkpoint_seconds,
        overwrite=a.overwrite,
        progress=not a.quiet,
    )
    if made is None:
        print(f"This shard is finished; {len(unfinished(a.out, tasks))} prompts of other shards are not.")
        return 0
    scores = [e["heldout"] for e in made.entries if e["heldout"]["rows"]]
    for name in ("accuracy", "rouge_l"):
        mean = sum(s[name] for s in scores) / max(1, len(scores))
        print(f"held-out {name}, mean over {len(scores)} prompts: {mean:.3f}")
    print(f"Bank of {len(made.prompts)} soft prompts in {a.out}")
    print(f"Score it: lm_eval --model softprompt --model_args pretrained={a.model},bank={a.out} --tasks dod_{dod.kind}")
    return 0


def _open(a: argparse.Namespace) -> Any:
    from lm_eval_softverb.metrics.dod import open_with

    caps = {"max_rows": a.most_rows, "max_tokens": a.most_row_tokens}
    return open_with(a.dod, {name: value for name, value in caps.items() if value is not None})


def _tasks(a: argparse.Namespace, dod: Any) -> list[str]:
    """The names asked for, in the DoD's order."""
    names: list[str] = dod.names()
    wanted, without = (set(text.split(",")) if text else set() for text in (a.tasks, a.exclude))
    if unknown := (wanted | without) - set(names):
        raise ConfigError(
            f"The DoD {a.dod} has no task {sorted(unknown)[0]!r}; `softverb dod list {a.dod}` shows those it has."
        )
    chosen = [n for n in names if (not wanted or n in wanted) and n not in without]
    for split, most in (("train", a.most_train), ("test", a.most_test)):
        if most is not None:
            surplus = set([n for n in dod.names(split) if n in set(chosen)][most:])
            chosen = [n for n in chosen if n not in surplus]
    return chosen


def _shard(text: str) -> tuple[int, int]:
    first, slash, last = text.partition("/")
    if not slash or not first.isdigit() or not last.isdigit():
        raise ConfigError(f"--shard is {text!r}, expected i/n, for example 3/16.")
    return int(first), int(last)
