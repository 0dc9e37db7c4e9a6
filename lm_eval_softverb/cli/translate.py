"""``softverb translate``: training the translator, bridges to other models, inputs to compare texts on."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_softverb.cli.arguments import command, model_arguments
from lm_eval_softverb.errors import ConfigError
from lm_eval_softverb.verbalizers import KINDS

if TYPE_CHECKING:
    from lm_eval_softverb.verbalizers.translator_config import PreferenceConfig, TranslatorConfig

# Options that are settings of the same name: of TranslatorConfig, and of PreferenceConfig.
_BOTH = ("batch_size", "validation", "seed", "max_tokens")
_SETTINGS = ("kind", "share", "words", "label_order", "noise", "rank", "alpha")
_OPTIMISER = ("epochs", "patience", "min_delta", "schedule", "warmup", "weight_decay", "max_grad_norm", "dropout")
_PREFERENCE = ("beta", "candidates", "temperature", "answer_tokens", *_BOTH)


def add_arguments(group: Any) -> None:
    about = "Train a translator from soft prompts to text, and what goes with it."
    commands = group.add_parser("translate", help=about, description=about).add_subparsers(required=True, metavar="COMMAND")
    _train_arguments(commands)
    p = command(
        commands,
        "bridge",
        bridge,
        "Fit a linear map between the input embeddings of two models, for prompts of one and a translator of the other.",
        """
  softverb translate bridge --from smollm2-135m --to HuggingFaceTB/SmolLM2-360M --out bridges/135-to-360
  lm_eval --model translator --model_args pretrained=HuggingFaceTB/SmolLM2-360M,bank=banks/mine,\\
adapter=translators/labels-360,bridge=bridges/135-to-360 --tasks verbalize_labels
""",
    )
    p.add_argument("--from", dest="source", required=True, help="model of the soft prompts: hub id, folder, or packaged name")
    p.add_argument("--to", dest="target", required=True, help="model of the translator")
    p.add_argument("--out", type=Path, required=True, help="folder of the bridge")
    p.add_argument(
        "--ridge", type=float, default=1e-3, help="strength of the penalty; 0 is least squares (default: %(default)s)"
    )
    p.add_argument("--seed", type=int, default=0, help="of the tokens held out to measure the fit")
    p = command(
        commands,
        "inputs",
        inputs,
        "Write the unlabelled inputs of a bank's tasks, for --rerank and --dpo; taken from the rows its prompts were tuned on.",
        """
  softverb translate inputs --dod classification:labels.sqlite --bank banks/labels --out inputs.jsonl
  softverb verbalize --method translator --bank banks/labels --out best.jsonl --set adapter=translators/labels \\
      --set samples=20 --rerank inputs.jsonl
""",
    )
    p.add_argument("--dod", required=True, help="general, general:PATH, classification:FILE.sqlite, labelsets, or a path")
    p.add_argument("--bank", type=Path, required=True, help="bank of soft prompts trained on this DoD")
    p.add_argument("--out", type=Path, required=True, help="JSONL file of the inputs")
    p.add_argument("--most", type=int, default=16, help="inputs per prompt (default: %(default)s)")


def _train_arguments(commands: Any) -> None:
    p = command(
        commands,
        "train",
        train,
        "Train a translator: a LoRA on the frozen model that learns from a bank's training prompts to write what they are for.",
        """
  softverb translate train --bank banks/labels --kind labels --out translators/labels
  softverb translate train --bank banks/general --kind instructions --texts paraphrases.jsonl --out translators/general
  softverb translate train --bank banks/labels --bank banks/more --kind labels --answers --out translators/both
  softverb translate train --bank banks/labels --kind labels --preset paper --out translators/paper
  softverb translate train --bank banks/labels --kind labels --out translators/dpo --start translators/labels \\
      --dpo inputs.jsonl
  accelerate launch -m lm_eval_softverb.cli translate train --bank banks/labels --kind labels --out translators/labels
  lm_eval --model translator --model_args bank=banks/labels,adapter=translators/labels --tasks verbalize_labels

