"""``softverb quickstart``, ``model`` and ``doctor``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from lm_eval_softverb import __version__
from lm_eval_softverb.cli.arguments import command, model_arguments


def add_arguments(group: Any) -> None:
    p = command(
        group,
        "quickstart",
        quickstart,
        "Train one soft prompt on shipped data and score it against no prompt and few-shot.",
        """
  softverb quickstart --out quickstart-out
  softverb quickstart --out out --labelset weather
""",
    )
    p.add_argument("--out", type=Path, required=True, help="folder for the prompt, report.csv, report.html and lm_eval/")
    p.add_argument("--labelset", default="emotion", help="one of the shipped label sets (default: %(default)s)")
    model_arguments(p, dtype=False)

    p = command(
        group,
        "model",
        model,
        "Print the folder of a packaged model, fetching it on first use.",
        """
  lm_eval --model hf --model_args pretrained=$(softverb model smollm2-135m),peft=DIR --tasks softverb_sst2_mc
""",
    )
    p.add_argument("name", nargs="?", default="smollm2-135m")

    command(
        group,
        "doctor",
        doctor,
        "Show versions, the start-up hook, data and model folders.",
        "\n  softverb doctor\n",
    )


def quickstart(a: argparse.Namespace) -> int:
    from lm_eval_softverb.compare.quickstart import quickstart

    quickstart(a.out, labelset=a.labelset, pretrained=a.model, device=a.device, progress=not a.quiet)
    return 0


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
