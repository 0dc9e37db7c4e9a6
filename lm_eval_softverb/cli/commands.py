"""What each subcommand does. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from lm_eval_softverb import __version__
from lm_eval_softverb.errors import ConfigError
from lm_eval_softverb.verbalizers import MAX_NEW_TOKENS

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


def train(a: argparse.Namespace) -> int:
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


def quickstart(a: argparse.Namespace) -> int:
    from lm_eval_softverb.compare.quickstart import quickstart

    quickstart(a.out, labelset=a.labelset, pretrained=a.model, device=a.device, progress=not a.quiet)
    return 0


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
    from lm_eval_softverb.verbalizers.base import create, for_bank
    from lm_eval_softverb.verbalizers.texts import verbalize_to

    verbalizer = for_bank(create(a.method, **settings), bank.entries if bank else entries)
    backbone = Backbone.load(a.model, dtype=a.dtype, device=a.device)
    for prompt in prompts:
        prompt.check_fits(backbone.fingerprint, force=a.force)
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

    bank, settings = Bank.load(a.bank), _settings(a.settings)

    from lm_eval_softverb.backbone import Backbone
    from lm_eval_softverb.compare.selection import select
    from lm_eval_softverb.verbalizers.base import create, for_bank

    inspect: Any = for_bank(create("inspect", **settings), bank.entries)
    backbone = Backbone.load(a.model, dtype=a.dtype, device=a.device)
    for prompt in bank.prompts:
        prompt.check_fits(backbone.fingerprint, force=a.force)
    new = a.max_new_tokens or MAX_NEW_TOKENS[a.kind]
    options = {"train": a.train_split, "test": a.test_split, "overwrite": a.overwrite, "progress": not a.quiet}
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


def model(a: argparse.Namespace) -> int:
    from lm_eval_softverb.pretrained import locate

    print(locate(a.name))
    return 0


def doctor(_a: argparse.Namespace) -> int:
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