Run the same command again after an interruption: training goes on from its last checkpoint.
""",
    )
    p.add_argument(
        "--bank",
        type=Path,
        required=True,
        action="append",
        help="folder of soft prompts whose manifest has labels or instructions; again, for more prompts",
    )
    p.add_argument("--kind", choices=KINDS, required=True, help="what the translator learns to write")
    p.add_argument("--out", type=Path, required=True, help="folder of the translator (a PEFT LoRA adapter and translator.json)")
    p.add_argument("--preset", default="fixed", help="fixed (default) or paper")
    p.add_argument("--split", default="train", help="entries of the bank to learn from (default: %(default)s)")
    p.add_argument("--share", type=float, help="of the prompts that are not for validation, learn from this share (default: 1)")
    p.add_argument("--dod", help="where the bank's DoD is, if its texts are not in the manifest and it lies elsewhere now")
    p.add_argument(
        "--texts", type=Path, help="JSONL of paraphrases by prompt or task, as `softverb dod paraphrase` writes them"
    )
    p.add_argument("--most-texts", type=int, help="the first so many of a prompt's or task's paraphrases (default: all)")
    p.add_argument("--no-originals", action="store_true", help="where a prompt has paraphrases, leave out its own text")
    p.add_argument("--no-bos", action="store_true", help="nothing between a prompt's vectors and its text (default: BOS)")
    p.add_argument("--answers", action="store_true", help="in front of it, what the prompt answers to neutral inputs (elicit)")
    p.add_argument("--name-answers", action="store_true", help="texts end with a sentence that names these answers")
    p.add_argument(
        "--noise", type=float, help="added to the prompts' vectors, in shares of their root mean square (default: 0)"
    )
    p.add_argument("--words", help="text between a prompt's vectors and its text, e.g. 'Labels:' (default: none)")
    p.add_argument("--label-order", help="in a text: shuffled, behind those among the answers (default); given; or sorted")
    p.add_argument(
        "--max-tokens", type=int, help="longest text, without named answers; EOS comes behind the cut (default: 300)"
    )
    p.add_argument("--whole-sentences", action="store_true", help="cut longer texts behind the last sentence that fits")
    p.add_argument("--rank", type=int, help="of LoRA (default: 4)")
    p.add_argument("--alpha", type=int, help="of LoRA (default: 8)")
    p.add_argument("--dropout", type=float, help="of LoRA (default: 0.1)")
    p.add_argument("--epochs", type=int, help="most passes over the texts")
    p.add_argument("--patience", type=int, help="epochs without improvement before stopping; 0 never stops early")
    p.add_argument("--min-delta", type=float, help="smallest improvement of the validation loss that counts")
    p.add_argument("--batch-size", type=int, help="texts per optimiser step, over all processes (default: 16)")
    p.add_argument("--lr", type=float, help="peak learning rate")
    p.add_argument("--schedule", help="linear or constant")
    p.add_argument("--warmup", type=float, help="share of the steps with a rising learning rate")
    p.add_argument("--weight-decay", type=float, help="AdamW's weight decay (default: 0.1)")
    p.add_argument("--max-grad-norm", type=float, help="gradient clipping; 0 does not clip")
    p.add_argument("--validation", type=float, help="share of the prompts that chooses the best epoch (default: 0.1)")
    p.add_argument("--seed", type=int, help="of initial weights, split, order and dropout (default: 0)")
    p.add_argument("--dpo", type=Path, metavar="FILE", help="preference training on these unlabelled inputs, by prompt")
    p.add_argument(
        "--start", type=Path, help="--dpo: the translator to start from (default: train one in OUT/supervised first)"
    )
    p.add_argument("--beta", type=float, help="--dpo: how far it may move; smaller is farther (default: 0.1)")
    p.add_argument("--candidates", type=int, help="--dpo: texts to draw per prompt (default: 8)")
    p.add_argument("--temperature", type=float, help="--dpo: of these draws (default: 1)")
    p.add_argument("--answer-tokens", type=int, help="--dpo: of each behaviour compared (default: 8)")
    p.add_argument("--dpo-epochs", type=int, help="--dpo: passes over the pairs (default: 1)")
    p.add_argument("--dpo-lr", type=float, help="--dpo: learning rate (default: 1e-6)")
    p.add_argument("--tokens-per-pass", type=int, help="of one forward and backward pass (default: by device)")
    p.add_argument("--checkpoint-seconds", type=float, default=30.0, help=argparse.SUPPRESS)
    p.add_argument("--force", action="store_true", help="learn from prompts of another base model than the one in use")
    p.add_argument("--overwrite", action="store_true", help="discard a translator or checkpoint of another run in --out")
    model_arguments(p)


def _configs(a: argparse.Namespace) -> tuple[TranslatorConfig, PreferenceConfig | None]:
    from lm_eval_softverb.verbalizers.translator_config import PreferenceConfig, config

    settings = config(
        a.preset,
        learning_rate=a.lr,
        bos=False if a.no_bos else None,
        answers=a.answers or None,
        name_answers=a.name_answers or None,
        whole_sentences=a.whole_sentences or None,
        originals=False if a.no_originals else None,
        **{name: getattr(a, name) for name in (*_SETTINGS, *_OPTIMISER, *_BOTH)},
    )
    given = {name: getattr(a, name) for name in _PREFERENCE} | {"epochs": a.dpo_epochs, "learning_rate": a.dpo_lr}
    if settings.name_answers:
        given["max_tokens"] = None  # candidates have the sentence that names answers, too
    if a.most_texts is not None and (a.most_texts < 1 or not a.texts):
        raise ConfigError(f"--most-texts is {a.most_texts}, expected at least 1 and --texts FILE.")
    only_dpo = {"beta", "candidates", "temperature", "answer_tokens", "epochs", "learning_rate"}
    if not a.dpo and (a.start or any(given[name] is not None for name in only_dpo)):
        raise ConfigError("--start and the settings of preference training need --dpo FILE, the inputs to compare texts on.")
    return settings, PreferenceConfig(**{k: v for k, v in given.items() if v is not None}) if a.dpo else None


def train(a: argparse.Namespace) -> int:
    from lm_eval_softverb import storage

    settings, preference = _configs(a)
    storage.require_writable(a.out)

    from lm_eval_softverb.bank import Bank
    from lm_eval_softverb.data.verbalization import with_truth
    from lm_eval_softverb.verbalizers.rerank import read_inputs
    from lm_eval_softverb.verbalizers.translator_data import read_texts

    banks = [with_truth(Bank.load(folder), a.dod) for folder in a.bank]
    bank, names = Bank.joined(banks), ", ".join(folder.name for folder in a.bank)
    texts = {name: found[: a.most_texts] for name, found in read_texts(a.texts).items()} if a.texts else None
    twice = Counter(task for one in banks for task in {str(e.get("task")) for e in one.entries})
    if unclear := [task for task in texts or () if twice[task] > 1]:
        raise ConfigError(f"--texts paraphrases {unclear[0]!r}, a task of several of these banks; name prompts by prompt_id.")
    if a.dpo:
        read_inputs(a.dpo)

    from lm_eval_softverb.backbone import Backbone
    from lm_eval_softverb.fitting import Processes
    from lm_eval_softverb.verbalizers.preference import train_preferences
    from lm_eval_softverb.verbalizers.translator_training import train_translator

    processes = Processes()
    backbone = Backbone.load(a.model, dtype=a.dtype, device=a.device or processes.device)
    options: dict[str, Any] = {
        "split": a.split,
        "force": a.force,
        "max_tokens": a.tokens_per_pass,
        "checkpoint_seconds": a.checkpoint_seconds,
        "overwrite": a.overwrite,
        "progress": not a.quiet and processes.first,
    }
    made, start = None, a.start
    if start is None:
        start = a.out / "supervised" if a.dpo else a.out
        made = train_translator(
            backbone, bank, settings, start, texts=texts, info={"preset": a.preset, "bank": names}, **options
        )
    if preference:
        made = train_preferences(backbone, bank, start, a.dpo, preference, a.out, info={"bank": names}, **options)
    if made is None or not processes.first:
        return 0
    loss, epoch, prompts = made.info["best_validation_loss"], made.info["best_epoch"], made.info["prompts"]
    print(
        f"{made.id}: trained on {len(prompts['training'])} prompts, validation loss {loss:.4f} on {len(prompts['validation'])} "
        f"others after epoch {epoch}, in {a.out}"
    )
    print(f"Score it: lm_eval --model translator --model_args pretrained={a.model},bank={a.bank[0]},adapter={a.out} --tasks …")
    return 0


def bridge(a: argparse.Namespace) -> int:
    from lm_eval_softverb import storage

    storage.require_writable(a.out)

    from lm_eval_softverb.backbone import Backbone
    from lm_eval_softverb.verbalizers.bridge import fit_bridge

    source, target = (Backbone.load(name, device="cpu") for name in (a.source, a.target))  # only embeddings are used
    made = fit_bridge(source, target, ridge=a.ridge, seed=a.seed)
    made.save(a.out)
    print(
        f"{made.id}: {made.weight.shape[0]} to {made.weight.shape[1]} dimensions, fitted on "
        f"{made.info['common_tokens']} common tokens; explains {made.info['held_out_explained']:.1%} of "
        f"held-out embeddings. In {a.out}"
    )
    return 0


def inputs(a: argparse.Namespace) -> int:
    from lm_eval_softverb import storage
    from lm_eval_softverb.bank import Bank
    from lm_eval_softverb.data.dod.opening import open_dod

    if a.most < 1:
        raise ConfigError(f"--most is {a.most}, expected at least 1.")
    storage.require_writable(a.out.parent)
    bank, dod = Bank.load(a.bank), open_dod(a.dod)
    lines = [
        {"prompt_id": e["prompt_id"], "inputs": [row.input for row in dod.task(str(e.get("task"))).train[: a.most]]}
        for e in bank.entries
    ]
    storage.write_jsonl(a.out, lines)
    print(f"Inputs of {len(lines)} prompts, at most {a.most} each, in {a.out}")
    return 0
