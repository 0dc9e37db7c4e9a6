"""``--model softprompt``: a frozen model of transformers read with a soft prompt, scored by lm-evaluation-harness.

    lm_eval --model softprompt --model_args pretrained=smollm2-135m,peft=DIR --tasks softverb_sst2_mc

The stock model is run, not PEFT's wrapper. Without ``peft=`` and ``bank=`` there is no prompt, which is the control.
"""

from __future__ import annotations

import logging
from collections import Counter as Tally
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

import lm_eval_softverb
from lm_eval_softverb import storage
from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.bank import Bank
from lm_eval_softverb.batching import Counters
from lm_eval_softverb.chat import render_chat
from lm_eval_softverb.errors import ConfigError, DataError, FrameError
from lm_eval_softverb.models import ledger as ledgers
from lm_eval_softverb.models.generating import answer_generations
from lm_eval_softverb.models.scoring import Ids, loglikelihoods, seq2seq_loglikelihoods, supports_branching
from lm_eval_softverb.models.secrets import refuse_secrets
from lm_eval_softverb.models.slots import Slots
from lm_eval_softverb.pretrained import DEFAULT, loading, locate
from lm_eval_softverb.prompt import SoftPrompt

log = logging.getLogger(__name__)
Kind = Literal["loglikelihood", "loglikelihood_rolling", "generate_until"]


