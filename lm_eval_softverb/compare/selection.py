"""``softverb select``: InSPEcT's layer pair, chosen on a bank's training prompts and reported on its test prompts.

Three arms are kept apart, since the papers mixed them: **tuned** (one pair for all test prompts, chosen on training prompts
only), **fixed** (one pair chosen before any data), and **oracle** (for each test prompt the pair that scores best on that very
prompt: what the published tables show, and no method, for it needs the answer).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

import lm_eval_softverb
from lm_eval_softverb import storage
from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.bank import Bank
from lm_eval_softverb.compare import report
from lm_eval_softverb.compare.stats import mean_interval
from lm_eval_softverb.errors import ArtifactError, DataError
from lm_eval_softverb.metrics import label_scores, similarity
from lm_eval_softverb.metrics.rouge import rouge_l
from lm_eval_softverb.prompt import SoftPrompt
from lm_eval_softverb.residual import decoder_layers
from lm_eval_softverb.verbalizers import Kind
from lm_eval_softverb.verbalizers.base import settings_of
from lm_eval_softverb.verbalizers.inspect_grid import Inspect, Pair, Selection, all_pairs

OBJECTIVE: Mapping[Kind, str] = {"labels": "mean of recall and F1", "instructions": "cosine"}
Grid = dict[Pair, str]


@dataclass(frozen=True)
class Scored:
    """One prompt's grid with the scores of every pair, in the order of :func:`all_pairs`.

    Attributes:
        metrics: name → scores [L * L].
        objective: what a pair is chosen by [L * L].
    """

    name: str
    gold: str
    texts: Sequence[str]
    metrics: Mapping[str, npt.NDArray[np.float64]]
    objective: npt.NDArray[np.float64]


def select(
    backbone: Backbone,
    bank: Bank,
    out: Path,
    *,
    kind: Kind,
    inspect: Inspect,
    max_new_tokens: int,
    train: str = "train",
    test: str = "test",
    most_train: int | None = None,
    most_test: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Selection:
    """Runs the whole grid for every prompt and chooses.

    Args:
        train, test: splits to choose and to report on; of each at most ``most_train`` and ``most_test`` prompts, the first of
            the bank (for a model of 30 layers each prompt is 900 texts).

    Writes ``selection.json``, ``report-KIND.csv``, ``report-KIND.html`` and ``texts-KIND.jsonl``. Grids are kept in
    ``grids/``; called again after a kill, only missing ones are computed. A ``selection.json`` that is there keeps its pair of
    the other kind.

    Raises:
        DataError: the bank has no training or no test prompts with ground truth of this kind.
        ArtifactError: ``out`` holds grids of another run and ``overwrite`` is false.
    """
    field = "labels" if kind == "labels" else "instruction"
    known = [(p, e) for p, e in zip(bank.prompts, bank.entries, strict=True) if e.get(field)]
    parts = {
        split: [(p, e) for p, e in known if e.get("split") == split][:most]
        for split, most in ((train, most_train), (test, most_test))
    }
    for split, members in parts.items():
        if not members:
            splits = sorted({str(e.get("split")) for e in bank.entries})
            raise DataError(f"Bank {bank.source} has no prompts with {field} in split {split!r}; its splits are {splits}.")
    report.require_plots()
    storage.require_writable(out / "grids")
    layers = len(decoder_layers(backbone))
    pairs = all_pairs(layers)
    scored: dict[str, list[Scored]] = {split: [] for split in parts}
    total = sum(len(members) for members in parts.values()) * len(pairs)
    with tqdm(total=total, desc="layer pairs", unit="pair", disable=not progress) as bar:
        for split, members in parts.items():
            for prompt, entry in members:
                path = out / "grids" / f"{kind}-{prompt.id}.json"
                grid = _grid(path, backbone, prompt, inspect, kind, max_new_tokens, overwrite, bar)
                scored[split].append(score_grid(grid, pairs, entry, kind))
    mean = np.mean([s.objective for s in scored[train]], axis=0)
    tuned = int(mean.argmax())
    fixed = pairs.index(Inspect().pair(layers, kind))
    lines = report_lines(scored[test], kind, tuned=tuned, fixed=fixed)
    chosen = _save(out / "selection.json", kind, pairs[tuned], layers, backbone, inspect, mean, scored[train], max_new_tokens)
    _write(out, kind, pairs, mean, scored[test], lines, tuned, fixed, layers)
    return chosen


def score_grid(grid: Mapping[Pair, str], pairs: Sequence[Pair], entry: Mapping[str, Any], kind: Kind) -> Scored:
    """All scores of all pairs of one prompt."""
    texts = [grid[p] for p in pairs]
    if kind == "labels":
        found = [label_scores(text, entry["labels"]) for text in texts]
        metrics = {m: np.array([f[m] for f in found]) for m in ("recall", "f1")}
        objective, gold = (metrics["recall"] + metrics["f1"]) / 2, ", ".join(entry["labels"])
    else:
        gold = str(entry["instruction"])
        rows = similarity.embed([gold, *texts])
        cosine = similarity.cosines(rows[:1], rows[1:])[0]
        metrics, objective = {"cosine": cosine, "rouge_l": np.array([rouge_l(text, gold) for text in texts])}, cosine
    return Scored(str(entry["prompt_id"]), gold, texts, metrics, objective)


def report_lines(scored: Sequence[Scored], kind: Kind, *, tuned: int, fixed: int) -> list[report.Line]:
    """Scores of the three arms over ``scored`` prompts, with the oracle as the papers took it as a fourth."""
    lines = []
    for metric in scored[0].metrics:
        arms = {
            "fixed": [s.metrics[metric][fixed] for s in scored],
            "tuned": [s.metrics[metric][tuned] for s in scored],
            "oracle (needs the answer)": [s.metrics[metric][int(s.objective.argmax())] for s in scored],
            "oracle per metric (as published)": [s.metrics[metric].max() for s in scored],
        }
        for arm, values in arms.items():
            lines.append(report.Line(arm, f"verbalize_{kind}", metric, **asdict(mean_interval([float(v) for v in values]))))
    return lines


def _grid(
    path: Path,
    backbone: Backbone,
    prompt: SoftPrompt,
    inspect: Inspect,
    kind: Kind,
    max_new_tokens: int,
    overwrite: bool,
    bar: Any,
) -> Grid:
    layers = len(decoder_layers(backbone))
    settings = {k: v for k, v in settings_of(inspect).items() if k not in ("rows", "mode", "avoid")}
    examples = [x.name for x in inspect.examples(kind)]
    base = sorted(backbone.fingerprint.sketch.items())
    version = lm_eval_softverb.__version__
    run = storage.sha256_json([version, settings, examples, base, str(backbone.dtype), prompt.id, kind, max_new_tokens])
    pairs = all_pairs(layers)
    if path.exists() and not overwrite:
        value = storage.read_json(path, max_bytes=64 << 20)
        if value.get("run") != run or len(value["texts"]) != len(pairs):
            raise ArtifactError(f"{path} is the grid of another run. Choose another --out, or pass --overwrite.")
        bar.update(len(pairs))
        return dict(zip(pairs, value["texts"], strict=True))
    [grid] = inspect.grid(backbone, [prompt], kind=kind, max_new_tokens=max_new_tokens, done=bar.update)
    storage.write_json(path, {"run": run, "settings": settings, "examples": examples, "texts": [grid[p] for p in pairs]})
    return grid


def _save(
    path: Path,
    kind: Kind,
    pair: Pair,
    layers: int,
    backbone: Backbone,
    inspect: Inspect,
    mean: npt.NDArray[np.float64],
    training: Sequence[Scored],
    max_new_tokens: int,
) -> Selection:
    before = Selection.load(path) if path.exists() else None
    others = before if before and before.layers == layers else None
    how = {
        "base_model": backbone.name,
        "objective": OBJECTIVE[kind],
        "training_score": float(mean.max()),
        "prompts": [s.name for s in training],
        "examples": [x.name for x in inspect.examples(kind)],
        "injection": inspect.injection,
        "max_new_tokens": max_new_tokens,
    }
    chosen = Selection({**(others.pairs if others else {}), kind: pair}, layers, {**(others.info if others else {}), kind: how})
    chosen.save(path)
    return chosen


def _write(
    out: Path,
    kind: Kind,
    pairs: Sequence[Pair],
    mean: npt.NDArray[np.float64],
    scored: Sequence[Scored],
    lines: Sequence[report.Line],
    tuned: int,
    fixed: int,
    layers: int,
) -> None:
    texts = []
    for s in scored:
        for arm, i in (("fixed", fixed), ("tuned", tuned), ("oracle", int(s.objective.argmax()))):
            scores = {m: round(float(v[i]), 4) for m, v in s.metrics.items()}
            row = {"prompt_id": s.name, "arm": arm, "source_layer": pairs[i][0], "target_layer": pairs[i][1]}
            texts.append({**row, **scores, "text": s.texts[i], "ground_truth": s.gold})
    storage.write_jsonl(out / f"texts-{kind}.jsonl", texts)
    storage.write_text(out / f"report-{kind}.csv", report.to_csv(lines))
    intro = (
        f"{len(scored)} test prompts. 'tuned' is the pair {pairs[tuned]} (source, target), chosen on training prompts by the "
        f"{OBJECTIVE[kind]}; 'fixed' is {pairs[fixed]}, chosen before any data. The oracles look at the answer: they are "
        "bounds, not methods. Intervals are over prompts. The map shows the mean training score of every pair."
    )
    shown = "\n\n".join(
        f"{row['prompt_id']} · {row['arm']} ({row['source_layer']}, {row['target_layer']})\n"
        f"  is:   {row['ground_truth']}\n  text: {row['text']}"
        for row in texts
    )
    blocks = [report.line_table(lines), report.heading("Layer pairs"), heat_map(mean.reshape(layers, layers))]
    page = report.page(f"InSPEcT, {kind}", intro, blocks, {"Texts of the test prompts": shown})
    storage.write_text(out / f"report-{kind}.html", page)


def heat_map(scores: npt.NDArray[np.float64]) -> str:
    """Scores [L, L] by source (down) and target layer (across), -1 first, as inline SVG."""
    with report.figure(1, (6.4, 5.2)) as (drawn, axes):
        last = scores.shape[0] - 2
        image = axes[0].imshow(scores, cmap="viridis", extent=(-1.5, last + 0.5, last + 0.5, -1.5), vmin=0)
        axes[0].set_xlabel("target layer")
        axes[0].set_ylabel("source layer")
        drawn.colorbar(image, ax=axes[0], label="mean training score")
        return report.inline_svg(drawn)
