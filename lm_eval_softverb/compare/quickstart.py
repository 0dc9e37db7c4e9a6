"""``softverb quickstart``: train one soft prompt on shipped data, score every arm through the harness, show the result.

An arm is one line of :data:`ARMS`. All arms run the same tasks on the same held-out documents and differ only in what fills
the prompt's slot.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_softverb import storage
from lm_eval_softverb.compare import report
from lm_eval_softverb.data import labelsets
from lm_eval_softverb.errors import ConfigError, OutputError, did_you_mean
from lm_eval_softverb.metrics import label_scores
from lm_eval_softverb.pretrained import DEFAULT
from lm_eval_softverb.tuners.config import SoftConfig
from lm_eval_softverb.verbalizers import MAX_NEW_TOKENS

if TYPE_CHECKING:
    from lm_eval_softverb.backbone import Backbone
    from lm_eval_softverb.prompt import SoftPrompt

LABELSET = "emotion"
SHOTS = 5


@dataclass(frozen=True)
class Quickstart:
    """What the arms of one quickstart share."""

    labelset: str
    pretrained: str
    dtype: str
    device: str | None
    out: Path

    @property
    def tasks(self) -> list[str]:
        name = f"softverb_labels_{self.labelset}"
        return [name, f"{name}_mc"]

    @property
    def prompt(self) -> Path:
        return self.out / "prompt"


@dataclass(frozen=True)
class Arm:
    """One way to fill the slot.

    Attributes:
        name: in tables and folders.
        model: ``--model`` of the harness.
        model_args: what this arm adds to pretrained and dtype.
        shots: ``--num_fewshot``.
    """

    name: str
    model: str = "softprompt"
    model_args: Callable[[Quickstart], Mapping[str, Any]] = lambda _q: {}
    shots: int = 0


ARMS = (
    Arm("none"),
    Arm("fewshot", shots=SHOTS),
    Arm("softprompt", model_args=lambda q: {"peft": str(q.prompt)}),
)
OURS = "softprompt"


@dataclass(frozen=True)
class Reading:
    """One way to turn the prompt into text.

    Attributes:
        name: in the table.
        method, settings: of the verbalizer.
        control: read instead of the prompt.
    """

    name: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    control: str = "none"


READINGS = (
    Reading("nearest tokens, cosine", "nearest"),
    Reading("nearest tokens, Euclidean", "nearest", {"distance": "euclidean"}),
    Reading("InSPEcT, fixed layers", "inspect"),
    Reading("InSPEcT, selected layers", "inspect", {"selection": DEFAULT}),
    Reading("InSPEcT of random vectors", "inspect", {"selection": DEFAULT}, control="random"),
    Reading("self-verbalization", "selfverb"),
    Reading("self-verbalization of random vectors", "selfverb", control="random"),
)


def quickstart(
    out: Path,
    *,
    labelset: str = LABELSET,
    pretrained: str = "smollm2-135m",
    train_dtype: str = "auto",
    dtype: str = "float32",
    device: str | None = None,
    config: SoftConfig | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> list[report.Line]:
    """Runs the whole path: ``prompt/``, ``report.csv``, ``report.html``, ``verbalizations.jsonl``, ``lm_eval/<arm>/``.

    A second call with the same settings goes on where a killed one stopped.

    Raises:
        ConfigError: an unknown label set.
    """
    from lm_eval_softverb.backbone import Backbone
    from lm_eval_softverb.models.harness import find_rows
    from lm_eval_softverb.tuners.soft import train_soft_prompt

    report.require_plots()
    if labelset not in labelsets.names():
        raise ConfigError(f"Unknown label set {labelset!r}. {did_you_mean(labelset, list(labelsets.names()))}")
    storage.require_writable(out)
    began = time.monotonic()
    q = Quickstart(labelset, pretrained, dtype, device, out)
    rows, info = find_rows(q.tasks[0])
    print(f"Training a soft prompt on {len(rows)} sentences of label set '{labelset}' ({pretrained}) …", flush=True)
    backbone = Backbone.load(pretrained, dtype=train_dtype, device=device)
    prompt = train_soft_prompt(
        backbone,
        rows,
        config or SoftConfig(),
        q.prompt,
        info=info,
        progress=progress,
    )
    trained = time.monotonic() - began

    scores: dict[str, dict[tuple[str, str], dict[str, float]]] = {}
    commands = []
    for arm in ARMS:
        print(f"Scoring arm '{arm.name}' …", flush=True)
        results, command = run_arm(q, arm, batch_size)
        commands.append(f"# {arm.name}\n{command}")
        scores[arm.name] = {k: v for k, v in report.sample_scores(results).items() if k[1] in ("exact_match", "acc")}
    lines = [line for name, values in scores.items() for line in report.score_lines(name, values)]
    differences = [
        line for name in scores if name != OURS for line in report.difference_lines(OURS, scores[OURS], name, scores[name])
    ]
    documents = max(line.n for line in lines)
    intro = (
        f"Label set '{labelset}' on {pretrained}: {len(rows)} training and {documents} held-out sentences. The soft prompt "
        f"{prompt.id} has {prompt.n} virtual tokens (best epoch of {len(prompt.info['losses'])} by validation rows taken "
        "from the training sentences). Every arm answers the same documents; intervals are over documents, differences "
        "are paired."
    )
    print("Reading the prompt by every method …", flush=True)
    texts = read_prompt(backbone, prompt, labelset)
    storage.write_text(out / "report.csv", report.to_csv([*lines, *differences]))
    storage.write_jsonl(out / "verbalizations.jsonl", texts)
    blocks = [
        report.plot_svg(lines),
        report.heading("Scores"),
        report.line_table(lines),
        report.heading("Paired differences on the same documents"),
        report.line_table(differences),
        report.heading("What the prompt says, by each method"),
        report.table(("method", "text", "recall (%)", "F1 (%)"), [_cells(t) for t in texts], numbers=2),
    ]
    page = report.page("softverb quickstart", intro, blocks, {"The same runs by hand": "\n\n".join(commands)})
    storage.write_text(out / "report.html", page)
    print(f"\n{report.to_text([*lines, *differences])}\n")
    print("What the prompt says, by each method:")
    for name, text, recall, f1 in map(_cells, texts):
        print(f"  {name:38}recall {recall:>4}  F1 {f1:>4}  {text[:120]!r}")
    print(f"Trained in {trained:.0f} s, all in {time.monotonic() - began:.0f} s. Page: {out / 'report.html'}")
    return [*lines, *differences]


def read_prompt(backbone: Backbone, prompt: SoftPrompt, labelset: str) -> list[dict[str, Any]]:
    """The ground truth, and under it one text of the prompt per line of :data:`READINGS`, with its scores."""
    from lm_eval_softverb.verbalizers.base import controlled, create, for_bank

    gold = labelsets.label_words(labelset)
    out: list[dict[str, Any]] = [{"method": "ground truth", "text": ", ".join(gold), **label_scores(", ".join(gold), gold)}]
    for reading in READINGS:
        settings = dict(reading.settings)
        if settings.get("selection") not in (None, backbone.name):
            continue  # chosen for another model
        verbalizer = for_bank(create(reading.method, **settings), [{"labels": gold}])
        prompts = controlled([prompt], reading.control)
        [[text, *_]] = verbalizer.verbalize(backbone, prompts, kind="labels", max_new_tokens=MAX_NEW_TOKENS["labels"])
        out.append({"method": reading.name, **text.to_json(), **label_scores(text.text, gold)})
    return out


def _cells(text: dict[str, Any]) -> tuple[str, str, str, str]:
    return text["method"], text["text"], f"{100 * text['recall']:.0f}", f"{100 * text['f1']:.0f}"


def run_arm(q: Quickstart, arm: Arm, batch_size: int) -> tuple[dict[str, Any], str]:
    """One harness run; its own results and samples are written to ``lm_eval/<arm>/``.

    Returns:
        The results with samples, and the equivalent command line.

    Raises:
        OutputError: the harness could not write its results (it only logs that).
    """
    import lm_eval
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    from lm_eval_softverb.plugin import register, task_dir

    register()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # the table says what these messages say
    model_args = {"pretrained": q.pretrained, "dtype": q.dtype, **arm.model_args(q)}
    folder = q.out / "lm_eval" / arm.name
    storage.require_writable(folder)
    tracker = EvaluationTracker(output_path=str(folder))
    results = lm_eval.simple_evaluate(
        model=arm.model,
        model_args=dict(model_args),
        tasks=q.tasks,
        num_fewshot=arm.shots or None,
        batch_size=batch_size,
        device=q.device,
        use_cache=str(q.out / "cache" / "answers"),
        task_manager=TaskManager(include_path=str(task_dir()), include_defaults=False, metadata=dict(model_args)),
        evaluation_tracker=tracker,
        bootstrap_iters=1000,
    )
    samples = results.pop("samples")
    before = set(folder.rglob("*.json*"))
    tracker.save_results_aggregated(results=results, samples=samples)
    for task, rows in samples.items():
        tracker.save_results_samples(task_name=task, samples=rows)
    if len(set(folder.rglob("*.json*")) - before) != 1 + len(samples):
        raise OutputError(f"The harness could not write its results to {folder} (see the messages above). Is the disk full?")
    arguments = ",".join(f"{k}={v}" for k, v in model_args.items())
    command = f"lm_eval --model {arm.model} --model_args {arguments} --tasks {','.join(q.tasks)} --batch_size {batch_size}" + (
        f" --num_fewshot {arm.shots}" if arm.shots else ""
    )
    return {**results, "samples": samples}, command
