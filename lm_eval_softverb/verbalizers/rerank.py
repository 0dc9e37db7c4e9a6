"""Choosing among texts without labels: the best one makes the frozen model behave most like the soft prompt itself.

Behaviour is what the model says to unlabelled inputs. For each input the soft prompt's greedy answer is taken, and a text
stands where the prompt's virtual tokens stood; the score is the mean of KL(p_soft || p_text) over the next-token
distributions of that answer's positions (EOS included where the answer is over). 0 means no difference at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lm_eval_softverb import storage
from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.batching import Counters, batches, halving
from lm_eval_softverb.chat import render_chat
from lm_eval_softverb.decoding import generate
from lm_eval_softverb.errors import ConfigError, DataError, NonFiniteError
from lm_eval_softverb.frame import virtual_ids
from lm_eval_softverb.prompt import SoftPrompt
from lm_eval_softverb.verbalizers import Kind
from lm_eval_softverb.verbalizers.base import Verbalization, Verbalizer

ANSWER_TOKENS = 8
ALL = "*"
Inputs = Mapping[str, Sequence[str]]
"""Unlabelled inputs by prompt: its id ``sp-…``, its name in its bank, its folder's name, or ``*`` for all others."""


def read_inputs(path: Path) -> Inputs:
    """Inputs from JSONL: ``prompt_id`` (or ``*``), and ``input`` or a list of ``inputs``.

    Raises:
        DataError: another line, with ``file:line``; or none.
    """
    found: dict[str, list[str]] = {}
    for number, line in storage.read_jsonl(path.expanduser()):
        name, texts = line.get("prompt_id"), line.get("inputs", [line.get("input")])
        if not isinstance(name, str) or not isinstance(texts, list) or not all(isinstance(t, str) and t.strip() for t in texts):
            raise DataError(f"{path}:{number}: expected prompt_id, and input or a list of inputs (texts); got {sorted(line)}.")
        found.setdefault(name, []).extend(texts)
    if not found:
        raise DataError(f"{path} holds no inputs.")
    return found


def inputs_of(prompt: SoftPrompt, inputs: Inputs) -> Sequence[str]:
    """The inputs to compare one prompt's texts on.

    Raises:
        DataError: there are none for it.
    """
    names = [prompt.id, prompt.source.rpartition("#")[2], Path(prompt.source or ".").name, ALL]
    for name in names:
        if inputs.get(name):
            return inputs[name]
    raise DataError(
        f"There are no unlabelled inputs for soft prompt {prompt.source or prompt.id} to re-rank its texts on. Add a line with "
        f"prompt_id {names[1] or names[0]!r}, or with '{ALL}' for all prompts."
    )


def rerank(
    backbone: Backbone,
    prompts: Sequence[SoftPrompt],
    found: Sequence[Sequence[Verbalization]],
    inputs: Inputs,
    answer_tokens: int = ANSWER_TOKENS,
) -> list[list[Verbalization]]:
    """Each prompt's texts, closest behaviour first; ``details`` get ``kl`` (nats per position), ``kl_inputs``, ``rank_before``.

    Raises:
        DataError: a prompt without inputs.
        ConfigError: the model is no decoder-only one, or text, input and answer do not fit its context.
    """
    out = []
    for prompt, texts in zip(prompts, found, strict=True):
        own = inputs_of(prompt, inputs)
        distinct = list(dict.fromkeys(t.text for t in texts))
        kl = dict(zip(distinct, divergences(backbone, prompt, distinct, own, answer_tokens), strict=True))
        scored = [
            replace(t, details={**t.details, "kl": kl[t.text], "kl_inputs": len(own), "rank_before": rank})
            for rank, t in enumerate(texts)
        ]
        out.append(sorted(scored, key=lambda t: t.details["kl"]))
    return out


