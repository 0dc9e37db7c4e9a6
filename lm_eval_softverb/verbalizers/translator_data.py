"""What a translator learns from: the prompts of a bank, frozen, and the text that each of them stands for (section 5)."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lm_eval_softverb import storage
from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.bank import Bank
from lm_eval_softverb.errors import ConfigError, DataError
from lm_eval_softverb.frame import virtual_ids
from lm_eval_softverb.prompt import SoftPrompt
from lm_eval_softverb.verbalizers import Kind, telling
from lm_eval_softverb.verbalizers.translator_config import TranslatorConfig
from lm_eval_softverb.verbalizers.translator_heads import Head, Heads, plain_ids


@dataclass(frozen=True)
class Pair:
    """One soft prompt and its text: the labels joined in their order, or the instruction.

    Attributes:
        paraphrases: more texts of the same meaning.
    """

    name: str
    prompt: SoftPrompt
    text: str
    labels: tuple[str, ...] = ()
    paraphrases: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Example:
    """One row of a batch: rows [n, d] of its prompt, ids before the text (virtual ones included), the text's ids and EOS."""

    rows: Tensor
    context: tuple[int, ...]
    target: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        return self.context + self.target[:-1]


def read_texts(path: Path) -> dict[str, list[str]]:
    """More texts by prompt or task, from JSONL: ``prompt_id`` or ``task``, and ``text`` or a list of ``paraphrases``.

    Raises:
        DataError: another line, with ``file:line``; or none.
    """
    found: dict[str, list[str]] = {}
    for number, line in storage.read_jsonl(path):
        name, texts = line.get("prompt_id", line.get("task")), line.get("paraphrases", [line.get("text")])
        if not isinstance(name, str) or not isinstance(texts, list) or not all(isinstance(t, str) and t.strip() for t in texts):
            raise DataError(f"{path}:{number}: expected prompt_id or task, and text or paraphrases; got {sorted(line)}.")
        found.setdefault(name, []).extend(t.strip() for t in texts)
    if not found:
        raise DataError(f"{path} holds no texts.")
    return found


def pairs_of(
    bank: Bank, kind: Kind, split: str = "train", texts: Mapping[str, Sequence[str]] | None = None
) -> tuple[list[Pair], dict[str, int]]:
    """The bank's prompts of ``split`` (all, where the manifest has no splits) that have a text of this kind.

    Returns:
        The pairs in the bank's order, and what was left out or found: ``other_split``, ``without_text``, ``paraphrased``,
        and ``texts_unused``: names among ``texts`` that are no prompt or task of these.

    Raises:
        DataError: no such prompt.
    """
    pairs, has_splits = [], any("split" in e for e in bank.entries)
    counts = dict.fromkeys(("other_split", "without_text", "paraphrased"), 0)
    used = set()
    for prompt, entry in zip(bank.prompts, bank.entries, strict=True):
        if has_splits and entry.get("split") != split:
            counts["other_split"] += 1
            continue
        labels = tuple(map(str, entry.get("labels") or ())) if kind == "labels" else ()
        text = ", ".join(labels) if kind == "labels" else str(entry.get("instruction") or "")
        if not text.strip():
            counts["without_text"] += 1
            continue
        names = [str(entry[key]) for key in ("prompt_id", "task") if key in entry]
        more = [t for name in dict.fromkeys(names) for t in (texts or {}).get(name, ())]
        used.update(names)
        counts["paraphrased"] += bool(more)
        pairs.append(Pair(str(entry["prompt_id"]), prompt, text.strip(), labels, tuple(more)))
    if not pairs:
        raise DataError(
            f"Bank {bank.source} has no prompt to learn {kind} from in split {split!r}: {counts['other_split']} are of another "
            f"split, {counts['without_text']} have none in the manifest."
        )
    return pairs, {**counts, "texts_unused": len(set(texts or ()) - used)}


def held_out(pairs: Sequence[Pair], share: float, seed: int, used: float = 1.0) -> tuple[list[Pair], list[Pair]]:
    """Training and validation pairs; prompts of one and the same text stay on one side.

    Args:
        share: of the texts that are for validation.
        used: share of the others that are for training; validation is the same for each.

    Raises:
        DataError: fewer than two different texts.
    """
    distinct = sorted({_meaning(p) for p in pairs})
    random.Random(seed).shuffle(distinct)
    count = max(1, round(share * len(distinct)))
    if len(distinct) - count < 1:
        raise DataError(f"{len(distinct)} different texts are too few to hold {count} out for validation; expected at least 2.")
    validation = set(distinct[:count])
    training = set(distinct[count : count + max(1, round(used * (len(distinct) - count)))])
    return [p for p in pairs if _meaning(p) in training], [p for p in pairs if _meaning(p) in validation]


def _meaning(pair: Pair) -> tuple[str, ...]:
    return tuple(sorted(pair.labels)) or (pair.text,)


@dataclass(frozen=True)
class Item:
    """A text to learn and what it stands behind; its ``ending`` is never cut."""

    prompt: SoftPrompt
    head: Head
    text: str
    ending: str = ""


