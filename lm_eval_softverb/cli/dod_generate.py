"""``softverb dod generate``, ``paraphrase`` and ``recombine``: arguments, and what they do.

Each ``add_…(group)`` puts one command into the group of ``softverb dod``.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_softverb.errors import ConfigError

if TYPE_CHECKING:
    from lm_eval_softverb.endpoints.backends import ChatBackend, Metered, Plan, Price
    from lm_eval_softverb.generators.judging import Judge
    from lm_eval_softverb.generators.local_chat import LocalChat

DEFAULT_MODEL = "smollm2-135m"
SAME = "same"


def add_generate(group: Any) -> None:
    p = _command(
        group,
        "generate",
        generate,
        "Write a classification DoD with a chat model: label sets, and sentences for each label.",
        """
  softverb dod generate --out dod.sqlite --sets 5 --sentences 12 --filter
  softverb dod generate --out dod.sqlite --model DIR --sets 250 --sentences 24 --filter
  softverb dod generate --out dod.sqlite --cues cues.txt --sentences 24
  softverb dod generate --out dod.sqlite --backend openai --model gpt-4o-mini --prices prices.json --plan
  softverb dod generate --out dod.sqlite --backend openai --base-url http://127.0.0.1:8000/v1 --model m --max-dollars 5

Run the same command again after an interruption: finished label sets are kept, and the result is the same.
""",
    )
    p.add_argument("--out", type=Path, required=True, help="SQLite file with the tables datasets, keywords, sentences")
    p.add_argument("--sets", type=int, help="label sets to make (default: 5500)")
    p.add_argument("--labels", type=int, help="labels per set (default: 5)")
    p.add_argument("--sentences", type=int, help="sentences per label (default: 100)")
    p.add_argument("--variant", help="tight: labels of one kind (default), or preliminary: labels need not be related")
    p.add_argument(
        "--style", help="list: ask for sentences outright; passages: for small models (default with --backend local); cues"
    )
    p.add_argument("--cues", type=Path, help="your own label sets: '# topic', and below it lines 'label: phrase; phrase; …'")
    p.add_argument("--temperature", type=float, help="of sentences (default: 0.4)")
    p.add_argument("--label-temperature", type=float, help="of labels (default: 0.7)")
    p.add_argument("--top-p", type=float, help="of sentences (default: 0.95)")
    p.add_argument("--label-top-p", type=float, help="of labels (default: 0.8)")
    p.add_argument("--words", type=int, help="words that prime a label set (default: 3)")
    p.add_argument("--words-file", type=Path, help="text file, one noun or adjective per line (default: 899 shipped words)")
    p.add_argument("--per-request", type=int, help="sentences per request (default: 10 in style list, 1 in passages)")
    p.add_argument("--requests", type=int, help="most requests per label and round (default: 16)")
    p.add_argument("--attempts", type=int, help="rounds for missing sentences (default: 6)")
    p.add_argument("--label-attempts", type=int, help="tries for one label set (default: 6)")
    p.add_argument(
        "--max-new-tokens", type=int, help="of one answer with sentences (default: 320 in style list, 100 in passages)"
    )
    p.add_argument("--batch", type=int, help="requests handed over at a time (default: 128)")
    p.add_argument("--no-avoid", action="store_true", help="allow labels that benchmarks and shipped label sets have")
    p.add_argument(
        "--filter",
        nargs="?",
        const=SAME,
        metavar="MODEL",
        help="keep sentences whose own label a local model finds likeliest; without MODEL the model that writes",
    )
    p.add_argument("--filter-margin", type=float, default=0.0, help="nats by which it must be ahead (default: %(default)s)")
    p.add_argument("--seed", type=int, help="of words and samples (default: 0)")
    _backend_arguments(p)


def add_paraphrase(group: Any) -> None:
    p = _command(
        group,
        "paraphrase",
        paraphrase,
        "Write condensed paraphrases of the training definitions of a general DoD with a chat model.",
        """
  softverb dod paraphrase --dod general --out paraphrases-1x.jsonl
  softverb dod paraphrase --dod general --copies 10 --out paraphrases-10x.jsonl --backend openai --model gpt-4o-mini --plan

