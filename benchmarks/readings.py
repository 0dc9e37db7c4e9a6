"""One experiment on the readings of a bank: trains its translators, scores every arm through the harness, compares them.

    make bench NAME=readings ARGS="benchmarks/experiments/labels.json --out experiments"

An experiment is a JSON file:

    {"bank": "benchmarks/banks/tight", "kind": "labels", "baseline": "InSPEcT, tuned",
     "select": ["--most-train", "10", "--most-test", "10"],
     "translators": {"full": {"train": ["--epochs", "40"], "seeds": [0, 1, 2]}},
     "arms": {"translator": {"model": "translator", "translator": "full"},
              "short": {"model": "translator", "translator": "full", "gen": "max_gen_toks=10"},
              "InSPEcT, tuned": {"model": "inspect", "selected": true}}}

``train`` are arguments of ``softverb translate train`` (``bank`` beside it: learn from another bank; ``from`` instead of it:
the translator of this name in that experiment), ``select`` those of ``softverb select``, ``args`` model arguments of the
harness. ``"split": "all"`` reads all prompts of the bank and not only its test split. With ``"inputs": {"dod": …, "most": 8}``
the unlabelled inputs of its tasks are there for arms with ``"rerank": true`` and translators with ``"dpo": NAME``, the
translator to start from. Each seed of a translator is one training, each arm and seed one ``lm_eval`` run in a process of its
own (``seeds`` of an arm: fewer of them; model ``replay``: another task's ground truth as each prompt's text); what is there
already is not done again, so a run that was stopped goes on.

The table has the mean over test prompts with its 95 % interval (scores of the seeds are averaged prompt by prompt first, and
half the range over seeds stands beside it), the share of texts that ended by themselves, and a star where the paired
difference to the baseline is significant (``table.json`` has it all). With ``"correlate": "accuracy"`` also Spearman's rank
correlation of the prompts' held-out accuracy with the first metric. ``texts.md`` shows what every arm said of each prompt. All
texts stay in OUT, with the harness's own results.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from lm_eval_softverb import storage
from lm_eval_softverb.bank import manifest_of
from lm_eval_softverb.compare.pages import markdown_table
from lm_eval_softverb.compare.runs import Run, read_run
from lm_eval_softverb.compare.stats import holm, mean_interval, paired_interval, paired_p

METRICS = {
    "labels": ("f1", "recall", "cosine", "percentile_rank"),
    "instructions": ("rouge_l", "cosine", "percentile_rank"),
}
MADE = "made.json"
"""In the folder of a finished run: what it was made of."""
CORPUS = "mpr_pred"
"""A metric of all texts together, which has no score per prompt."""


def main() -> None:
    a = arguments()
    experiment = json.loads(a.experiment.read_text())
    out = a.out / a.experiment.stem
    out.mkdir(parents=True, exist_ok=True)
    check(experiment, out)
    if any(arm.get("selected") for arm in experiment["arms"].values()):
        run("select", ["softverb", "select", *source(experiment, a), *experiment.get("select", []), "--out", out / "selection"])
    if given := experiment.get("inputs"):
        own = ["--dod", given["dod"], "--bank", experiment["bank"], "--most", given.get("most", 8), "--out", inputs(out)]
        run("inputs", ["softverb", "translate", "inputs", *own])
    for name, translator in experiment.get("translators", {}).items():
        if "from" in translator:
            continue
        for seed in seeds_of(translator):
            path = adapter(experiment, out, name, seed)
            own = source({**experiment, **translator}, a)
            more = [*translator.get("train", []), "--seed", seed, "--out", path]
            if "dpo" in translator:
                more += ["--dpo", inputs(out), "--start", adapter(experiment, out, translator["dpo"], seed)]
            run(f"{name}, seed {seed}", ["softverb", "translate", "train", *own, *a.train, *more, "--quiet"])
    runs = {name: scored(name, arm, experiment, out, a) for name, arm in experiment["arms"].items()}
    table(runs, experiment, out)
    texts(runs, experiment, out)
    if field := experiment.get("correlate"):
        correlations(runs, experiment, field, out)


def check(experiment: Mapping[str, Any], out: Path) -> None:
    """What has to be there before anything is trained."""
    translators = experiment.get("translators", {})
    banks = [experiment["bank"], *(t["bank"] for t in translators.values() if "bank" in t)]
    for t in translators.values():
        words = t.get("train", [])
        banks += [words[i + 1] for i, word in enumerate(words) if word == "--bank"]
    for bank in dict.fromkeys(banks):
        manifest_of(Path(bank))
    for name, t in translators.items():
        for seed in seeds_of(t) if "from" in t else ():
            if not (path := adapter(experiment, out, name, seed) / "translator.json").exists():
                raise SystemExit(f"{path} is missing: run the experiment {t['from']!r} with the same --out first.")
    if (baseline := experiment.get("baseline")) and baseline not in experiment["arms"]:
        raise SystemExit(f"The baseline {baseline!r} is no arm; expected one of {', '.join(experiment['arms'])}.")
    for name, arm in experiment["arms"].items():
        missing = set(arm.get("seeds", [])) - set(seeds_of(translators.get(arm.get("translator"), {})))
        if missing:
            raise SystemExit(f"The arm {name!r} has seeds {sorted(missing)} that its translator has not.")


def source(experiment: Mapping[str, Any], a: argparse.Namespace) -> list[str]:
    return [*bank_of(experiment, a), "--kind", experiment["kind"]]


def bank_of(experiment: Mapping[str, Any], a: argparse.Namespace) -> list[str]:
    return ["--bank", experiment["bank"], *(["--dod", a.dod] if a.dod else [])]


def seeds_of(translator: Mapping[str, Any]) -> list[int]:
    return list(translator.get("seeds", [0]))


def adapter(experiment: Mapping[str, Any], out: Path, name: str, seed: int) -> Path:
    other = experiment["translators"][name].get("from")
    return (out.parent / other if other else out) / "translators" / f"{name}-{seed}"


def inputs(out: Path) -> Path:
    return out / "inputs.jsonl"


def scored(name: str, arm: Mapping[str, Any], experiment: Mapping[str, Any], out: Path, a: argparse.Namespace) -> list[Run]:
    """One run per seed of the arm's translator, or one."""
    seeds = arm.get("seeds") or (seeds_of(experiment["translators"][arm["translator"]]) if "translator" in arm else [0])
    found = []
    for seed in seeds:
        folder = out / "runs" / f"{name}-{seed}"
        given = {"bank": experiment["bank"], "dtype": a.dtype, **arm.get("args", {})}
        if arm["model"] == "replay":
            given = {"file": out / "other.jsonl"}
            run(name, ["softverb", "dod", "texts", *bank_of(experiment, a), "--other", "--out", given["file"]])
        if "translator" in arm:
            given["adapter"] = adapter(experiment, out, arm["translator"], seed)
        if arm.get("rerank"):
            given["rerank"] = inputs(out)
        if arm.get("selected"):
            given["selection"] = out / "selection" / "selection.json"
        command: list[Any] = ["lm_eval", "run", "--model", arm["model"], "--tasks", f"verbalize_{experiment['kind']}"]
        command += ["--model_args", json.dumps({key: str(value) for key, value in given.items()})]
        told = {"bank": experiment["bank"], "dod": a.dod, "split": experiment.get("split")}
        command += ["--batch_size", "16", "--metadata", json.dumps({key: value for key, value in told.items() if value})]
        command += ["--gen_kwargs", arm["gen"]] if "gen" in arm else []
        made_of = [hashed(Path(str(v))) for k, v in given.items() if k in ("adapter", "selection", "rerank", "file")]
        facts = {"command": [str(word) for word in command], "made_of": made_of}
        if (folder / MADE).exists() and storage.read_json(folder / MADE) != facts:
            raise SystemExit(f"{folder} is of other settings or translators than {name!r} has now; remove it, or change --out.")
        if not (folder / MADE).exists():
            run(name, [*command, "--output_path", folder, "--log_samples"])
            storage.write_json(folder / MADE, facts)
        found.append(read_run(folder, name))
    return found


