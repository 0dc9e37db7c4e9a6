"""How well a soft prompt does on rows it never saw: what it writes, against what it should."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.batching import Counters, batches, halving, shared_length
from lm_eval_softverb.data.rows import Row
from lm_eval_softverb.decoding import generate, generate_stock
from lm_eval_softverb.metrics.rouge import rouge_l
from lm_eval_softverb.tuners.config import SoftConfig
from lm_eval_softverb.tuners.encoding import encode_rows


@torch.no_grad()
def heldout_scores(
    backbone: Backbone, prompt: torch.Tensor, rows: Sequence[Row], config: SoftConfig, *, most_tokens: int = 64
) -> dict[str, Any]:
    """Greedy answers to ``rows`` under a prompt [n, d], scored per row.

    An answer may be as long as the longest target of these rows, at most ``most_tokens``; it ends with EOS, or, for a prompt
    trained without EOS, at the first line break.

    Returns:
        ``accuracy`` (equal to the target but for case and outer blanks) and ``rouge_l`` (F-measure, stemmed), means over rows;
        ``rows``, ``max_new_tokens``, ``stopped`` (share that ended by itself).
    """
    examples, cut = encode_rows(backbone, rows, config)
    new = min(most_tokens, max(len(e.target) for e in examples) + (0 if config.eos else 1))
    vectors = prompt.to(backbone.device, backbone.dtype)
    contexts = [e.context for e in examples]
    shared = contexts[0][: shared_length([c[:-1] for c in contexts])]
    prefix = backbone.prefix(shared, vectors)
    decode = backbone.tokenizer.decode

    def run(part: Sequence[int]) -> list[tuple[int, list[int]]]:
        texts = [contexts[i] for i in part]
        if backbone.is_seq2seq or not backbone.has_keys:
            written = generate_stock(backbone, vectors, texts, max_new_tokens=new, do_sample=False)
        else:
            stop = (lambda _ids: False) if config.eos else (lambda ids: "\n" in decode(ids).lstrip())
            written = generate(backbone, vectors, texts, prefix=prefix, max_new_tokens=new, finished=stop)
        return list(zip(part, written, strict=True))

    answers: dict[int, list[int]] = {}
    for batch in batches(range(len(contexts)), lambda i: len(contexts[i]) + new, None):
        answers.update(halving(run, batch, Counters()))
    texts = [str(decode(answers[i], skip_special_tokens=True)).strip() for i in range(len(rows))]
    if not config.eos:
        texts = [text.partition("\n")[0].strip() for text in texts]
    golds = [row.output.strip() for row in rows]
    same = [text.casefold() == gold.casefold() for text, gold in zip(texts, golds, strict=True)]
    return {
        "rows": len(rows),
        "accuracy": sum(same) / len(rows),
        "rouge_l": sum(rouge_l(text, gold) for text, gold in zip(texts, golds, strict=True)) / len(rows),
        "stopped": sum(len(answers[i]) < new for i in range(len(rows))) / len(rows),
        "max_new_tokens": new,
        "inputs_cut": cut,
    }
