"""The argument parser of ``softverb``; each module here adds the commands it runs."""

from __future__ import annotations

import argparse

from lm_eval_softverb import __version__
from lm_eval_softverb.cli import arms, compare, dod_general, dod_generate, read, start, train, translate


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="softverb", description="Train soft prompts, score them with lm-evaluation-harness, and read them."
    )
    root.add_argument("--version", action="version", version=__version__)
    group = root.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in (start, train, read, translate, compare, arms):
        module.add_arguments(group)
    about = "Datasets of datasets: list and audit their tasks, generate label sets, paraphrase instructions."
    dod = group.add_parser("dod", help=about, description=about).add_subparsers(required=True, metavar="COMMAND")
    dod_general.add_arguments(dod)
    dod_generate.add_generate(dod)
    dod_generate.add_paraphrase(dod)
    dod_generate.add_recombine(dod)
    return root
