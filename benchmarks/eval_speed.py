"""Evaluation speed: ``--model softprompt`` against ``--model hf,peft=`` on the same requests.

    make bench NAME=eval_speed
    make bench NAME=eval_speed ARGS="--task softverb_sst2 --limit 200 --batch-size 32 --dtype bfloat16"

Cases: multiple choice at 20 and 100 virtual tokens; generation with the trained SST-2 prompt of ``benchmarks/prompts`` (short
answers) and with untrained ones (answers run to their limit). Multiple choice agrees when every log-likelihood is within
the tolerance; generation when each row equals what the peer writes for it alone (batch size 1). Peak memory is that of
answering, each side in a process of its own. ``--task`` names the generation task; its ``_mc`` twin is used too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import alternate, in_child, peak_mib, ratio, report, reset_peak

TRAINED = Path(__file__).parent / "prompts" / "sst2"
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5}


def main() -> None:
    a = arguments()
    shared = Path(__file__).resolve().parents[2] / "shared" / "data"
    if "SOFTVERB_DATA_DIR" not in os.environ and shared.is_dir():
        os.environ["SOFTVERB_DATA_DIR"] = str(shared)
    if a.task is None:
        a.task = "softverb_sst2" if "SOFTVERB_DATA_DIR" in os.environ else "softverb_labels_emotion"
    if a.memory:
        print(json.dumps(memory(a)))
        return
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        untrained = {n: make_prompt(n, Path(folder) / str(n)) for n in (20, 100)}
        for kind, title, prompt in (
            ("multiple_choice", "20 virtual tokens", untrained[20]),
            ("multiple_choice", "100 virtual tokens", untrained[100]),
            ("generation", "trained prompt, 20 virtual tokens", TRAINED),
            ("generation", "untrained prompt, 20 virtual tokens", untrained[20]),
            ("generation", "untrained prompt, 100 virtual tokens", untrained[100]),
        ):
            cases.append(case(a, kind, title, prompt))
            print(f"# {json.dumps(cases[-1])}", flush=True)
    head = {key: cases[0][key] for key in ("ours", "peer", "ratio")}
    setting = {"task": a.task, "dtype": a.dtype, "batch_size": a.batch_size, "limit": a.limit}
    report("eval_speed", head, all(c["agree"] for c in cases), cases=cases, setting=setting)


def case(a: argparse.Namespace, kind: str, title: str, prompt: Path) -> dict[str, Any]:
    requests = instances(a.task + ("_mc" if kind == "multiple_choice" else ""), a.limit)
    ours, peer = model("ours", prompt, a), model("peer", prompt, a)
    method = "loglikelihood" if kind == "multiple_choice" else "generate_until"
    answers: dict[str, Any] = {}

    def run(side: str, lm: Any) -> None:
        answers[side] = quiet(getattr(lm, method), requests)

    times = alternate(lambda: run("ours", ours), lambda: run("peer", peer), a.repeats)
    out = {"case": f"{kind}, {title}", "requests": len(requests), **ratio(*times)}
    if kind == "multiple_choice":
        worst = max(abs(x[0] - y[0]) for x, y in zip(answers["ours"], answers["peer"], strict=True))
        out |= {"max_difference": worst, "agree": worst <= TOLERANCE[a.dtype]}
    else:
        peer.batch_size_per_gpu = 1
        truth = quiet(peer.generate_until, requests)
        wrong = {s: sum(x != y for x, y in zip(answers[s], truth, strict=True)) for s in answers}
        out |= {"wrong_rows_ours": wrong["ours"], "wrong_rows_peer": wrong["peer"], "agree": wrong["ours"] == 0}
    shared = ["--task", a.task, "--limit", str(a.limit), "--batch-size", str(a.batch_size), "--dtype", a.dtype]
    for side in ("ours", "peer"):
        more = ["--memory", side, "--kind", kind, "--prompt", str(prompt)]
        out[f"peak_mib_{side}"] = round(in_child("benchmarks.eval_speed", [*shared, *more])["peak_mib"])
    return out


def memory(a: argparse.Namespace) -> dict[str, float]:
    requests = instances(a.task + ("_mc" if a.kind == "multiple_choice" else ""), a.limit)
    lm = model(a.memory, Path(a.prompt), a)
    reset_peak()
    quiet(lm.loglikelihood if a.kind == "multiple_choice" else lm.generate_until, requests)
    return {"peak_mib": peak_mib()}


def quiet(run: Any, requests: list[Any]) -> Any:
    with contextlib.redirect_stderr(io.StringIO()):
        return run(requests, disable_tqdm=True)


def make_prompt(n: int, folder: Path) -> Path:
    from lm_eval_softverb.backbone import Backbone
    from lm_eval_softverb.prompt import SoftPrompt
    from lm_eval_softverb.tuners.config import SoftConfig
    from lm_eval_softverb.tuners.training import initial_rows

    backbone = Backbone.load("smollm2-135m", dtype="float32")
    return SoftPrompt(initial_rows(backbone, SoftConfig(tokens=n)), fingerprint=backbone.fingerprint).save(folder)


def model(side: str, prompt: Path, a: argparse.Namespace) -> Any:
    from lm_eval.models.huggingface import HFLM

    from lm_eval_softverb.models.softprompt import SoftPromptLM
    from lm_eval_softverb.pretrained import locate

    device = "cuda" if torch.cuda.is_available() else "cpu"
    common = {"peft": str(prompt), "dtype": a.dtype, "batch_size": a.batch_size, "device": device}
    if side == "ours":
        return SoftPromptLM(pretrained="smollm2-135m", **common)
    return HFLM(pretrained=locate("smollm2-135m"), **common)


def instances(name: str, limit: int) -> list[Any]:
    from lm_eval.tasks import TaskManager

    from lm_eval_softverb.plugin import task_dir

    task = TaskManager(include_path=str(task_dir()), include_defaults=False).load([name])["tasks"][name]
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    return list(task.instances)


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--task")
    p.add_argument("--limit", type=int, default=64)
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--dtype", default="float32", choices=sorted(TOLERANCE))
    p.add_argument("--repeats", type=int, default=3)
    for hidden in ("--memory", "--kind", "--prompt"):
        p.add_argument(hidden, help=argparse.SUPPRESS)
    return p.parse_args()


if __name__ == "__main__":
    main()
