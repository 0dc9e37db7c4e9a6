"""``--model hardprompt``: a frozen model of transformers with a text where a soft prompt would stand.

    lm_eval --model hardprompt --model_args pretrained=smollm2-135m,prompt_file=texts.jsonl --tasks dod_classification

Without ``prompt_file=`` there is no prompt: the control, equal to ``--model hf``.
"""

from __future__ import annotations

from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model

from lm_eval_softverb import storage
from lm_eval_softverb.batching import Counters, shared_length
from lm_eval_softverb.chat import render_chat
from lm_eval_softverb.errors import ConfigError, DataError
from lm_eval_softverb.frame import SLOT, escape, mark_slots, split_slots
from lm_eval_softverb.models.hardprompts import BREAK, SYSTEM, HardPrompts, refuse_arguments, with_prompt
from lm_eval_softverb.models.scoring import Ids
from lm_eval_softverb.models.slots import Slots, Tokenizes
from lm_eval_softverb.models.softprompt import SoftPromptLM
from lm_eval_softverb.pretrained import DEFAULT


class Headed(tuple[int, ...]):
    """Token ids of a context that begins with ``head``, a text that is never cut."""

    head: str

    @classmethod
    def of(cls, ids: Ids, head: str) -> Headed:
        found = cls(ids)
        found.head = head
        return found


class TextSlots(Slots):
    """Encodes requests with a text in the slot; everything is tokenized as one string, exactly as if it had stood there."""

    def __init__(self, lm: Tokenizes, hard: HardPrompts, counters: Counters) -> None:
        super().__init__(lm, (), counters)
        self.hard = hard
        self.names = list(hard.texts) or [""]

    def fill(self, text: str, place: int | None) -> tuple[str, str]:
        """``text`` with its prompt, in two parts: up to where the document begins, and the rest."""
        if place is None:
            return "", text
        prompt = self.hard.text(self.names[place])
        if not self.chat:
            return prompt + BREAK, text
        before, between, document = split_slots(text, 2)
        return before + prompt + between, document

    def whole(self, text: str, place: int | None) -> Ids:
        head, rest = self.fill(text, place)
        return Headed.of(super().whole(head + rest, None), head)

    def request(self, context: str, continuation: str, place: int | None) -> tuple[Ids, Ids]:
        head, rest = self.fill(context, place)
        ids, target = super().request(head + rest, continuation, None)
        return Headed.of(ids, head), target

    def fit(self, context: Ids, room: int) -> Ids:
        head, excess = getattr(context, "head", ""), len(context) - room
        if not head or excess <= 0:
            return super().fit(context, room)
        ids = self.lm.tok_encode(head)
        kept = shared_length([ids, context])
        kept += kept < len(ids)  # a token may belong to both parts
        if kept + excess >= len(context):
            raise DataError(
                f"The prompt takes {kept} of {room} tokens that the model's context of {self.lm.window} leaves, and nothing of "
                "the document would be left. A prompt is never cut: shorten it or max_gen_toks."
            )
        self.counters.truncated += 1
        return context[:kept] + context[kept + excess :]


@register_model("hardprompt")
class HardPromptLM(SoftPromptLM):
    """HFLM whose every request is read with a text in front of it.

    Args:
        pretrained: hub id, folder, or the packaged name ``smollm2-135m``.
        prompt_file: a ``.txt`` with one text for all documents, or a ``.jsonl`` as ``softverb verbalize`` writes it: each
            document takes the text its ``prompt_field`` names, else the one of its task.
        template: ``paper`` (text, blank line, document; few-shot examples belong to the document) or ``system`` (as system
            message; needs --apply_chat_template).
        prompt_field: name of that document field.
        kwargs: everything else HFLM takes.
    """

    def __init__(
        self,
        pretrained: Any = DEFAULT,
        prompt_file: str | None = None,
        template: str | None = None,
        prompt_field: str = "prompt_id",
        **kwargs: Any,
    ) -> None:
        refuse_arguments(kwargs)
        for name in ("peft", "bank", "force"):
            if name in kwargs:
                raise ConfigError(f"{name}= belongs to --model softprompt; --model hardprompt takes prompt_file=FILE.")
        self.hard = HardPrompts.read(prompt_file, template, prompt_field)
        super().__init__(pretrained, **kwargs)
        self.slots: TextSlots = TextSlots(self, self.hard, self.counters)
        self._places = {name: i for i, name in enumerate(self.slots.names)}

    def _place(self, request: Instance) -> int | None:
        return self._places[self.hard.name(request)] if self.hard else None

    def _prompt_key(self, request: Instance) -> str | None:
        if not self.hard:
            return None
        return storage.sha256_json([self.hard.template, self.hard.text(self.hard.name(request))])

    def _prompts_id(self) -> str:
        return f"hard-{self.hard.template}"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """With marks where the prompt and the document begin: the chat is rendered before its prompt is known."""
        self.slots.chat = True
        messages = chat_history
        if self.hard:
            mark = mark_slots(SLOT)
            escaped = [{**m, "content": escape(m["content"])} for m in chat_history]
            messages = with_prompt(escaped, self.hard.template, mark, mark)
        text, folded = render_chat(self.tokenizer, messages, add_generation_prompt, self.chat_template_args)
        self.counters.system_folded += folded
        return text

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        if self.hard:
            raise ConfigError(
                "A rolling log-likelihood reads windows of a text, which have no slot for a prompt. Leave it out."
            )
        return super().loglikelihood_rolling(requests, disable_tqdm)

    def _answer(self, kind: Any, requests: list[Instance], compute: Any, restore: Any = lambda v: v) -> list[Any]:
        if self.hard.template == SYSTEM and not self.slots.chat:
            raise ConfigError("template=system puts the text into a system message; pass --apply_chat_template.")
        answers = super()._answer(kind, requests, compute, restore)
        self.hard.count(requests)
        return answers

    def get_model_info(self) -> dict[str, Any]:
        """HFLM's facts and ours: which texts, how many tokens they take, and what was cut on the way."""
        info = super().get_model_info()
        facts = info.pop("softprompt")
        for name in ("prompts", "bank", "virtual_tokens", "frame", "info", "forced_despite"):
            del facts[name]
        tokens = {
            name or "(all)": len(self.tok_encode(self.hard.text(name), add_special_tokens=False))
            for name in sorted(self.hard.used)
        }
        return {**info, "hardprompt": {**facts, **self.hard.to_json(), "tokens_added": tokens}}
