"""``softverb arms``: makes the texts of every arm, runs all of them, and compares.

A step that is finished is not done again, so a run that was stopped goes on with the same command.
"""

from __future__ import annotations

import gc
import re
import shlex
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from lm_eval_softverb import storage
from lm_eval_softverb.compare import fillings, pages, report
from lm_eval_softverb.compare.arms import Arm, is_finished, plan_arm, run_arm
from lm_eval_softverb.compare.bank_arms import CHAT, BankArms
from lm_eval_softverb.compare.comparison import Comparison, compare
from lm_eval_softverb.compare.runs import Run
from lm_eval_softverb.endpoints.backends import Plan
from lm_eval_softverb.errors import ConfigError, did_you_mean
from lm_eval_softverb.verbalizers import MAX_NEW_TOKENS

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_BYTES_PER_TOKEN = 6
"""Of a reading that is planned but not made, generously."""


def check(b: BankArms) -> None:
    """Finds out what can be wrong before anything is computed or sent.

    Raises:
        SoftverbError: a folder that cannot be written, a bank or DoD that cannot be used, an unknown method, a missing adapter
            or key, a name that is used twice, an unknown baseline.
    """
    report.require_plots()
    storage.require_writable(b.out)
    names = [arm.name for arm in b.arms]
    for reading in b.readings:
        if not _NAME.fullmatch(reading.name) or names.count(reading.name) > 1 or reading.name.startswith(CHAT):
            raise ConfigError(
                f"A reading is named {reading.name!r}; names are letters, digits, '_', '-' and '.', do not begin with {CHAT!r} "
                f"and differ from those of all other arms ({', '.join(names)}). Name it: NAME=…"
            )
    if b.base not in names:
        raise ConfigError(f"There is no arm {b.base!r} to compare with. {did_you_mean(b.base, names)}")
    for reading in b.readings:
        reading.check(b.scope)
    if b.endpoint and not b.generates:
        raise ConfigError(f"Chat endpoints give no log-likelihoods, which {b.scored} needs. Pass --task dod_classification.")
    if b.endpoint:
        from lm_eval_softverb.models.hardprompt_chat import HardPromptChatLM

        HardPromptChatLM(**b.endpoint.model_args, **b.endpoint.limits)
    if not b.documents:
        raise ConfigError(f"The task {b.scored} has no documents for {b.bank}.")


def fill(b: BankArms) -> None:
    """Writes the texts that need no model.

    Raises:
        SoftverbError: as :mod:`~lm_eval_softverb.compare.fillings`.
    """
    storage.write_jsonl(b.text("gold"), fillings.gold(b.scope, b.dod))
    if b.others:
        storage.write_jsonl(b.text("other"), b.others)
    storage.write_jsonl(b.text(f"shots{b.shots}"), fillings.shots(b.scope, b.shots, b.seed, b.dod))
    storage.write_jsonl(b.text("majority"), fillings.majority(b.scope, b.dod))


def plan(b: BankArms) -> str:
    """The arms and what each would send. Texts that need no model are written; nothing is sent and no model loaded."""
    check(b)
    fill(b)
    total, lines = Plan(0, 0, 0, 0.0), []
    with tempfile.TemporaryDirectory(prefix="softverb-") as temporary:
        for arm in b.arms:
            found = f"{b.documents:,} requests"
            if _finished(b, arm):
                found = "finished"
            elif arm.model == "hardprompt-chat":
                own = plan_arm(replace(arm, model_args=_assumed(b, arm, Path(temporary))), b.cache)
                total, found = _sum(total, own), _shown(b, own)
            lines.append(f"{arm.name:24}{arm.model:17}{found}")
    if b.endpoint:
        limit = b.endpoint.max_dollars
        lines.append(f"\nEndpoint: {_shown(b, total)}" + (f"; the limit is ${limit:,.2f}." if limit is not None else "."))
        lines.append(f"Readings that are not made yet are counted with {MAX_NEW_TOKENS[b.kind]} long tokens each.")
    return "\n".join([*lines, "Nothing was sent."])


def score(b: BankArms) -> Comparison:
    """Makes the readings, runs every arm, and writes the comparison with its page, and ``commands.md``.

    Raises:
        SoftverbError: as :func:`check` and the models.
    """
    check(b)
    fill(b)
    print(f"{len(b.scope.entries)} prompts, {b.documents} documents of {b.scored}, {len(b.arms)} arms", flush=True)
    if not b.others:
        print("No arm 'other': the prompts of one split have too few different texts to swap them.", flush=True)
    read(b)
    runs: list[Run] = []
    spent = 0.0
    for number, arm in enumerate(b.arms, start=1):
        state = "is finished" if _finished(b, arm) else "…"
        print(f"Arm {number} of {len(b.arms)}: {arm.name} {state}", flush=True)
        if "max_dollars" in arm.limits:  # of all arms together
            arm = replace(arm, limits={**arm.limits, "max_dollars": max(0.0, arm.limits["max_dollars"] - spent)})
        runs.append(run_arm(arm, b.folder(arm.name), b.cache))
        spent += float((runs[-1].config.get("endpoint") or {}).get("cost") or 0.0)
    found = compare(runs, b.base)
    by_hand = commands(b)
    page = pages.to_html(
        found,
        runs,
        "softverb arms",
        intro=f"Bank {b.bank}: {len(b.scope.entries)} soft prompts on {b.pretrained}"
        + (f", their texts also on {b.endpoint.model}." if b.endpoint else "."),
        blocks=[report.heading("Texts"), *_texts(b)],
        sections={"The same by hand": by_hand},
    )
    pages.save(b.out, found, page)
    storage.write_text(b.out / "commands.md", f"```console\n{by_hand}\n```\n")
    return found