def fixed_items(pairs: Iterable[Pair], before: Heads, config: TranslatorConfig) -> list[Item]:
    """The same every time, for validation: labels sorted if that is the order; if it is shuffled, those among the prompt's
    answers first; all else as in the manifest.
    """
    out = []
    for pair in pairs:
        head, text = before[pair.prompt.id], pair.text
        if pair.labels and config.label_order == "sorted":
            text = ", ".join(sorted(pair.labels, key=str.casefold))
        elif pair.labels and config.label_order == "shuffled":
            text = ", ".join(head.first(pair.labels))
        out.append(_item(pair.prompt, head, text, config))
    return out


def epoch_items(pairs: Sequence[Pair], before: Heads, config: TranslatorConfig, epoch: int) -> list[Item]:
    """What one epoch trains on, in its order; all of it depends on the seed and the epoch only."""
    stream, out = random.Random(f"{config.seed}/{epoch}"), []
    for pair, fixed in zip(pairs, fixed_items(pairs, before, config), strict=True):
        head, own = fixed.head.redrawn(stream), fixed.text
        if config.label_order == "shuffled" and pair.labels:
            own = ", ".join(head.first(stream.sample(pair.labels, len(pair.labels))))
        originals = [own] if config.originals or not pair.paraphrases else []
        out += [_item(pair.prompt, head, text, config) for text in (*originals, *pair.paraphrases)]
    stream.shuffle(out)
    return out


def _item(prompt: SoftPrompt, head: Head, text: str, config: TranslatorConfig) -> Item:
    return Item(prompt, head, text, telling.ending(head.shown) if config.name_answers else "")


def target_ids(
    backbone: Backbone, text: str, max_tokens: int, ending: str = "", whole_sentences: bool = False
) -> tuple[tuple[int, ...], bool]:
    """Ids of a text, cut after ``max_tokens``, of its ending, and EOS: cut texts end with it, too. Also whether it was cut.

    Args:
        whole_sentences: cut behind the last sentence that fits, where one does.

    Raises:
        ConfigError: the tokenizer has no EOS, so that nothing could tell the translator to stop.
    """
    eos = backbone.tokenizer.eos_token_id
    if eos is None:
        raise ConfigError(f"The tokenizer of {backbone.name} has no EOS; a translator could not learn to stop.")
    ids = plain_ids(backbone, text)
    too_long = len(ids) > max_tokens
    if too_long and whole_sentences:
        ends = (plain_ids(backbone, text[: found.start()]) for found in reversed(list(re.finditer(r"(?<=[.!?])\s", text))))
        ids = next((part for part in ends if len(part) <= max_tokens), ids)
    return (*ids[:max_tokens], *plain_ids(backbone, f" {ending}" if ending else ""), eos), too_long


def encode(
    backbone: Backbone, items: Iterable[Item], *, max_tokens: int, whole_sentences: bool = False
) -> tuple[list[Example], int]:
    """``cat(S, E[BOS h EOS])`` for each soft prompt S and text h, and how many texts were cut."""
    examples, cut = [], 0
    for item in items:
        target, too_long = target_ids(backbone, item.text, max_tokens, item.ending, whole_sentences)
        context = (*virtual_ids(0, item.prompt.n), *item.head.ids(backbone))
        examples.append(Example(item.prompt.embeddings, context, target))
        cut += too_long
    longest = max((len(e.ids) for e in examples), default=0)
    backbone.check_room(longest, "Lower max_tokens, or use prompts of fewer virtual tokens.")
    return examples, cut


def noisy(examples: Sequence[Example], noise: float, stream: str) -> list[Example]:
    """Examples with normal noise on their vectors, ``noise`` times the root mean square of each prompt's; a function of
    ``stream`` and the example's place.
    """
    out = []
    for place, example in enumerate(examples):
        generator = torch.Generator().manual_seed(storage.seed_from(stream, place))
        rows = example.rows.float()
        out.append(
            replace(example, rows=rows + noise * rows.square().mean().sqrt() * torch.randn(rows.shape, generator=generator))
        )
    return out


def target_losses(backbone: Backbone, examples: Sequence[Example]) -> Tensor:
    """Cross-entropy (nats) of each example's text and EOS, summed [B]; nothing else is supervised.

    Rows are padded on the right and masked by causality, so a row's loss does not depend on the rows beside it.
    """
    firsts = [sum(e.rows.shape[0] for e in examples[:i]) for i in range(len(examples))]
    rows = torch.cat([e.rows for e in examples]).to(backbone.device)
    ids = [[t - first if t < 0 else t for t in e.ids] for first, e in zip(firsts, examples, strict=True)]
    keep = backbone.tensor([[0] * (len(e.context) - 1) + [1] * len(e.target) for e in examples]).bool()
    logits = backbone.logits(backbone.embed(backbone.tensor(ids), rows), keep)
    targets = torch.tensor([t for e in examples for t in e.target], device=logits.device)
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = cross_entropy(exact, targets, reduction="none")
    return torch.stack([part.sum() for part in losses.split([len(e.target) for e in examples])])


def data_sha256(pairs: Sequence[Pair]) -> str:
    """Hash of prompts and texts in their order."""
    value: list[Any] = [[p.name, p.prompt.id, p.text, list(p.labels), list(p.paraphrases)] for p in pairs]
    return storage.sha256_json(value)