Definitions of test tasks are never paraphrased. Run the same command again after an interruption.
""",
    )
    p.add_argument("--dod", default="general", help="general, or general:PATH (default: %(default)s)")
    p.add_argument("--out", type=Path, required=True, help="JSONL file, one line per task")
    p.add_argument(
        "--bank", type=Path, action="append", help="only tasks of this bank; again, for more (default: all training tasks)"
    )
    p.add_argument("--copies", type=int, help="paraphrases per definition, e.g. 1, 10 or 100 (default: 1)")
    p.add_argument("--max-new-tokens", type=int, help="of a paraphrase (default: 300)")
    p.add_argument("--temperature", type=float, help="default: 0.7")
    p.add_argument("--top-p", type=float, help="default: 0.95")
    p.add_argument("--attempts", type=int, help="requests for a missing paraphrase (default: 3)")
    p.add_argument("--seed", type=int, help="of samples (default: 0)")
    _backend_arguments(p)


def add_recombine(group: Any) -> None:
    p = _command(
        group,
        "recombine",
        recombine,
        "Make label sets that are not related out of the labels and sentences of another classification DoD.",
        """
  softverb dod recombine --dod classification:tight --sets 200 --out loose.sqlite
  softverb bank --dod classification:loose.sqlite --out banks/loose

Labels of training sets come together with those of training sets only. No model is asked; the same seed makes the same file.
""",
    )
    p.add_argument("--dod", default="classification:tight", help="classification:NAME or :FILE (default: %(default)s)")
    p.add_argument("--out", type=Path, required=True, help="SQLite file with the tables datasets, keywords, sentences")
    p.add_argument("--sets", type=int, help="label sets to make (default: 200)")
    p.add_argument("--labels", type=int, help="labels per set (default: 5)")
    p.add_argument("--sentences", type=int, help="sentences per label (default: 20)")
    p.add_argument("--seed", type=int, help="of who comes together, and of the sentences (default: 0)")


def recombine(a: argparse.Namespace) -> int:
    from lm_eval_softverb.data.dod.classification import ClassificationDod
    from lm_eval_softverb.data.dod.opening import open_dod
    from lm_eval_softverb.generators.recombine import Recombination
    from lm_eval_softverb.generators.recombine import recombine as make

    config, dod = Recombination(**_given(a, Recombination)), open_dod(a.dod)
    if not isinstance(dod, ClassificationDod):
        raise ConfigError(f"--dod is {a.dod!r}, which has no label sets; expected classification:NAME or classification:FILE.")
    counts = make(dod, a.out, config)
    print(f"{a.out}: " + ", ".join(f"{n} label sets to {split} on" for split, n in counts.items()))
    return 0


def generate(a: argparse.Namespace) -> int:
    from lm_eval_softverb.generators import classification
    from lm_eval_softverb.generators.config import ClassificationConfig, read_words
    from lm_eval_softverb.generators.cues import read_cues

    given = _given(a, ClassificationConfig, max_tokens=a.max_new_tokens, avoid=False if a.no_avoid else None)
    cued = read_cues(a.cues) if a.cues else ()
    style = given.setdefault("style", "cues" if cued else "passages" if a.backend == "local" else "list")
    if style == "passages":
        given = {"per_request": 1, "max_tokens": 100, **given}
    if style == "cues":
        given = {
            "sets": len(cued),
            "per_request": 1,
            "max_tokens": 40,
            "requests": 40,
            "batch": 256,
            "temperature": 0.8,
            **given,
        }
    config, words = ClassificationConfig(**given), read_words(a.words_file)
    backend = _backend(a)
    if a.plan:
        return _show(*classification.plan(config, backend, _price(a), words, cued))
    counts = classification.generate(
        config,
        _metered(a, backend),
        a.out,
        words=words,
        cued=cued,
        judge=_judge(a, backend),
        progress=None if a.quiet else _tell,
    )
    return _done(a.out, counts, "sets")


def paraphrase(a: argparse.Namespace) -> int:
    from lm_eval_softverb.bank import Bank
    from lm_eval_softverb.data.dod.opening import open_dod
    from lm_eval_softverb.generators import paraphrase as paraphrases

    config = paraphrases.ParaphraseConfig(**_given(a, paraphrases.ParaphraseConfig, max_tokens=a.max_new_tokens))
    entries = [entry for bank in a.bank or () for entry in Bank.load(bank).entries]
    only = {str(e["task"]) for e in entries if "task" in e and e.get("split", "train") == "train"} if a.bank else None
    dod, backend = open_dod(a.dod), _backend(a)
    if a.plan:
        return _show(*paraphrases.plan(config, dod, backend, _price(a), only))
    progress = None if a.quiet else _tell
    counts = paraphrases.paraphrase(dod, config, _metered(a, backend), a.out, only=only, progress=progress)
    return _done(a.out, counts, "kept")


# --- what both share -------------------------------------------------------------------------------------------------


def _command(group: Any, name: str, run: Any, about: str, examples: str) -> argparse.ArgumentParser:
    shape = argparse.RawDescriptionHelpFormatter
    p: argparse.ArgumentParser = group.add_parser(
        name, help=about, description=about, epilog=f"examples:{examples}", formatter_class=shape
    )
    p.set_defaults(run=run)
    return p


def _backend_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--backend", choices=("local", "openai"), default="local", help="default: %(default)s")
    p.add_argument(
        "--model", help=f"hub id, folder or packaged name (default: {DEFAULT_MODEL}); for openai the endpoint's name"
    )
    p.add_argument("--base-url", help="of an OpenAI-compatible endpoint; the key comes from OPENAI_API_KEY only")
    p.add_argument("--concurrency", type=int, default=8, help="most requests at a time, for openai (default: %(default)s)")
    p.add_argument("--tokens-field", default="max_tokens", help="newer OpenAI models want max_completion_tokens")
    p.add_argument("--dtype", default="auto", help="dtype of a local model (default: the checkpoint's)")
    p.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda where available)")
    p.add_argument("--plan", action="store_true", help="count requests, tokens and cost; send and write nothing")
    p.add_argument("--prices", type=Path, help='JSON {"model": {"in": 0.15, "out": 0.6}}, dollars per million tokens')
    p.add_argument("--max-dollars", type=float, help="stop before this is passed, earlier runs of --out included")
    p.add_argument("--max-tokens", type=int, help="likewise, prompt and completion tokens")
    p.add_argument("--quiet", action="store_true", help="no progress")


def _given(a: argparse.Namespace, config: Any, **more: Any) -> dict[str, Any]:
    """Arguments that are settings of ``config`` under the same name and were given; ``--max-tokens`` is the budget's."""
    names = {f.name for f in fields(config)} - {"max_tokens"}
    values = {name: getattr(a, name, None) for name in names} | more
    return {name: value for name, value in values.items() if value is not None}