def hashed(path: Path) -> str:
    """What is in a file or a translator; of something that comes with the package, its name."""
    file = path / "translator.json" if path.is_dir() else path
    return storage.sha256_file(file) if file.exists() else str(path)


def run(what: str, command: Sequence[Any]) -> None:
    program, *rest = map(str, command)
    module = {"softverb": "lm_eval_softverb.cli", "lm_eval": "lm_eval"}[program]
    print(f"# {what}", flush=True)
    done = subprocess.run([sys.executable, "-m", module, *rest], env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
    if done.returncode:
        raise SystemExit(f"{what}: {program} {' '.join(rest)} ended with {done.returncode}.")


# --- tables ----------------------------------------------------------------------------------------------------------


def table(runs: Mapping[str, Sequence[Run]], experiment: Mapping[str, Any], out: Path) -> None:
    """``table.md`` and ``table.json``."""
    kind, baseline = experiment["kind"], experiment.get("baseline")
    means = {name: per_prompt(found, kind) for name, found in runs.items()}
    rows: dict[str, dict[str, Any]] = {}
    for name, scores in means.items():
        rows[name] = {}
        for metric in METRICS[kind]:
            values = scores[metric]
            interval = mean_interval(list(values.values()))
            seeds = [statistics.mean(r.tasks[f"verbalize_{kind}"].scores[metric].values()) for r in runs[name]]
            cell: dict[str, Any] = {"mean": interval.value, "low": interval.low, "high": interval.high, "seeds": seeds}
            if baseline and name != baseline:
                theirs = means[baseline][metric]
                pair = [values[k] for k in theirs], list(theirs.values())
                difference = paired_interval(*pair)
                p, test = paired_p(*pair)
                cell |= {"difference": [difference.value, difference.low, difference.high], "p": p, "test": test}
            rows[name][metric] = cell
        results = [storage.read_json(Path(r.source))["results"][f"verbalize_{kind}"] for r in runs[name]]
        rows[name][CORPUS] = statistics.mean(r[f"{CORPUS},none"] for r in results)
        rows[name]["stopped"] = stopped(runs[name])
    for metric in METRICS[kind]:
        cells = [row[metric] for row in rows.values() if "p" in row[metric]]
        for cell, p in zip(cells, holm([c["p"] for c in cells]), strict=True):
            cell["p_holm"] = p
    storage.write_json(out / "table.json", rows)
    lines = ["| arm | " + " | ".join([*METRICS[kind], CORPUS, "stopped"]) + " |", "|---" * (len(METRICS[kind]) + 3) + "|"]
    for name, row in rows.items():
        ended = "" if row["stopped"] is None else f"{row['stopped']:.0%}"
        cells = [*(shown(row[metric]) for metric in METRICS[kind]), f"{row[CORPUS]:.3f}", ended]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    n = len(next(iter(next(iter(means.values())).values())))
    text = "\n".join(lines)
    text += f"\n\n{n} test prompts; mean and 95 % interval over prompts; ± is half the range over seeds"
    text += f"; * differs from {baseline} (p < .05 after Holm).\n" if baseline else ".\n"
    storage.write_text(out / "table.md", text)
    print(text)


def per_prompt(runs: Sequence[Run], kind: str) -> dict[str, dict[str, float]]:
    """Metric → document → score, averaged over seeds."""
    found = {}
    for metric in METRICS[kind]:
        scores = [r.tasks[f"verbalize_{kind}"].scores[metric] for r in runs]
        found[metric] = {key: statistics.mean(s[key] for s in scores) for key in scores[0]}
    return found


def stopped(runs: Sequence[Run]) -> float | None:
    """Share of texts that EOS ended; None where the method does not say."""
    cut = [a["cut"] for r in runs for a in r.config.get("verbalizer", {}).get("answers", {}).values() if "cut" in a]
    return 1 - statistics.mean(cut) if cut else None


def shown(cell: Mapping[str, Any]) -> str:
    text = f"{cell['mean']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]"
    if len(cell["seeds"]) > 1:
        text += f" ± {(max(cell['seeds']) - min(cell['seeds'])) / 2:.3f}"
    return text + (" *" if cell.get("p_holm", 1) < 0.05 else "")


def texts(runs: Mapping[str, Sequence[Run]], experiment: Mapping[str, Any], out: Path) -> None:
    """``texts.md``: the first seed's text of every prompt, with its recall and F1, or ROUGE-L."""
    kind, parts = experiment["kind"], []
    shown_scores = ("recall", "f1") if kind == "labels" else ("rouge_l",)
    first = {name: {s["doc"]["prompt_id"]: s for s in samples(found[0], kind)} for name, found in runs.items()}
    for name, sample in next(iter(first.values())).items():
        rows = []
        for arm, own in first.items():
            [text] = own[name]["filtered_resps"]
            rows.append([arm, *(f"{own[name][score]:.2f}" for score in shown_scores), " ".join(text.split())])
        parts += [f"## {name}", sample["doc"]["target"], markdown_table(["arm", *shown_scores, "text"], rows)]
    storage.write_text(out / "texts.md", "\n\n".join(parts) + "\n")


def correlations(runs: Mapping[str, Sequence[Run]], experiment: Mapping[str, Any], field: str, out: Path) -> None:
    """Spearman's rho of each arm, with a bootstrap interval over prompts: do better prompts read better?"""
    kind = experiment["kind"]
    quality = {e["prompt_id"]: e["heldout"][field] for _, e in storage.read_jsonl(manifest_of(Path(experiment["bank"])))}
    rows: dict[str, dict[str, Any]] = {}
    metric = METRICS[kind][0]
    for name, found in runs.items():
        values = per_prompt(found, kind)[metric]
        names = prompt_names(found[0], kind)
        pairs = np.array([[quality[names[key]], value] for key, value in values.items()])
        value = rho(pairs)
        if np.isnan(value):  # an arm that reads nothing
            rows[name] = {"rho": None, "n": len(pairs)}
            continue
        rng = np.random.default_rng(0)
        draws = [rho(pairs[rng.integers(len(pairs), size=len(pairs))]) for _ in range(2000)]
        low, high = np.nanpercentile(draws, [2.5, 97.5])
        rows[name] = {"rho": value, "low": float(low), "high": float(high), "n": len(pairs)}
        print(f"{name}: rank correlation of {field} and {metric} {value:.2f} [{low:.2f}, {high:.2f}]")
    storage.write_json(out / "correlations.json", rows)


def rho(pairs: np.ndarray) -> float:
    """nan where one side does not vary."""
    if np.ptp(pairs, axis=0).min() == 0:
        return float("nan")
    return float(stats.spearmanr(pairs[:, 0], pairs[:, 1]).statistic)


def prompt_names(found: Run, kind: str) -> dict[str, str]:
    """Document → its prompt."""
    return {f"{s['doc_hash']}/{s['doc_id']}": s["doc"]["prompt_id"] for s in samples(found, kind)}


def samples(found: Run, kind: str) -> list[dict[str, Any]]:
    """What the harness logged."""
    [file] = sorted(Path(found.source).parent.glob(f"samples_verbalize_{kind}_*.jsonl"))[-1:]
    return [line for _, line in storage.read_jsonl(file)]


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("experiment", type=Path, help="JSON file")
    p.add_argument("--out", type=Path, default=Path("experiments"), help="a folder in it gets the experiment's name")
    p.add_argument("--dod", help="where the DoD of the bank is, for texts that are not in its manifest")
    p.add_argument("--dtype", default="float32", help="of the frozen model in all readings (default: %(default)s)")
    p.add_argument("train", nargs="*", help="behind --: added to every `softverb translate train`")
    return p.parse_args()


if __name__ == "__main__":
    main()
