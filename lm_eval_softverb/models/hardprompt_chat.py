"""``--model hardprompt-chat``: any OpenAI-compatible chat model, with a text where a soft prompt would stand.

    lm_eval --model hardprompt-chat --model_args model=gpt-4o-mini,prompt_file=texts.jsonl --tasks dod_classification \
            --use_cache FILE

The key comes from ``OPENAI_API_KEY`` only. With ``--use_cache`` every answer is kept as it arrives, so that the same command
goes on after a kill, a spent budget or an exhausted quota and asks nothing twice.
"""

from __future__ import annotations

import inspect
import json
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

import lm_eval_softverb
from lm_eval_softverb import storage
from lm_eval_softverb.endpoints.backends import FREE, ChatRequest, Metered, Plan, Reply, read_price
from lm_eval_softverb.endpoints.openai_chat import OpenAIChat
from lm_eval_softverb.errors import BackendError, ConfigError, PlanOnly
from lm_eval_softverb.models import ledger as ledgers
from lm_eval_softverb.models import unscored
from lm_eval_softverb.models.hardprompts import HardPrompts, refuse_arguments, with_prompt
from lm_eval_softverb.models.unscored import Unscored

log = logging.getLogger(__name__)
HOPELESS = 32
"""So many answers in a row without a usable one end the run: the rest would cost hours, or money, for nothing."""
_KNOWN_SETTINGS = frozenset({"until", "max_gen_toks", "temperature", "do_sample", "top_p"})
_HARNESS = ("batch_size", "max_batch_size", "device")


