"""``softverb arms``: every arm of a bank's test tasks in one command."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval_softverb.cli.arguments import command, model_arguments
from lm_eval_softverb.errors import ConfigError
from lm_eval_softverb.verbalizers import METHODS


def add_arguments(group: Any) -> None:
    p = command(
        group,
        "arms",
        arms,
        "Score every arm of a bank's test tasks through lm_eval and compare them: soft prompt, none, gold text, readings, …",
        """
  softverb arms --bank banks/labelsets --out out --method nearest --method inspect:selection=smollm2-135m
  softverb arms --bank banks/labelsets --out out --method mine=translator:adapter=translators/labels,samples=20 \\
      --reading theirs=texts.jsonl --rows 10 --tasks-most 8
  softverb arms --bank banks/labelsets --out out --chat-model gpt-4o-mini --prices prices.json --max-dollars 2 --plan
  softverb arms --bank banks/labelsets --out out --chat-model NAME --base-url http://127.0.0.1:8000/v1 --chat-set concurrency=4

Arms: softprompt, none, gold (the ground truth), other (another task's), shotsK (training rows as examples), each reading,
majority (the most frequent output); with an endpoint also chat-none, chat-gold, … The folder gets compare.html, compare.md,
compare.csv, commands.md with the same by hand, texts/, and runs/ with the harness's own results. Run the same command again
after an interruption: what is finished is kept, and no answer is asked for twice.
""",
    )
    p.add_argument("--bank", type=Path, required=True, help="folder of soft prompts of a DoD's tasks")
    p.add_argument("--out", type=Path, required=True, help="folder for texts, runs and the comparison")
    p.add_argument(
        "--task",
        choices=("dod_general", "dod_classification", "dod_classification_mc"),
        help="default: by the bank's kind of DoD; …_mc (by log-likelihood) is for local models only",
    )
    p.add_argument("--rows", type=int, default=30, help="held-out rows per DoD task (default: %(default)s)")
    p.add_argument("--tasks-most", type=int, metavar="N", help="N DoD tasks at most, evenly from all")
    p.add_argument("--shots", type=int, default=5, metavar="K", help="examples in the few-shot arm (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of these examples and of who gets whose text (default: %(default)s)")
    p.add_argument("--dod", help="where the bank's DoD is, if it lies elsewhere than its manifest says")
    p.add_argument(
        "--method",
        action="append",
        default=[],
        metavar="[NAME=]METHOD[:SETTING=VALUE,…]",
        help=f"a reading by {', '.join(METHODS)}; settings as for softverb verbalize, and control, control_seed, "
        "max_new_tokens; may be given again",
    )
    p.add_argument(
        "--reading", action="append", default=[], metavar="NAME=FILE", help="a reading's file of softverb verbalize; again, too"
    )
    p.add_argument("--overwrite", action="store_true", help="discard readings of other settings in --out")
    p.add_argument("--baseline", help="arm to compare with (default: chat-gold, or gold without an endpoint)")
    p.add_argument("--plan", action="store_true", help="print the arms and what each would send, and stop")
    p.add_argument("--batch-size", type=int, default=16, help="of the local model (default: %(default)s)")
    e = p.add_argument_group("an OpenAI-compatible endpoint", "The key comes from OPENAI_API_KEY only.")
    e.add_argument("--chat-model", metavar="NAME", help="score the texts on this chat model, too")
    e.add_argument("--base-url", metavar="URL", help="of the endpoint (default: OpenAI's)")
    e.add_argument("--prices", type=Path, metavar="F", help='JSON {"model": {"in": …, "out": …}} in dollars per million tokens')
    e.add_argument("--max-dollars", type=float, metavar="X", help="hard limit over all arms together; needs --prices")
    e.add_argument(
        "--chat-set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another argument of --model hardprompt-chat, such as concurrency or template; again, too",
    )
    model_arguments(p)


def arms(a: argparse.Namespace) -> int:
    given = [_method(text) for text in a.method]
    files = [_pair("--reading", text) for text in a.reading]
    chat = dict(_pair("--chat-set", text) for text in a.chat_set)
    if not a.chat_model and (a.base_url or a.prices or a.max_dollars is not None or chat):
        raise ConfigError("--base-url, --prices, --max-dollars and --chat-set are of an endpoint; pass --chat-model NAME.")
    for name in ("rows", "tasks_most", "shots", "batch_size"):
        value = getattr(a, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}, expected at least 1.")

    from lm_eval_softverb.compare import battery, pages
    from lm_eval_softverb.compare.bank_arms import BankArms, Endpoint
    from lm_eval_softverb.compare.readings import Reading

    readings = [Reading(name, method, settings) for name, method, settings in given]
    readings += [Reading(name, file=Path(file)) for name, file in files]
    endpoint = Endpoint(a.chat_model, a.base_url, a.prices, a.max_dollars, _values(chat)) if a.chat_model else None
    chosen = BankArms(
        bank=a.bank,
        out=a.out,
        task=a.task,
        readings=tuple(readings),
        endpoint=endpoint,
        pretrained=a.model,
        dtype=a.dtype,
        device=a.device,
        batch_size=a.batch_size,
        rows=a.rows,
        tasks_most=a.tasks_most,
        shots=a.shots,
        seed=a.seed,
        dod=a.dod,
        baseline=a.baseline,
        overwrite=a.overwrite,
        progress=not a.quiet,
    )
    if a.plan:
        print(battery.plan(chosen))
        return 0
    print(f"\n{pages.to_markdown(battery.score(chosen))}")
    print(f"Page: {a.out / 'compare.html'}")
    return 0


def _method(text: str) -> tuple[str, str, dict[str, str]]:
    """Name, method and settings of ``[NAME=]METHOD[:SETTING=VALUE,…]``; a comma begins a setting only before ``NAME=``."""
    head, _, tail = text.partition(":")
    name, equals, method = head.rpartition("=")
    if method not in METHODS:
        from lm_eval_softverb.errors import did_you_mean

        raise ConfigError(f"--method {text!r}: there is no method {method!r}. {did_you_mean(method, list(METHODS))}")
    parts: Sequence[str] = re.split(r",(?=\w+=)", tail) if tail else []
    return (name if equals else method), method, dict(_pair(f"--method {head}", part) for part in parts)


def _pair(option: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals or not value:
        raise ConfigError(f"{option} takes NAME=VALUE, got {text!r}.")
    return name, value


def _values(given: dict[str, str]) -> dict[str, Any]:
    """Numbers and truth values as the harness reads them from a command line."""
    from lm_eval.utils import handle_arg_string

    return {name: handle_arg_string(value) for name, value in given.items()}
