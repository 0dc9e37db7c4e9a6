"""The filter: a local model must find each sentence's label among the labels of its set."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.batching import Counters, batches, halving, shared_length
from lm_eval_softverb.errors import ConfigError
from lm_eval_softverb.generators.local_chat import LocalChat

QUESTION = "Which of these words fits the sentence best: {labels}?\n\nSentence: {sentence}\n\nAnswer with one word."

Verdicts = Callable[[Mapping[str, Sequence[str]]], dict[str, list[bool]]]
"""Label → candidates, to label → one verdict per candidate."""


class Judge(Protocol):
    """Decides which sentences are typical of their label."""

    def start(self, labels: Sequence[str]) -> Verdicts:
        """Begins with a label set; what comes back is called for each round of its candidates."""
        ...

    def knows(self, label: str) -> bool:
        """Whether ``label`` is a common word."""
        ...

    def identity(self) -> dict[str, Any]: ...


class LikelihoodJudge:
    """Keeps a sentence when its own label has the highest log-likelihood after a question that lists all labels.

    Small models prefer some words whatever the sentence, so each label's mean over the labels' candidates so far is
    subtracted first; the mean gives every label's candidates the same weight.

    Args:
        margin: nats by which a label must be ahead of all others; more is stricter.
    """

    def __init__(self, backbone: Backbone, margin: float = 0.0) -> None:
        if not 0 <= margin < math.inf:
            raise ConfigError(f"The filter's margin is {margin}, expected 0 or more nats.")
        self.backbone = backbone
        self.margin = margin
        self.counters = Counters()
        self._chat = LocalChat(backbone)

    def identity(self) -> dict[str, Any]:
        return {
            "judge": "likelihood",
            "rule": "first token",
            "question": QUESTION,
            "margin": self.margin,
            **self._chat.identity(),
        }

    def start(self, labels: Sequence[str]) -> Verdicts:
        seen: dict[str, list[list[float]]] = {label: [] for label in labels}

        def keep(candidates: Mapping[str, Sequence[str]]) -> dict[str, list[bool]]:
            asked = [(label, sentence) for label, sentences in candidates.items() for sentence in sentences]
            scores = self.scores(labels, [sentence for _, sentence in asked])
            for (own, _), row in zip(asked, scores, strict=True):
                seen[own].append(row)
            # Over all rounds: late ones have candidates of few labels only, and their mean would be what is looked for.
            means = [[sum(column) / len(rows) for column in zip(*rows, strict=True)] for rows in seen.values() if rows]
            usual = [sum(column) / len(means) for column in zip(*means, strict=True)]
            verdicts: dict[str, list[bool]] = {label: [] for label in candidates}
            for (own, _), row in zip(asked, scores, strict=True):
                shifted = dict(zip(labels, (score - mean for score, mean in zip(row, usual, strict=True)), strict=True))
                best_other = max((score for label, score in shifted.items() if label != own), default=-math.inf)
                verdicts[own].append(shifted[own] - best_other >= self.margin)
            return verdicts

        return keep

    def knows(self, label: str) -> bool:
        """At most two tokens: what a small model makes up falls into more."""
        return len(self.backbone.tokenizer.encode(f" {label}", add_special_tokens=False)) <= 2

    def scores(self, labels: Sequence[str], sentences: Sequence[str]) -> list[list[float]]:
        """Log-likelihood of each label after the question about each sentence, [sentences][labels].

        Where all labels begin with different tokens, that of the first one: an answer that must be one of the labels is
        decided by it, and each sentence is read once, not once per label.
        """
        backbone = self.backbone
        space = "" if backbone.tokenizer.chat_template else " "
        answers = [list(backbone.tokenizer.encode(space + label, add_special_tokens=False)) for label in labels]
        contexts = [
            self._chat.encode([{"role": "user", "content": QUESTION.format(labels=", ".join(labels), sentence=s)}])
            for s in sentences
        ]
        if not contexts:
            return []
        firsts = [answer[0] for answer in answers]
        decided = len(set(firsts)) == len(labels)
        tails: list[list[int]] = [[]] if decided else [answer[:-1] for answer in answers]
        rows = [(context, tail, i) for context in contexts for i, tail in enumerate(tails)]
        backbone.check_room(max(len(c) + len(t) for c, t, _ in rows), "Use a judge with a longer context.")
        shared = min(shared_length(contexts), min(map(len, contexts)) - 1)
        found: dict[int, list[float]] = {}
        with torch.no_grad():
            prefix = backbone.prefix(contexts[0][:shared], backbone.stack([])) if shared > 0 else None
            skip = prefix.length if prefix else 0

            def run(part: Sequence[int]) -> list[list[float]]:
                ids = backbone.tensor([[*rows[i][0][skip:], *rows[i][1]] for i in part])
                keep = torch.zeros(ids.shape, dtype=torch.bool)
                for row, i in enumerate(part):
                    context, tail, _ = rows[i]
                    keep[row, len(context) - skip - 1 : len(context) - skip + len(tail)] = True
                cache = prefix.expand(len(part), backbone.model.config) if prefix else None
                logits = backbone.logits(backbone.embed(ids, backbone.stack([])), keep, cache=cache)
                likely = logits.float().log_softmax(-1)
                if decided:
                    return [[float(x) for x in row] for row in likely[:, firsts].tolist()]
                split = likely.split([len(rows[i][1]) + 1 for i in part])
                wanted = [backbone.tensor([answers[rows[i][2]]]).T for i in part]
                return [[float(x.gather(1, w).sum())] for x, w in zip(split, wanted, strict=True)]

            for batch in batches(range(len(rows)), lambda i: len(rows[i][0]) + len(rows[i][1]) - skip, None):
                found.update(zip(batch, halving(run, batch, self.counters), strict=True))
        n = len(tails)
        return [[x for i in range(n) for x in found[s * n + i]] for s in range(len(sentences))]