@register_model("hardprompt-chat")
class HardPromptChatLM(LM):
    """A chat model behind an endpoint; generation only.

    Args:
        model: as the endpoint calls it.
        prompt_file, template, prompt_field: as for ``--model hardprompt``; ``template=system`` needs no chat template here.
        base_url: of the endpoint, e.g. ``http://127.0.0.1:8000/v1``; default: OpenAI's.
        concurrency: most requests under way at a time.
        timeout: seconds per attempt.
        attempts: how often one request is sent at most.
        temperature: where a task says nothing else.
        tokens_field: newer OpenAI models want ``max_completion_tokens``.
        prices: JSON file ``{"model": {"in": dollars, "out": dollars}}`` per million tokens.
        max_dollars, max_tokens_total: hard limits, over this run and what its cached answers cost.
        plan: count what a run would send, and stop with :class:`~lm_eval_softverb.errors.PlanOnly` before sending.
    """

    def __init__(
        self,
        model: str = "gpt-4o-mini",
        prompt_file: str | None = None,
        template: str | None = None,
        prompt_field: str = "prompt_id",
        base_url: str | None = None,
        concurrency: int = 8,
        timeout: float = 120.0,
        attempts: int = 5,
        temperature: float = 0.0,
        tokens_field: str = "max_tokens",
        prices: str | None = None,
        max_dollars: float | None = None,
        max_tokens_total: int | None = None,
        plan: bool = False,
        **others: Any,
    ) -> None:
        super().__init__()
        strings = {"model": model, "base_url": base_url, "prompt_file": prompt_file, "prices": prices}
        known = [name for name in inspect.signature(HardPromptChatLM).parameters if name != "others"]
        refuse_arguments(strings | {k: v for k, v in others.items() if k not in _HARNESS}, known)
        if max_dollars is not None and not prices:
            raise ConfigError("max_dollars needs prices=FILE, or the cost is not known.")
        self.hard = HardPrompts.read(prompt_file, template, prompt_field)
        self.price = read_price(Path(prices), str(model)) if prices else None
        self.backend = OpenAIChat(
            str(model),
            base_url,
            concurrency=int(concurrency),
            attempts=int(attempts),
            timeout=float(timeout),
            tokens_field=tokens_field,
        )
        self.meter = Metered(self.backend, self.price or FREE, max_dollars, max_tokens_total)
        self.temperature, self.plan = float(temperature), bool(plan)
        self.chat = False
        self.ledger: ledgers.Ledger | None = None
        self.from_cache = 0
        self.seconds = 0.0
        self.replies: list[Reply] = []
        self.unscored: dict[str, int] = {}
        self.ignored: set[str] = set()

    # --- identity and rendering --------------------------------------------------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        """Asked for only when requests are rendered as chats, also when they then come from the harness's cache."""
        self.chat = True
        return "hardprompt-chat"

    def chat_template(self, chat_template: bool | str = False) -> str:
        return ""  # the endpoint's own

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as JSON; the harness passes strings only."""
        self.chat = True
        return json.dumps([dict(m) for m in chat_history], ensure_ascii=False)

    def get_model_info(self) -> dict[str, Any]:
        """Merged into the harness's results. Tokens and cost include those of cached answers, when they were asked."""
        usage = self.meter.usage
        seconds = [r.seconds for r in self.replies if not r.refusal]
        return {
            "hardprompt": self.hard.to_json(),
            "endpoint": {
                "version": lm_eval_softverb.__version__,
                **self.backend.identity(),
                "served_model": ", ".join(sorted({r.model for r in self.replies if r.model})),
                "temperature": self.temperature,
                "requests": usage.requests,
                "retries": usage.attempts - (usage.requests - self.from_cache),
                "usage": {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens},
                "cost": usage.dollars if self.price else None,
                "seconds": self.seconds,
                "median_latency": statistics.median(seconds) if seconds else None,
                "unscored": sum(self.unscored.values()),
                "unscored_by_task": self.unscored,
                "refused": dict(usage.refused),
                "n_cut_by_length": sum(r.finish == "length" for r in self.replies),
                "n_from_cache": self.from_cache,
                "ignored_settings": sorted(self.ignored),
                "cache_quarantined": self.ledger.quarantined if self.ledger else None,
                "n_cache_unreadable": self.ledger.unreadable if self.ledger else 0,
            },
        }

    # --- requests ----------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        tasks = sorted({str(r.task_name) for r in requests})
        twins = [t.removesuffix("_mc") for t in tasks if t.endswith("_mc")]
        advice = f"use the generation tasks {', '.join(twins)}" if twins else "use generate_until tasks"
        raise ConfigError(f"Chat endpoints give no log-likelihoods, which {', '.join(tasks)} need; {advice}.")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        self.loglikelihood(requests)
        return []

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        repeats: dict[int, int] = {}
        asked = []
        for request in requests:
            repeat = repeats[id(request)] = repeats.get(id(request), -1) + 1
            asked.append(self._asked(request, repeat))
        identity = {**self.backend.identity(), "tokens_field": self.backend.tokens_field}

        def key(request: ChatRequest, repeat: int) -> str:
            return storage.sha256_json([identity, asdict(request), repeat])

        def restore(value: Any) -> Reply:
            reply = Reply.from_json(value)
            self.meter.add_earlier(1, reply.prompt_tokens, reply.completion_tokens)
            self.replies.append(reply)
            return reply

        if self.ledger is None and not self.plan:
            log.warning("Without --use_cache an interrupted run asks, and pays for, everything again.")
        began = time.monotonic()

        def compute(part: list[ChatRequest], done: Callable[[int, Reply], None]) -> list[Reply]:
            return self._send(part, done, disable_tqdm)

        replies, found = ledgers.answered(self.ledger, asked, key, compute, restore, asdict)
        self.seconds += time.monotonic() - began
        self.from_cache += found
        self.hard.count(requests)
        answers = [self._text(r, reply) for r, reply in zip(requests, replies, strict=True)]
        self.unscored = unscored.count(requests, answers)
        for task, n in self.unscored.items():
            log.warning("%s: %d documents have no usable answer and are left out of its scores", task, n)
        return answers

    def _send(self, asked: Sequence[ChatRequest], done: Callable[[int, Reply], None], quiet: bool) -> list[Reply]:
        if self.plan:
            prompt, completion = sum(map(self.backend.count, asked)), sum(r.max_tokens for r in asked)
            plan = Plan(len(asked), prompt, completion, self.meter.price.of(prompt, completion))
            raise PlanOnly(f"{plan if self.price else str(plan).rpartition(', at most $')[0]}. Nothing was sent.", plan)
        replies: dict[int, Reply] = {}
        failed = 0
        with tqdm(total=len(asked), desc=f"Asking {self.backend.name}", disable=quiet) as bar:
            for i, reply in self.meter.stream(asked):
                replies[i] = reply
                self.replies.append(reply)
                if not reply.refusal:
                    done(i, reply)
                failed = failed + 1 if reply.refusal else 0
                if failed == HOPELESS:
                    raise BackendError(
                        f"The last {failed} requests to {self.backend.base_url} got no usable answer (last reason: "
                        f"{reply.refusal}). Check the endpoint; with --use_cache the same command goes on.",
                        list(replies.values()),
                    )
                bar.update()
        return [replies[i] for i in range(len(asked))]

    def _asked(self, request: Instance, repeat: int) -> ChatRequest:
        text, settings = request.args[0], dict(normalize_gen_kwargs(request.args[1]))
        self.ignored |= settings.keys() - _KNOWN_SETTINGS
        given = {"temperature", "do_sample"} & request.args[1].keys()
        messages = json.loads(text) if self.chat else [{"role": "user", "content": text}]
        if self.hard:
            messages = with_prompt(messages, self.hard.template, self.hard.text(self.hard.name(request)))
        temperature = float(settings["temperature"]) if given else self.temperature
        return ChatRequest(
            tuple(messages),
            max_tokens=int(settings["max_gen_toks"]),
            temperature=temperature,
            top_p=float(settings.get("top_p", 1.0)),
            seed=repeat,
        )

    def _text(self, request: Instance, reply: Reply) -> str:
        """The answer up to the first stop sequence, cut here as for local models: an endpoint takes four at most."""
        if reply.text is None:
            return Unscored.because(reply.refusal)
        return str(postprocess_generated_text(reply.text, request.args[1].get("until"), None))


ledgers.install()
