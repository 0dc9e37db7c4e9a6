"""``softverb quickstart``: train one soft prompt on shipped data, score every arm through the harness, show the result.

All arms run the same tasks on the same held-out documents and differ only in what fills the prompt's slot.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_softverb import storage
from lm_eval_softverb.compare import pages, report
from lm_eval_softverb.compare.arms import Arm, run_arm
from lm_eval_softverb.compare.comparison import compare
from lm_eval_softverb.compare.runs import Run
from lm_eval_softverb.data import labelsets
from lm_eval_softverb.errors import ConfigError, did_you_mean
from lm_eval_softverb.metrics import label_scores
from lm_eval_softverb.pretrained import DEFAULT
from lm_eval_softverb.tuners.config import SoftConfig
from lm_eval_softverb.verbalizers import MAX_NEW_TOKENS

if TYPE_CHECKING:
    from lm_eval_softverb.backbone import Backbone
    from lm_eval_softverb.prompt import SoftPrompt

LABELSET = "emotion"
SHOTS = 5


METRICS = ("exact_match,first_line", "acc")
"""Of the generation task and of its twin by log-likelihood."""
OURS, BASELINE = "softprompt", "fewshot"


def arms_of(
    labelset: str, prompt: Path, pretrained: str, *, dtype: str = "float32", device: str | None = None, batch_size: int = 16
) -> list[Arm]:
    """The arms; another one is one more line."""
    task = f"softverb_labels_{labelset}"

    def arm(name: str, shots: int = 0, **model_args: str) -> Arm:
        model_args = {"pretrained": pretrained, "dtype": dtype, **model_args}
        return Arm(name, "softprompt", model_args, (task, f"{task}_mc"), shots, batch_size=batch_size, device=device)

    return [arm("none"), arm("fewshot", SHOTS), arm(OURS, peft=str(prompt))]


@dataclass(frozen=True)
class Reading:
    """One way to turn the prompt into text.

    Attributes:
        name: in the table.
        method, settings: of the verbalizer.
        control: read instead of the prompt.
        only: base model that the settings were chosen on; another one's prompts are not read so.
    """

    name: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    control: str = "none"
    only: str = ""


READINGS = (
    Reading("translator", "translator", {"adapter": "labels"}, only=DEFAULT),
    Reading("translator of random vectors", "translator", {"adapter": "labels"}, "random", only=DEFAULT),
    Reading("elicited answers", "elicit"),
    Reading("elicited from random vectors", "elicit", control="random"),
    Reading("nearest tokens, cosine", "nearest"),
    Reading("nearest tokens, Euclidean", "nearest", {"distance": "euclidean"}),
    Reading("InSPEcT, fixed layers", "inspect"),
    Reading("InSPEcT, selected layers", "inspect", {"selection": DEFAULT}, only=DEFAULT),
    Reading("InSPEcT of random vectors", "inspect", {"selection": DEFAULT}, "random", only=DEFAULT),
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
    arms = arms_of(labelset, out / "prompt", pretrained, dtype=dtype, device=device, batch_size=batch_size)
    rows, info = find_rows(arms[0].tasks[0])
    print(f"Training a soft prompt on {len(rows)} sentences of label set '{labelset}' ({pretrained}) …", flush=True)
    backbone = Backbone.load(pretrained, dtype=train_dtype, device=device)
    prompt = train_soft_prompt(
        backbone,
        rows,
        config or SoftConfig(),
        out / "prompt",
        info=info,
        progress=progress,
    )
    trained = time.monotonic() - began

    runs, commands = [], []
    for arm in arms:
        print(f"Scoring arm '{arm.name}' …", flush=True)
        folder, cache = out / "lm_eval" / arm.name, out / "cache" / "answers"
        runs.append(run_arm(arm, folder, cache))
        commands.append(f"# {arm.name}\n{arm.command(folder, cache)}")
    lines = _lines(runs)
    print("Reading the prompt by every method …", flush=True)
    texts = read_prompt(backbone, prompt, labelset)
    storage.write_text(out / "report.csv", report.to_csv(lines))
    storage.write_jsonl(out / "verbalizations.jsonl", texts)
    readings = report.table(("method", "text", "recall (%)", "F1 (%)"), [_cells(t) for t in texts], numbers=2)
    page = pages.to_html(
        compare(runs, BASELINE, METRICS),
        runs,
        "softverb quickstart",
        intro=f"Label set '{labelset}' on {pretrained}: {len(rows)} training and {max(line.n for line in lines)} held-out "
        f"sentences. The soft prompt {prompt.id} has {prompt.n} virtual tokens (best epoch of {len(prompt.info['losses'])} by "
        "validation rows taken from the training sentences).",
        blocks=[report.heading("What the prompt says, by each method"), readings],
        sections={"The same runs by hand": "\n\n".join(commands)},
    )
    storage.write_text(out / "report.html", page)
    print(f"\n{report.to_text(lines)}\n")
    print("What the prompt says, by each method:")
    for name, text, recall, f1 in map(_cells, texts):
        print(f"  {name:38}recall {recall:>4}  F1 {f1:>4}  {text[:120]!r}")
    print(f"Trained in {trained:.0f} s, all in {time.monotonic() - began:.0f} s. Page: {out / 'report.html'}")
    return lines


def _lines(runs: Sequence[Run]) -> list[report.Line]:
    """Every run's scores, then how much more ours has than each of the others, paired by document."""
    scores = {
        run.name: {
            (t, m.partition(",")[0]): task.scores[m] for t, task in run.tasks.items() for m in METRICS if m in task.scores
        }
        for run in runs
    }
    lines = [line for name, own in scores.items() for line in report.score_lines(name, own)]
    others = [name for name in scores if name != OURS]
    return lines + [line for name in others for line in report.difference_lines(OURS, scores[OURS], name, scores[name])]


def read_prompt(backbone: Backbone, prompt: SoftPrompt, labelset: str) -> list[dict[str, Any]]:
    """The ground truth, and under it one text of the prompt per line of :data:`READINGS`, with its scores."""
    from lm_eval_softverb.verbalizers.base import controlled, create, for_bank

    gold = labelsets.label_words(labelset)
    out: list[dict[str, Any]] = [{"method": "ground truth", "text": ", ".join(gold), **label_scores(", ".join(gold), gold)}]
    for reading in READINGS:
        if reading.only not in ("", backbone.name):
            continue
        verbalizer = for_bank(create(reading.method, **reading.settings), [{"labels": gold}])
        prompts = controlled([prompt], reading.control)
        [[text, *_]] = verbalizer.verbalize(backbone, prompts, kind="labels", max_new_tokens=MAX_NEW_TOKENS["labels"])
        out.append({"method": reading.name, **text.to_json(), **label_scores(text.text, gold)})
    return out


def _cells(text: dict[str, Any]) -> tuple[str, str, str, str]:
    return text["method"], text["text"], f"{100 * text['recall']:.0f}", f"{100 * text['f1']:.0f}"
