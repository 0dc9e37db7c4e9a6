"""``softverb verbalize`` and ``select``: soft prompts as text."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lm_eval_softverb.cli.arguments import command, model_arguments
from lm_eval_softverb.errors import ConfigError
from lm_eval_softverb.verbalizers import CONTROLS, KINDS, MAX_NEW_TOKENS, METHODS


def add_arguments(group: Any) -> None:
    p = command(
        group,
        "verbalize",
        verbalize,
        "Turn soft prompts into text: nearest tokens, InSPEcT, self-verbalization, translator.",
        """
  softverb verbalize --method nearest --prompt prompts/emotion --out texts.jsonl
  softverb verbalize --method inspect --bank banks/mine --out inspect.jsonl --set source_layer=20 --set target_layer=1
  softverb verbalize --method inspect --bank banks/mine --out tuned.jsonl --set selection=selection/selection.json
  softverb verbalize --method selfverb --bank banks/framed --out self.jsonl --set 'frames=Please §.|Be §.' --set per_frame=true
  softverb verbalize --method selfverb --bank banks/framed --out many.jsonl --set samples=20 --control random
  softverb verbalize --method translator --bank banks/mine --out best.jsonl --set adapter=translators/labels \\
      --set samples=20 --rerank inputs.jsonl

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
    p.add_argument("--rerank", type=Path, metavar="FILE", help="JSONL of unlabelled inputs by prompt to choose the text on")
    p.add_argument("--control-seed", type=int, default=0, help="of these vectors")
    _reading_arguments(p)

    p = command(
        group,
        "select",
        select,
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
    p.add_argument("--dod", help="where the bank's DoD is, if its texts are not in the manifest and it lies elsewhere now")
    p.add_argument("--train-split", default="train", help="prompts to choose on (default: %(default)s)")
    p.add_argument("--test-split", default="test", help="prompts to report on (default: %(default)s)")
    p.add_argument("--most-train", type=int, help="choose on at most this many prompts, the first of the bank")
    p.add_argument("--most-test", type=int, help="report on at most this many")
    p.add_argument("--max-new-tokens", type=int, help="longest text (default: 40 for labels, 100 for instructions)")
    _reading_arguments(p)


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
    p.add_argument("--force", action="store_true", help="read prompts with another base model than they were trained on")
    p.add_argument("--overwrite", action="store_true", help="discard results of another run in --out")
    model_arguments(p)


def verbalize(a: argparse.Namespace) -> int:
    from lm_eval_softverb import storage
    from lm_eval_softverb.bank import Bank
    from lm_eval_softverb.prompt import SoftPrompt

    if (a.prompt is None) == (a.bank is None):
        raise ConfigError("Pass --prompt DIR for one soft prompt or --bank DIR for many.")
    storage.require_writable(a.out.parent)
    settings = _settings(a.settings)
    bank = Bank.load(a.bank) if a.bank else None
    if bank:
        chosen = [i for i, e in enumerate(bank.entries) if a.split in (None, e.get("split"))]
        if not chosen:
            raise ConfigError(f"Bank {a.bank} has no prompts of split {a.split!r}.")
        prompts, entries = [bank.prompts[i] for i in chosen], [bank.entries[i] for i in chosen]
    else:
        prompts = [SoftPrompt.load(a.prompt)]
        entries = [{"prompt_id": prompts[0].id}]

    from lm_eval_softverb.backbone import Backbone
    from lm_eval_softverb.verbalizers.base import check_fits, create, for_bank
    from lm_eval_softverb.verbalizers.texts import verbalize_to

    verbalizer = for_bank(create(a.method, **settings), bank.entries if bank else entries)
    if a.rerank:
        from lm_eval_softverb.verbalizers.rerank import Reranked

        verbalizer = Reranked(verbalizer, str(a.rerank))
    backbone = Backbone.load(a.model, dtype=a.dtype, device=a.device)
    check_fits(verbalizer, prompts, backbone.fingerprint, force=a.force)
    lines = verbalize_to(
        a.out,
        verbalizer,
        backbone,
        prompts,
        entries,
        kind=a.kind,
        max_new_tokens=a.max_new_tokens,
        control=a.control,
        control_seed=a.control_seed,
        batch_size=a.batch_size,
        overwrite=a.overwrite,
        progress=not a.quiet,
    )
    for line in [x for x in lines if x["rank"] == 0][:10]:
        print(f"{line['prompt_id']}: {line['text'][:200]!r}")
    print(f"{len(lines)} texts of {len(prompts)} soft prompts in {a.out}")
    return 0


def select(a: argparse.Namespace) -> int:
    from lm_eval_softverb.bank import Bank
    from lm_eval_softverb.data.verbalization import with_truth

    bank, settings = with_truth(Bank.load(a.bank), a.dod), _settings(a.settings)

    from lm_eval_softverb.backbone import Backbone
    from lm_eval_softverb.compare.selection import select
    from lm_eval_softverb.verbalizers.base import create, for_bank

    inspect: Any = for_bank(create("inspect", **settings), bank.entries)
    backbone = Backbone.load(a.model, dtype=a.dtype, device=a.device)
    for prompt in bank.prompts:
        prompt.check_fits(backbone.fingerprint, force=a.force)
    new = a.max_new_tokens or MAX_NEW_TOKENS[a.kind]
    for name, most in (("--most-train", a.most_train), ("--most-test", a.most_test)):
        if most is not None and most < 1:
            raise ConfigError(f"{name} is {most}, expected at least 1.")
    options = {"train": a.train_split, "test": a.test_split, "most_train": a.most_train, "most_test": a.most_test}
    options |= {"overwrite": a.overwrite, "progress": not a.quiet}
    chosen = select(backbone, bank, a.out, kind=a.kind, inspect=inspect, max_new_tokens=new, **options)
    print((a.out / f"report-{a.kind}.csv").read_text())
    source, target = chosen.pairs[a.kind]
    print(f"Selected for {a.kind}: source layer {source}, target layer {target}, in {a.out / 'selection.json'}")
    print(f"Page: {a.out / f'report-{a.kind}.html'}")
    return 0


def _settings(given: Sequence[str]) -> dict[str, str]:
    """``--set NAME=VALUE`` arguments."""
    pairs = [text.partition("=") for text in given]
    for (name, equals, _), text in zip(pairs, given, strict=True):
        if not name or not equals:
            raise ConfigError(f"--set takes NAME=VALUE, got {text!r}. Example: --set source_layer=20")
    return {name: value for name, _, value in pairs}