@register_model("softprompt")
class SoftPromptLM(HFLM):
    """HFLM whose every request is read with the vectors of a soft prompt in their place.

    Args:
        pretrained: hub id, folder, or the packaged name ``smollm2-135m``.
        peft: folder (or hub id) of one soft prompt.
        bank: folder of many; each document takes the one its ``prompt_field`` names, else the one of its task.
        prompt_field: name of that document field.
        force: score a prompt on another base model or tokenizer than it was trained on; the results record it.
        kwargs: everything else HFLM takes (``dtype``, ``device``, ``batch_size``, ``max_length``, …).
    """

    def __init__(
        self,
        pretrained: Any = DEFAULT,
        peft: str | None = None,
        bank: str | None = None,
        prompt_field: str = "prompt_id",
        force: bool = False,
        **kwargs: Any,
    ) -> None:
        refuse_secrets({"pretrained": pretrained, "peft": peft, "bank": bank, **kwargs})
        if peft and bank:
            raise ConfigError("Pass peft=DIR for one soft prompt or bank=DIR for many, not both.")
        # Prompts are small and untrusted: refuse a bad one before gigabytes of weights are loaded.
        self.bank = Bank.load(bank) if bank else None
        self.prompts = self.bank.prompts if self.bank else (SoftPrompt.load(str(peft)),) if peft else ()
        self.prompt_field = prompt_field
        # HFLM's default is "cuda", which fails where torch has no CUDA.
        kwargs["device"] = kwargs.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
        name = pretrained if isinstance(pretrained, str) else str(getattr(pretrained, "name_or_path", ""))
        if isinstance(pretrained, str):
            with loading(pretrained):
                super().__init__(pretrained=locate(pretrained), **kwargs)
        else:
            super().__init__(pretrained=pretrained, **kwargs)
        self.backbone = Backbone(self.model, self.tokenizer, name, self.revision)
        fingerprint = self.backbone.fingerprint
        self.overrides = {p.id: d for p in self.prompts if (d := p.check_fits(fingerprint, force=bool(force)))}
        for name, differences in self.overrides.items():
            log.warning("force=true: scoring %s on another base model (%s)", name, "; ".join(differences))
        self.rows = self.backbone.stack(self.prompts)
        self.branching = supports_branching(self.backbone)
        self.counters = Counters()
        self.slots = Slots(self, self.prompts, self.counters)
        self.ledger: ledgers.Ledger | None = None

    # --- identity ----------------------------------------------------------------------------------------------------

    @property
    def max_length(self) -> int:
        """Room for text: the model's context less the virtual tokens of the longest prompt."""
        return self.window - max((p.n for p in self.prompts), default=0)

    @property
    def window(self) -> int:
        return int(super().max_length)

    @property
    def bos_token_id(self) -> int | None:
        return self.tokenizer.bos_token_id  # type: ignore[no-any-return]

    @property
    def identity(self) -> str:
        """Hash of what decides an answer beside the request and its prompt: base model, dtype, context, code version."""
        base = self.backbone.fingerprint
        return storage.sha256_json(
            [
                lm_eval_softverb.__version__,
                sorted(base.sketch.items()),
                [base.tokenizer_sha256, str(self.model.dtype), self.window, str(self.softmax_dtype)],
                str(self.mixed_precision_dtype),
                [self.add_bos_token, self.custom_prefix_token_id, self.truncation, self.think_end_token],
                str(self.tokenizer.chat_template) if self.slots.chat else None,
            ]
        )

    @property
    def tokenizer_name(self) -> str:
        """Name under which the harness caches rendered requests; a frame changes them, so the prompts are part of it.

        The harness asks for it only when requests are rendered by the chat template, also when it then takes them from its
        cache: from here on texts carry the slot mark.
        """
        self.slots.chat = True
        return "--".join([super().tokenizer_name, "softverb", self._prompts_id()])

    def _prompts_id(self) -> str:
        ids = [p.id for p in self.prompts]
        return ids[0] if len(ids) == 1 else f"{len(ids)}-{storage.sha256_json(ids)[:16]}"

    def get_model_info(self) -> dict[str, Any]:
        """HFLM's facts and ours: which prompt, on which weights, forced or not, and what was cut or split on the way."""
        one = self.prompts[0] if len(self.prompts) == 1 else None
        fingerprint = self.backbone.fingerprint
        return {
            **super().get_model_info(),
            "softprompt": {
                "version": lm_eval_softverb.__version__,
                "prompts": self._prompts_id() if self.prompts else "none",
                "bank": self.bank.source if self.bank else None,
                "virtual_tokens": sorted({p.n for p in self.prompts}),
                "frame": one.frame.to_json() if one else None,
                "info": dict(one.info) if one else None,
                "base_model": {
                    "name": fingerprint.name,
                    "hidden_size": fingerprint.hidden_size,
                    "tokenizer_sha256": fingerprint.tokenizer_sha256,
                    "identity": self.identity,
                },
                "forced_despite": self.overrides,
                "n_truncated": self.counters.truncated,
                "n_from_cache": self.counters.from_cache,
                "n_out_of_memory_splits": self.counters.out_of_memory,
                "n_system_folded": self.counters.system_folded,
                "cache_quarantined": self.ledger.quarantined if self.ledger else None,
                "n_cache_unreadable": self.ledger.unreadable if self.ledger else 0,
                "branching": self.branching,
            },
        }

    # --- rendering ---------------------------------------------------------------------------------------------------

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """HFLM's, with the prompt's frame in the last user turn; a system message is folded in, never dropped."""
        self.slots.chat = True
        frames = {p.frame if p.frame.in_user_turn else None for p in self.prompts}
        if len(frames) > 1:
            raise FrameError(
                f"Bank {self.bank.source if self.bank else ''} holds prompts of {len(frames)} different frames, but a chat is "
                "rendered before its prompt is known. Score prompts of one frame at a time."
            )
        frame = next(iter(frames), None)
        messages = frame.wrap_chat(chat_history) if frame else chat_history
        text, folded = render_chat(self.tokenizer, messages, add_generation_prompt, self.chat_template_args)
        self.counters.system_folded += folded
        return text

    # --- requests ----------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        if self.enable_thinking:
            raise ConfigError("enable_thinking=true does not go with log-likelihood tasks; use generate_until tasks.")

        def compute(part: list[Instance], done: Callable[[int, tuple[float, bool]], None]) -> list[tuple[float, bool]]:
            pairs = [self.slots.request(r.args[0], r.args[1], self._place(r)) for r in part]
            return self._score(pairs, done, "loglikelihood", disable_tqdm)

        return self._answer("loglikelihood", requests, compute, restore=lambda v: (float(v[0]), bool(v[1])))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        def compute(part: list[Instance], done: Callable[[int, float], None]) -> list[float]:
            pairs: list[tuple[Ids, Ids]] = []
            owner: list[int] = []
            added_bos = any(p.frame.placement == "after_bos" for p in self.prompts)
            for i, request in enumerate(part):
                windows = utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length - added_bos,
                    context_len=1,
                )
                for context, continuation in map(utils.make_disjoint_window, windows):
                    pairs.append((tuple(self.slots.lead(list(context), self._place(request))), tuple(continuation)))
                    owner.append(i)
            totals, left = [0.0] * len(part), Tally(owner)

            def window_done(index: int, answer: tuple[float, bool]) -> None:
                i = owner[index]
                totals[i] += answer[0]
                left[i] -= 1
                if left[i] == 0:
                    done(i, totals[i])

            self._score(pairs, window_done, "loglikelihood_rolling", disable_tqdm)
            return totals

        return self._answer("loglikelihood_rolling", requests, compute)

    def _score(
        self,
        pairs: Sequence[tuple[Ids, Ids]],
        done: Callable[[int, tuple[float, bool]], None],
        kind: Kind,
        disable_tqdm: bool,
    ) -> list[tuple[float, bool]]:
        for context, continuation in pairs:
            if not context or not continuation:
                raise DataError(f"A request has {len(context)} context and {len(continuation)} continuation tokens.")
        causal = self.backend == "causal"
        fitted = [(self.slots.fit(c, self.window + 1 - len(t) if causal else self.window), t) for c, t in pairs]
        with self._bar(len(pairs), kind, disable_tqdm) as bar, torch.no_grad(), self.cast():

            def report(index: int, answer: tuple[float, bool]) -> None:
                done(index, answer)
                bar.update()

            settings: dict[str, Any] = {
                "batch_size": self.rows_per_batch,
                "counters": self.counters,
                "softmax_dtype": self.softmax_dtype,
                "done": report,
            }
            if not causal:
                return seq2seq_loglikelihoods(self.backbone, self.rows, fitted, **settings)
            return loglikelihoods(self.backbone, self.rows, fitted, branching=self.branching, **settings)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        def compute(part: list[Instance], done: Callable[[int, str], None]) -> list[str]:
            answers = [""] * len(part)
            groups: dict[str, list[int]] = {}
            for i, request in enumerate(part):
                groups.setdefault(storage.sha256_json(request.args[1]), []).append(i)
            with self._bar(len(part), "generate_until", disable_tqdm) as bar:
                for members in groups.values():

                    def report(index: int, answer: str, members: list[int] = members) -> None:
                        answers[members[index]] = answer
                        done(members[index], answer)
                        bar.update()

                    same = [part[i] for i in members]
                    answer_generations(self, same, [self._place(r) for r in same], report)
            return answers

        return self._answer("generate_until", requests, compute)

    # --- plumbing ----------------------------------------------------------------------------------------------------

    def _place(self, request: Instance) -> int | None:
        """Index of the prompt of one request; None without prompts."""
        if self.bank:
            return self.bank.place(request.doc or {}, request.task_name, self.prompt_field)
        return 0 if self.prompts else None

    def _prompt_key(self, request: Instance) -> str | None:
        place = self._place(request)
        return None if place is None else self.prompts[place].id

    def _bar(self, total: int, kind: Kind, disable: bool) -> tqdm[Any]:
        return tqdm(total=total, desc=f"Running {kind} requests", disable=disable or self.rank != 0)

    @property
    def rows_per_batch(self) -> int | None:
        """Rows per forward pass; None (``batch_size=auto``) packs by tokens. Either is halved when memory runs out."""
        return None if str(self.batch_size).startswith("auto") else int(self.batch_size)

    def cast(self) -> torch.autocast:
        wanted = self.mixed_precision_dtype
        return torch.autocast(device_type=self.device.type, dtype=wanted, enabled=wanted is not None)

    def _answer(
        self,
        kind: Kind,
        requests: list[Instance],
        compute: Callable[[list[Instance], Callable[[int, Any], None]], list[Any]],
        restore: Callable[[Any], Any] = lambda v: v,
    ) -> list[Any]:
        """Answers from the ledger where they are, computed otherwise; see :mod:`lm_eval_softverb.models.ledger`."""
        identity = self.identity

        def key(request: Instance, repeat: int) -> str | None:
            if kind == "generate_until" and request.args[1].get("do_sample"):
                return None  # the harness never caches sampled answers either
            return storage.sha256_json([identity, self._prompt_key(request), kind, list(request.args), repeat])

        answers, found = ledgers.answered(self.ledger, requests, key, compute, restore)
        self.counters.from_cache += found
        return answers


ledgers.install()
