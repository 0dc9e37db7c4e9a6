"""``softverb dod list``, ``audit`` and ``texts``: what is in a DoD, what training has seen of its test tasks, its truth."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lm_eval_softverb.cli.arguments import command
from lm_eval_softverb.errors import ConfigError


def add_arguments(subparsers: Any) -> None:
    """Adds both commands to the subparsers of ``softverb dod``."""
    p = command(
        subparsers,
        "list",
        list_tasks,
        "List a DoD's tasks; for the general one also those that do not pass, and why.",
        """
  softverb dod list general:natural-instructions --tokenizer smollm2-135m --out tasks.csv
  softverb dod list ../shared/data/natural_instructions --out tasks.json

The general DoD keeps tasks of the English default split with 500 instances of at most 400 tokens. Reading a clone takes
minutes; the verdicts are kept in the cache folder.
""",
    )
    _source_arguments(p)
    p.add_argument("--out", type=Path, help="file for all tasks: .csv, or .json with the counts")
    p = command(
        subparsers,
        "audit",
        audit,
        "Look for near-duplicate tasks, rows and corpora in both splits, and benchmark labels in training label sets.",
        """
  softverb dod audit general:natural-instructions --out audit.json
  softverb dod audit classification:labels.sqlite --near 0.6
""",
    )
    _source_arguments(p)
    p.add_argument("--out", type=Path, help="JSON file with all pairs and tasks behind the counts")
    p.add_argument("--near", type=float, help="Jaccard index from which two tasks are near-duplicates (default: 0.7)")
    p = command(
        subparsers,
        "texts",
        texts,
        "Write a text per prompt of a bank for --model hardprompt: what it is for (the upper bound), or a control.",
        """
  softverb dod texts --bank banks/general --out gold.jsonl
  softverb dod texts --bank banks/general --out other.jsonl --other
  softverb dod texts --bank banks/general --out shots.jsonl --shots 5
  softverb dod texts --bank banks/general --out majority.jsonl --majority
  lm_eval --model hardprompt --model_args pretrained=smollm2-135m,prompt_file=gold.jsonl \\
      --metadata '{"bank": "banks/general"}' --tasks dod_general
  lm_eval --model replay --model_args file=majority.jsonl --metadata '{"bank": "banks/general"}' --tasks dod_general

Definitions and rows of others are read from their DoD; do not publish the file. `softverb arms` does all of this at once.
""",
    )
    p.add_argument("--bank", type=Path, required=True, help="folder of soft prompts whose ground truth is known")
    p.add_argument("--out", type=Path, required=True, help="JSONL file, one line per prompt")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--other", action="store_true", help="give each prompt the text of another one of its split instead")
    what.add_argument("--shots", type=int, metavar="K", help="K training rows of the prompt's task as examples instead")
    what.add_argument(
        "--majority", action="store_true", help="the most frequent output of the training rows, as an answer for --model replay"
    )
    p.add_argument("--seed", type=int, default=0, help="--other, --shots: of who gets what (default: %(default)s)")
    p.add_argument("--dod", help="where the bank's DoD is, if its texts are not in the manifest and it lies elsewhere now")


def _source_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("source", help="general, general:PATH, classification:FILE.sqlite, or a path")
    p.add_argument("--tokenizer", help="general: count tokens by the tokenizer of this model (default: as the source counted)")


def _open(a: argparse.Namespace) -> Any:
    from lm_eval_softverb.metrics.dod import open_with

    return open_with(a.source, {"tokenizer": a.tokenizer} if a.tokenizer else {})


def list_tasks(a: argparse.Namespace) -> int:
    from lm_eval_softverb import storage
    from lm_eval_softverb.data.dod.general import PAPER, GeneralDod

    if a.out and a.out.suffix not in (".csv", ".json"):
        raise ConfigError(f"--out is {a.out}, expected a .csv or .json file.")
    if a.out:
        storage.require_writable(a.out.parent)
    dod = _open(a)
    if isinstance(dod, GeneralDod):
        tasks = [asdict(verdict) for verdict in dod.verdicts()]
        counts = {split: dict(Counter(t["reason"] or "pass" for t in tasks if t["split"] == split)) for split in PAPER}
        paper: dict[str, int] = PAPER
    else:
        tasks = [{"name": name, "split": split} for split in PAPER for name in dod.names(split)]
        counts, paper = {split: {"pass": len(dod.names(split))} for split in PAPER}, {}
    for split, found in counts.items():
        passing = f"{found.get('pass', 0)} pass" + (f" (the paper has {paper[split]})" if paper else "")
        others = [f"{n} {reason}" for reason, n in sorted(found.items()) if reason != "pass"]
        print(f"{split}: {', '.join([passing, *others])}")
    if a.out:
        _write(a.out, tasks, {"kind": dod.kind, "sha256": dod.sha256, "counts": counts, "paper": paper})
        print(f"{len(tasks)} tasks in {a.out}")
    return 0


def _write(path: Path, tasks: Sequence[dict[str, Any]], facts: dict[str, Any]) -> None:
    import csv
    import io

    from lm_eval_softverb import storage

    if path.suffix == ".json":
        storage.write_json(path, {**facts, "tasks": tasks})
        return
    out = io.StringIO()
    writer = csv.DictWriter(out, list(tasks[0]) if tasks else ["name", "split"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(tasks)
    storage.write_text(path, out.getvalue())


def audit(a: argparse.Namespace) -> int:
    from lm_eval_softverb import storage
    from lm_eval_softverb.data.dod.audit import NEAR, audit, summary

    near = NEAR if a.near is None else a.near
    if not 0 < near <= 1:
        raise ConfigError(f"--near is {near}, expected a Jaccard index above 0 and up to 1.")
    if a.out:
        storage.require_writable(a.out.parent)
    report = audit(_open(a), near=near)
    print(summary(report))
    if a.out:
        storage.write_json(a.out, report)
        print(f"All pairs in {a.out}")
    return 0


def texts(a: argparse.Namespace) -> int:
    from lm_eval_softverb import storage
    from lm_eval_softverb.bank import Bank
    from lm_eval_softverb.compare import fillings

    storage.require_writable(a.out.parent)
    bank = Bank.load(a.bank)
    if a.shots is not None:
        lines = fillings.shots(bank, a.shots, a.seed, a.dod)
    elif a.majority:
        lines = fillings.majority(bank, a.dod)
    else:
        lines = fillings.other(bank, a.seed, a.dod) if a.other else fillings.gold(bank, a.dod)
    storage.write_jsonl(a.out, lines)
    print(f"Texts of {len(lines)} prompts in {a.out}")
    return 0