def read(b: BankArms) -> None:
    """Makes the readings."""
    from lm_eval_softverb.backbone import Backbone

    backbone = None
    if any(r.file is None for r in b.readings):
        backbone = Backbone.load(b.pretrained, dtype=b.dtype, device=b.device)
    for number, r in enumerate(b.readings, start=1):
        print(f"Reading {number} of {len(b.readings)}: {r.name} …", flush=True)
        r.write(
            b.text(r.name),
            b.whole,
            b.scope,
            b.kind,
            backbone,
            batch_size=b.batch_size,
            overwrite=b.overwrite,
            progress=b.progress,
        )
    del backbone
    gc.collect()


def commands(b: BankArms) -> str:
    """Everything as single commands, one per line."""
    more = ["--dod", b.dod] if b.dod else []
    model = ["--model", b.pretrained, "--dtype", b.dtype, *(["--device", b.device] if b.device else [])]
    kinds: dict[str, list[str]] = {"gold": [], "majority": ["--majority"]}
    kinds |= {"other": ["--other", "--seed", str(b.seed)]} if b.others else {}
    kinds[f"shots{b.shots}"] = ["--shots", str(b.shots), "--seed", str(b.seed)]
    words = [
        ["softverb", "dod", "texts", "--bank", str(b.bank), "--out", str(b.text(name)), *options, *more]
        for name, options in kinds.items()
    ]
    words += [r.command(b.text(r.name), b.bank, b.kind, b.split, model) for r in b.readings]
    lines = [*map(shlex.join, words), *(arm.command(b.folder(arm.name), b.cache) for arm in b.arms)]
    runs = [f"{arm.name}={b.folder(arm.name)}" for arm in b.arms]
    return "\n".join([*lines, shlex.join(["softverb", "compare", *runs, "--baseline", b.base, "--out", str(b.out)])])


def _finished(b: BankArms, arm: Arm) -> bool:
    """Not where a text is still to be made."""
    file = arm.model_args.get("prompt_file")
    return (not file or Path(file).exists()) and is_finished(arm, b.folder(arm.name))


def _assumed(b: BankArms, arm: Arm, folder: Path) -> dict[str, Any]:
    """The arm's arguments, with texts of the greatest length where a reading is not made yet."""
    file = arm.model_args.get("prompt_file")
    reading = next((r for r in b.readings if file == str(b.text(r.name))), None)
    if reading is None or Path(str(file)).exists():
        return dict(arm.model_args)
    if reading.file:
        return {**arm.model_args, "prompt_file": str(reading.file)}
    text = "x" * (_BYTES_PER_TOKEN * MAX_NEW_TOKENS[b.kind])
    storage.write_jsonl(folder / "texts.jsonl", [{"prompt_id": e["prompt_id"], "text": text} for e in b.scope.entries])
    return {**arm.model_args, "prompt_file": str(folder / "texts.jsonl")}


def _sum(a: Plan, b: Plan) -> Plan:
    return Plan(
        a.requests + b.requests,
        a.prompt_tokens + b.prompt_tokens,
        a.completion_tokens + b.completion_tokens,
        a.dollars + b.dollars,
    )


def _shown(b: BankArms, plan: Plan) -> str:
    """Without dollars where there are no prices."""
    priced = b.endpoint is not None and b.endpoint.prices is not None
    return str(plan) if priced else str(plan).rpartition(", at most $")[0]


def _texts(b: BankArms) -> list[str]:
    """Behind a click per prompt: its ground truth and what it was read as."""
    names = ["gold", *(r.name for r in b.readings)]
    lines = {name: [line for _, line in storage.read_jsonl(b.text(name))] for name in names}
    texts = {n: {line["prompt_id"]: line["text"] for line in own if line.get("rank", 0) == 0} for n, own in lines.items()}
    prompts = [str(e["prompt_id"]) for e in b.scope.entries]
    tables = [report.table(("arm", "text"), [(n, texts[n].get(p, "")) for n in names], numbers=0) for p in prompts]
    return [pages.behind(prompt, table) for prompt, table in zip(prompts, tables, strict=True)]
