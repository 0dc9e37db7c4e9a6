"""Rows as token ids, and the batches of an epoch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.chat import render_chat
from lm_eval_softverb.data.rows import Row
from lm_eval_softverb.errors import DataError
from lm_eval_softverb.frame import cut_left, virtual_ids
from lm_eval_softverb.tuners.config import SoftConfig


@dataclass(frozen=True)
class Example:
    """Ids of one row: ``context`` (virtual tokens included) and the ``target`` to be learnt."""

    context: tuple[int, ...]
    target: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        return self.context + self.target[:-1]


def encode_rows(backbone: Backbone, rows: Sequence[Row], config: SoftConfig) -> tuple[list[Example], int]:
    """Token ids of ``rows`` as the harness will render and split them, and how many inputs had to be cut.

    The boundary blank belongs to the target. A row longer than ``max_length`` loses the left end of its input; targets and
    virtual tokens are never cut.

    Raises:
        DataError: a target alone is longer than ``max_length``.
    """
    tokenizer, virtual = backbone.tokenizer, virtual_ids(0, config.tokens)
    bos = tokenizer.bos_token_id

    def encode(text: str, output: str = "") -> list[int]:
        rendered = config.chat and config.frame.in_user_turn
        return config.frame.encode(text, virtual, backbone.tokenize, bos, rendered=rendered, continuation=output)

    examples, cut = [], 0
    for row in rows:
        text, output = row.input, row.delimiter + row.output
        if config.chat:
            messages = config.frame.wrap_chat([{"role": "user", "content": row.input}])
            text, output = render_chat(tokenizer, messages, True, {})[0], row.output
        elif blanks := len(text) - len(text.rstrip()):
            text, output = text[:-blanks], text[-blanks:] + output
        if backbone.is_seq2seq:
            context, target = encode(text), backbone.tokenize(output, False)
        else:
            context = encode(text)
            target = encode(text, output)[len(context) :]
        if config.eos and tokenizer.eos_token_id is not None:
            target.append(tokenizer.eos_token_id)
        excess = len(context) + len(target) - config.max_length
        if excess > 0:
            fitted = cut_left(context, excess, bos)
            if fitted is None:
                raise DataError(
                    f"A target of {len(target)} tokens and {config.tokens} virtual tokens do not fit max_length "
                    f"{config.max_length}: {row.output[:80]!r}. Raise max_length or drop the row."
                )
            context, cut = fitted, cut + 1
        if not target or not context:
            raise DataError(f"A row has {len(context)} input and {len(target)} target tokens: {row.input[:80]!r}.")
        examples.append(Example(tuple(context), tuple(target)))
    return examples, cut


def epoch_batches(examples: Sequence[Example], config: SoftConfig, epoch: int) -> list[list[int]]:
    """Indices of each batch of one epoch: shuffled by seed and epoch, rows of similar length together."""
    stream = random.Random(f"{config.seed}/{epoch}")
    order = list(range(len(examples)))
    stream.shuffle(order)
    pool = 8 * config.batch_size
    batches = []
    for start in range(0, len(order), pool):
        part = sorted(order[start : start + pool], key=lambda i: len(examples[i].ids))
        batches += [part[i : i + config.batch_size] for i in range(0, len(part), config.batch_size)]
    stream.shuffle(batches)
    return batches
