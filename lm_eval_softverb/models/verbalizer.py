"""``--model verbalizer``: each document names a soft prompt, the answer is that prompt's text.

    lm_eval --model inspect --model_args bank=DIR,source_layer=20,target_layer=1 --tasks verbalize_labels

The tasks ``verbalize_labels`` and ``verbalize_instructions`` take their documents from the bank's manifest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

import lm_eval_softverb
from lm_eval_softverb import storage
from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.bank import Bank
from lm_eval_softverb.batching import Counters, halving
from lm_eval_softverb.errors import ConfigError, DataError, did_you_mean
from lm_eval_softverb.models import ledger as ledgers
from lm_eval_softverb.models.secrets import refuse_secrets
from lm_eval_softverb.pretrained import DEFAULT
from lm_eval_softverb.verbalizers import CONTROLS, KINDS, METHODS
from lm_eval_softverb.verbalizers.base import Verbalization, check_fits, controlled, create, for_bank, settings_of

log = logging.getLogger(__name__)


@register_model("verbalizer")
class VerbalizerLM(LM):
    """A method that turns soft prompts into text, as a model of the harness.

    Args:
        pretrained: base model of the prompts: hub id, folder, or the packaged name ``smollm2-135m``.
        bank: folder of the soft prompts; each document takes the one its ``prompt_field`` names, else the one of its task.
        method: ``inspect``, ``elicit``, ``selfverb``, ``translator`` or ``nearest``; the aliases of ``--model`` fix it.
        kind: ``labels`` or ``instructions`` for documents that do not say what they ask for.
        control: ``random`` reads random vectors of the prompts' norms instead of the prompts.
        control_seed: of these vectors.
        prompt_field: name of the document field with the prompt's name.
        split: entries of the bank to score, or ``all``; read by the tasks.
        force: read prompts with another base model than they were trained on; the results record it.
        settings: of the method, such as ``source_layer`` or ``samples``; see ``softverb verbalize --help``.
    """

    fixed_method: ClassVar[str | None] = None

    def __init__(
        self,
        pretrained: Any = DEFAULT,
        bank: str | None = None,
        method: str | None = None,
        kind: str | None = None,
        control: str = "none",
        control_seed: int = 0,
        prompt_field: str = "prompt_id",
        split: str | None = None,
        force: bool = False,
        dtype: str = "auto",
        revision: str | None = None,
        device: str | None = None,
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        refuse_secrets({"pretrained": pretrained, "bank": bank, "revision": revision, **settings})
        self.method = self._chosen(method)
        for name, value, options in (("kind", kind or KINDS[0], KINDS), ("control", control, CONTROLS)):
            if value not in options:
                raise ConfigError(f"Unknown {name} {value!r}. {did_you_mean(str(value), list(options))}")
        if not bank:
            raise ConfigError("A verbalizer reads the soft prompts of a bank: pass bank=DIR in --model_args.")
        self.kind, self.control = kind, control
        self.prompt_field = prompt_field
        # Small and untrusted first: a wrong setting or prompt is refused before gigabytes of weights are loaded.
        verbalizer = create(self.method, **settings)
        self.bank = Bank.load(bank)
        self.verbalizer = for_bank(verbalizer, self.bank.entries)
        self.prompts = controlled(self.bank.prompts, control, int(control_seed))
        if isinstance(pretrained, Backbone):
            self.backbone = pretrained
        else:
            self.backbone = Backbone.load(str(pretrained), dtype=dtype, device=_device(device), revision=revision)
        fingerprint = self.backbone.fingerprint
        self.overrides = check_fits(self.verbalizer, self.bank.prompts, fingerprint, force=bool(force))
        self.rows = 16 if str(batch_size).startswith("auto") else int(batch_size)
        self.counters = Counters()
        self.ledger: ledgers.Ledger | None = None
        self.answers: dict[str, Verbalization] = {}

    def _chosen(self, method: str | None) -> str:
        wanted = self.fixed_method or method
        if wanted is None:
            raise ConfigError(f"--model verbalizer needs method= in --model_args: one of {', '.join(METHODS)}.")
        if method not in (None, wanted):
            raise ConfigError(f"--model {wanted} has its method already; leave out method={method}, or use --model verbalizer.")
        return str(wanted)

    # --- identity ----------------------------------------------------------------------------------------------------

    @property
    def identity(self) -> str:
        """Hash of what decides a text beside the prompt: method, settings, base model, dtype, code version."""
        base = self.backbone.fingerprint
        model = [sorted(base.sketch.items()), base.tokenizer_sha256, str(self.backbone.dtype)]
        template = str(self.backbone.tokenizer.chat_template)
        return storage.sha256_json([lm_eval_softverb.__version__, settings_of(self.verbalizer), model, template])

    def get_model_info(self) -> dict[str, Any]:
        """Merged into the harness's results."""
        fingerprint = self.backbone.fingerprint
        return {
            "verbalizer": {
                "version": lm_eval_softverb.__version__,
                **settings_of(self.verbalizer),
                "control": self.control,
                "bank": self.bank.source,
                "n_prompts": len(self.prompts),
                "base_model": {
                    "name": fingerprint.name,
                    "hidden_size": fingerprint.hidden_size,
                    "tokenizer_sha256": fingerprint.tokenizer_sha256,
                    "dtype": str(self.backbone.dtype),
                    "identity": self.identity,
                },
                "forced_despite": self.overrides,
                "n_from_cache": self.counters.from_cache,
                "n_out_of_memory_splits": self.counters.out_of_memory,
                "cache_quarantined": self.ledger.quarantined if self.ledger else None,
                "n_cache_unreadable": self.ledger.unreadable if self.ledger else 0,
                "answers": {name: {"confidence": a.confidence, **a.details} for name, a in sorted(self.answers.items())},
            }
        }

    @property
    def tokenizer_name(self) -> str:
        """Part of the name under which the harness caches rendered requests; ours do not depend on a tokenizer."""
        return "verbalizer"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """A document is the name of a prompt; there is nothing to render."""
        return ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return "\n".join(message["content"] for message in chat_history)

    # --- requests ----------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        raise ConfigError(
            "A verbalizer writes texts and scores none. Use the tasks verbalize_labels and verbalize_instructions, or "
            "--model softprompt to score the prompts themselves."
        )

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        self.loglikelihood(requests)
        return []

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        identity = self.identity

        def key(request: Instance, _repeat: int) -> str:
            return storage.sha256_json([identity, self.prompts[self._place(request)].id, *self._wanted(request)])

        def compute(part: list[Instance], done: Callable[[int, Verbalization], None]) -> list[Verbalization]:
            return self._verbalize(part, done, disable_tqdm)

        found, cached = ledgers.answered(
            self.ledger, requests, key, compute, restore=Verbalization.from_json, store=Verbalization.to_json
        )
        self.counters.from_cache += cached
        for request, answer in zip(requests, found, strict=True):
            self.answers[str(self.bank.entries[self._place(request)]["prompt_id"])] = answer
        return [
            str(postprocess_generated_text(a.text, self._settings(r)["until"], None))
            for r, a in zip(requests, found, strict=True)
        ]

    def _verbalize(
        self, requests: list[Instance], done: Callable[[int, Verbalization], None], disable_tqdm: bool
    ) -> list[Verbalization]:
        groups: dict[tuple[str, int], list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(self._wanted(request), []).append(i)
        answers: dict[int, Verbalization] = {}
        with tqdm(total=len(requests), desc=f"{self.method}: prompts", disable=disable_tqdm) as bar:
            for (kind, new), members in groups.items():

                def run(part: Any, kind: Any = kind, new: int = new) -> list[tuple[int, Verbalization]]:
                    prompts = [self.prompts[self._place(requests[i])] for i in part]
                    texts = self.verbalizer.verbalize(self.backbone, prompts, kind=kind, max_new_tokens=new)
                    return [(i, found[0]) for i, found in zip(part, texts, strict=True)]

                for start in range(0, len(members), self.rows):
                    for i, answer in halving(run, members[start : start + self.rows], self.counters):
                        answers[i] = answer
                        done(i, answer)
                        bar.update()
        return [answers[i] for i in range(len(requests))]

    def _place(self, request: Instance) -> int:
        """Index of the prompt of one request.

        Raises:
            DataError: the document's ground truth is not this bank's: the harness's --cache_requests reuses the documents of
                whatever bank came first.
        """
        doc = request.doc or {}
        place = self.bank.place(doc, request.task_name, self.prompt_field)
        entry = self.bank.entries[place]
        truth = {"labels": entry.get("labels") and ", ".join(entry["labels"]), "instructions": entry.get("instruction")}
        known = truth.get(str(doc.get("kind")))
        if "target" in doc and doc["target"] != known and "truth_sha256" not in entry:
            raise DataError(
                f"The document for prompt {entry['prompt_id']!r} has the ground truth {doc['target']!r}, the bank "
                f"{self.bank.source} has {known!r}. Run without --cache_requests, or delete its cache."
            )
        return place

    def _wanted(self, request: Instance) -> tuple[str, int]:
        """Kind of text and most new tokens of one request."""
        doc: Mapping[str, Any] = request.doc or {}
        kind = doc.get("kind", self.kind)
        if kind not in KINDS:
            raise DataError(
                f"Task {request.task_name}: a document says kind {kind!r}, expected {' or '.join(KINDS)}. Use the tasks "
                "verbalize_labels and verbalize_instructions, or pass kind= in --model_args."
            )
        return str(kind), int(self._settings(request)["max_gen_toks"])

    def _settings(self, request: Instance) -> dict[str, Any]:
        settings = dict(normalize_gen_kwargs(request.args[1], 40))
        until = settings.get("until") or []
        if settings.get("do_sample") or settings.get("temperature"):
            raise ConfigError(
                "Sampling is a setting of the method: pass samples= and temperature= in --model_args (method selfverb), not "
                "--gen_kwargs."
            )
        return {"max_gen_toks": settings["max_gen_toks"], "until": [until] if isinstance(until, str) else list(until)}


def _device(name: str | None) -> str | None:
    """The harness asks for ``cuda:0`` by default, also where torch has no CUDA."""
    return None if name is None or (name.startswith("cuda") and not torch.cuda.is_available()) else name


@register_model("inspect")
class InspectLM(VerbalizerLM):
    """``--model inspect``: InSPEcT; see :class:`~lm_eval_softverb.verbalizers.inspect_grid.Inspect` for its settings."""

    fixed_method = "inspect"


@register_model("elicit")
class ElicitLM(VerbalizerLM):
    """``--model elicit``: what a prompt answers to neutral inputs; see :class:`~lm_eval_softverb.verbalizers.elicit.Elicit`."""

    fixed_method = "elicit"


@register_model("selfverb")
class SelfVerbLM(VerbalizerLM):
    """``--model selfverb``: self-verbalization; see :class:`~lm_eval_softverb.verbalizers.selfverb.SelfVerb`."""

    fixed_method = "selfverb"


@register_model("nearest")
class NearestLM(VerbalizerLM):
    """``--model nearest``: nearest tokens; see :class:`~lm_eval_softverb.verbalizers.nearest.Nearest`."""

    fixed_method = "nearest"


@register_model("translator")
class TranslatorLM(VerbalizerLM):
    """``--model translator``: a trained one; see :class:`~lm_eval_softverb.verbalizers.translator.Translator`."""

    fixed_method = "translator"
