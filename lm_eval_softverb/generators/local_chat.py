"""A chat model in process: requests in batches, each with a random stream of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.batching import Counters, batches, halving, shared_length
from lm_eval_softverb.chat import render_chat
from lm_eval_softverb.decoding import Sampling, generate, kv_bytes
from lm_eval_softverb.endpoints.backends import ChatRequest, Reply
from lm_eval_softverb.errors import ConfigError
from lm_eval_softverb.verbalizers.selfverb import end_of_turn_ids

# Answers are long and contexts short: a step costs little more for many rows than for few.
KV_BUDGET, MOST_ROWS = 1 << 30, 256
TOP_K = 50
"""What servers of local models draw among unless they are told otherwise; finding top_p among all words takes longer than
the model."""


class LocalChat:
    """A :class:`~lm_eval_softverb.backbone.Backbone` that answers chats.

    Without a chat template the turns are plain text, ``Question: … Answer: …``, and an answer ends where the model begins
    the next question.

    Attributes:
        counters: system turns folded, memory run out.

    Raises:
        ConfigError: the model is no decoder-only one.
    """

    def __init__(self, backbone: Backbone, batch_size: int | None = None) -> None:
        if backbone.is_seq2seq or not backbone.has_keys:
            raise ConfigError(f"{backbone.name} is no decoder-only model with keys and values; it cannot answer chats here.")
        self.backbone = backbone
        self.name = backbone.name
        self.counters = Counters()
        self._batch_size = batch_size
        self._ends = end_of_turn_ids(backbone)
        self._rows = backbone.stack([])

    def identity(self) -> dict[str, Any]:
        fingerprint = self.backbone.fingerprint
        weights = [sorted(fingerprint.sketch.items()), fingerprint.tokenizer_sha256]
        return {"backend": "local", "model": self.name, "weights": weights, "dtype": str(self.backbone.dtype)}

    def events(self) -> dict[str, int]:
        return {"out_of_memory": self.counters.out_of_memory, "system_folded": self.counters.system_folded}

    def count(self, request: ChatRequest) -> int:
        return len(self.encode(request.messages))

    def complete(self, requests: Sequence[ChatRequest]) -> list[Reply]:
        """Replies in the order of ``requests``; equal settings share batches.

        Raises:
            ConfigError: a request and its answer do not fit the model's context.
        """
        contexts = [self.encode(r.messages) for r in requests]
        needs = [len(c) + r.max_tokens for c, r in zip(contexts, requests, strict=True)]
        self.backbone.check_room(max(needs, default=0), "Ask for shorter answers, or use a model with a longer context.")
        replies: dict[int, Reply] = {}
        groups: dict[tuple[int, float, float], list[int]] = {}
        for i, r in enumerate(requests):
            groups.setdefault((r.max_tokens, r.temperature, r.top_p), []).append(i)
        for (max_tokens, temperature, top_p), members in groups.items():
            sampling = (
                Sampling(do_sample=True, temperature=temperature, top_k=TOP_K, top_p=top_p) if temperature else Sampling()
            )

            def run(part: Sequence[int], new: int = max_tokens, sampling: Sampling = sampling) -> list[Reply]:
                return self._answer([contexts[i] for i in part], [requests[i].seed for i in part], new, sampling)

            room = KV_BUDGET // kv_bytes(self.backbone, max(needs[i] for i in members))
            for batch in batches(members, needs.__getitem__, self._batch_size or max(1, min(MOST_ROWS, room))):
                replies.update(zip(batch, halving(run, batch, self.counters), strict=True))
        return [replies[i] for i in range(len(requests))]

    def encode(self, messages: Sequence[Any]) -> list[int]:
        """Ids of the conversation, up to where the model goes on."""
        tokenizer = self.backbone.tokenizer
        if tokenizer.chat_template:
            text, folded = render_chat(tokenizer, messages, True, {})
            self.counters.system_folded += folded
        else:
            names = {"user": "Question", "assistant": "Answer"}
            text = "".join(f"{names.get(m['role'], 'Note')}: {m['content']}\n" for m in messages) + "Answer:"
        return self.backbone.tokenize(text)

    def _answer(self, contexts: list[list[int]], seeds: list[int], max_tokens: int, sampling: Sampling) -> list[Reply]:
        finished = self._stopper()
        shared = min(shared_length(contexts), min(map(len, contexts)) - 1)
        with torch.no_grad():
            prefix = self.backbone.prefix(contexts[0][:shared], self._rows) if len(contexts) > 1 and shared > 0 else None
        answers: list[list[int]] = generate(
            self.backbone,
            self._rows,
            contexts,
            prefix=prefix,
            max_new_tokens=max_tokens,
            finished=finished,
            sampling=sampling,
            seeds=[s % 2**63 for s in seeds],
        )
        cut = [len(ids) == max_tokens and not finished(ids) for ids in answers]
        return [self._reply(len(context), ids, c) for context, ids, c in zip(contexts, answers, cut, strict=True)]

    def _reply(self, prompt: int, ids: list[int], cut: bool) -> Reply:
        kept = ids[:-1] if ids and ids[-1] in self._ends else ids
        text = str(self.backbone.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        if not self.backbone.tokenizer.chat_template:
            text = text.partition("\nQuestion:")[0]
        text, finish = text.strip(), "length" if cut else "stop"
        if not text:
            return Reply(None, "empty", finish, prompt, len(ids), self.name)
        return Reply(text, "", finish, prompt, len(ids), self.name)

    def _stopper(self) -> Callable[[list[int]], bool]:
        if self.backbone.tokenizer.chat_template:
            return lambda ids: bool(ids) and ids[-1] in self._ends
        return lambda ids: "\nQuestion:" in str(self.backbone.tokenizer.decode(ids[-32:]))