def _backend(a: argparse.Namespace) -> ChatBackend:
    if a.backend == "openai":
        from lm_eval_softverb.endpoints.openai_chat import OpenAIChat

        if not a.model:
            raise ConfigError("--backend openai needs --model, the model's name at the endpoint.")
        return OpenAIChat(a.model, a.base_url, concurrency=a.concurrency, tokens_field=a.tokens_field)
    if a.base_url:
        raise ConfigError("--base-url goes with --backend openai.")
    return _local(a, a.model or DEFAULT_MODEL)


def _local(a: argparse.Namespace, model: str) -> LocalChat:
    from lm_eval_softverb.backbone import Backbone
    from lm_eval_softverb.generators.local_chat import LocalChat

    return LocalChat(Backbone.load(model, dtype=a.dtype, device=a.device))


def _judge(a: argparse.Namespace, backend: ChatBackend) -> Judge | None:
    if not a.filter:
        return None
    from lm_eval_softverb.generators.judging import LikelihoodJudge
    from lm_eval_softverb.generators.local_chat import LocalChat

    if a.filter != SAME:
        return LikelihoodJudge(_local(a, a.filter).backbone, a.filter_margin)
    if not isinstance(backend, LocalChat):
        raise ConfigError(
            f"--filter reads likelihoods, which an endpoint does not give; name a local one: --filter {DEFAULT_MODEL}."
        )
    return LikelihoodJudge(backend.backbone, a.filter_margin)


def _price(a: argparse.Namespace) -> Price:
    from lm_eval_softverb.endpoints.backends import FREE, read_price

    if a.prices:
        return read_price(a.prices, a.model or DEFAULT_MODEL)
    if a.max_dollars is not None:
        raise ConfigError("--max-dollars needs --prices FILE, or the cost is not known.")
    return FREE


def _metered(a: argparse.Namespace, backend: ChatBackend) -> Metered:
    from lm_eval_softverb.endpoints.backends import Metered

    return Metered(backend, _price(a), a.max_dollars, a.max_tokens)


def _show(least: Plan, most: Plan) -> int:
    print(f"If every answer is used:      {least}\nIf every attempt is needed:   {most}\nNothing was sent.")
    return 0


def _tell(there: int, wanted: int, counts: dict[str, int]) -> None:
    print(f"{there}/{wanted}, kept {counts.get('kept', 0)}", flush=True)


def _done(out: Path, counts: dict[str, int], first: str) -> int:
    print("\n".join(f"{name:28}{n:>10,}" for name, n in sorted(counts.items(), key=lambda item: (item[0] != first, item[0]))))
    print(f"Written to {out}")
    return 0