def divergences(
    backbone: Backbone, prompt: SoftPrompt, texts: Sequence[str], inputs: Sequence[str], answer_tokens: int = ANSWER_TOKENS
) -> list[float]:
    """Mean KL(p_soft || p_text) in nats of each of ``texts``, over all answer positions of all ``inputs``.

    Raises:
        ConfigError: as for :func:`rerank`.
        NonFiniteError: a divergence is no number.
    """
    if backbone.is_seq2seq or not backbone.has_keys:
        raise ConfigError(f"Re-ranking needs a decoder-only model, which {backbone.name} is not.")
    slots = [list(virtual_ids(0, prompt.n))]
    slots += [list(backbone.tokenizer.encode(text, add_special_tokens=False)) if text else [] for text in texts]
    contexts = [[with_slot(backbone, prompt, slot, x) for slot in slots] for x in inputs]
    longest = [max(map(len, own)) + answer_tokens for own in contexts]
    backbone.check_room(max(longest), "Leave out the longest inputs.")
    run = partial(_compared, backbone, backbone.stack([prompt]), contexts, answer_tokens)
    sums, positions = torch.zeros(len(texts), dtype=torch.float64), 0
    for batch in batches(range(len(inputs)), lambda i: longest[i], None):
        for own, count in halving(run, batch, Counters()):
            sums, positions = sums + own, positions + count
    if not bool(torch.isfinite(sums).all()):
        raise NonFiniteError(
            f"The behaviour under a text or under soft prompt {prompt.source or prompt.id} has no finite probabilities, so "
            "texts cannot be compared by it. Use dtype float32."
        )
    return [float(x) for x in sums / positions]


def with_slot(backbone: Backbone, prompt: SoftPrompt, slot: Sequence[int], text: str) -> list[int]:
    """Ids of an input with ``slot`` in the prompt's place, rendered as the prompt was trained."""
    tokenizer = backbone.tokenizer

    text, config = text.rstrip(), prompt.info.get("config")  # a boundary blank belongs to the answer
    chat = isinstance(config, dict) and config.get("chat") is True
    if chat:
        text, _ = render_chat(tokenizer, prompt.frame.wrap_chat([{"role": "user", "content": text}]), True, {})
    return prompt.frame.encode(
        text, slot, backbone.tokenize, tokenizer.bos_token_id, rendered=chat and prompt.frame.in_user_turn
    )


@torch.no_grad()
def _compared(
    backbone: Backbone, rows: Tensor, contexts: Sequence[Sequence[list[int]]], answer_tokens: int, batch: Sequence[int]
) -> list[tuple[Tensor, int]]:
    """Summed KL of each text [texts], and the number of positions, for every input of ``batch``."""
    soft = [contexts[i][0] for i in batch]
    answers = generate(backbone, rows, soft, max_new_tokens=answer_tokens, finished=lambda _ids: False)
    counts = [min(len(a) + 1, answer_tokens) for a in answers]  # an answer that is over has one more position, its EOS

    def distributions(own: Sequence[list[int]]) -> Tensor:
        """Log-probabilities [sum of counts, V] at the positions of the answers behind ``own`` contexts."""
        ids = [[*c, *a[: n - 1]] for c, a, n in zip(own, answers, counts, strict=True)]
        keep = backbone.tensor([[0] * (len(c) - 1) + [1] * n for c, n in zip(own, counts, strict=True)]).bool()
        return backbone.logits(backbone.embed(backbone.tensor(ids), rows), keep).float().log_softmax(-1)

    expected = distributions(soft)
    sums = []
    for text in range(1, len(contexts[0])):
        found = distributions([contexts[i][text] for i in batch])
        kl = (expected.exp() * (expected - found)).sum(-1).double().cpu()
        sums.append(torch.stack([part.sum() for part in kl.split(counts)]))
    table = torch.stack(sums, dim=1) if sums else torch.zeros(len(batch), 0, dtype=torch.float64)
    return list(zip(table, counts, strict=True))


@dataclass(frozen=True)
class Reranked:
    """Any method with its texts re-ranked: what ``softverb verbalize --rerank FILE`` runs.

    Attributes:
        inner: the method.
        rerank: JSONL file of :func:`read_inputs`.
        answer_tokens: of each behaviour compared.
    """

    inner: Verbalizer
    rerank: str
    answer_tokens: int = ANSWER_TOKENS

    def __post_init__(self) -> None:
        read_inputs(Path(self.rerank))
        if self.answer_tokens < 1:
            raise ConfigError(f"answer_tokens is {self.answer_tokens}, expected at least 1.")

    @property
    def method(self) -> str:
        return self.inner.method

    @property
    def files(self) -> dict[str, str]:
        own = {"rerank_sha256": storage.sha256_file(Path(self.rerank).expanduser())}
        return {**getattr(self.inner, "files", {}), **own}

    def verbalize(
        self, backbone: Backbone, prompts: Sequence[SoftPrompt], *, kind: Kind, max_new_tokens: int
    ) -> list[list[Verbalization]]:
        """The method's texts, closest behaviour first."""
        found = self.inner.verbalize(backbone, prompts, kind=kind, max_new_tokens=max_new_tokens)
        return rerank(backbone, prompts, found, read_inputs(Path(self.rerank)), self.answer_tokens)
