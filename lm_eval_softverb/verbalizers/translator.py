"""The translator: a LoRA on the frozen model that continues a soft prompt's vectors with the text they stand for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lm_eval_softverb import storage
from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.batching import Counters, batches, halving
from lm_eval_softverb.decoding import Sampling, generate
from lm_eval_softverb.errors import ConfigError
from lm_eval_softverb.frame import virtual_ids
from lm_eval_softverb.prompt import SoftPrompt
from lm_eval_softverb.verbalizers import Kind
from lm_eval_softverb.verbalizers.answers import confidences, pooled
from lm_eval_softverb.verbalizers.base import Verbalization
from lm_eval_softverb.verbalizers.bridge import Bridge
from lm_eval_softverb.verbalizers.rerank import read_inputs, rerank
from lm_eval_softverb.verbalizers.translator_adapter import TranslatorAdapter, shipped
from lm_eval_softverb.verbalizers.translator_heads import heads, plain_ids
from lm_eval_softverb.verbalizers.translator_lora import layers_of


@dataclass(frozen=True)
class Translator:
    """A trained translator. It writes what it was trained to say, labels or instructions, whatever is asked for.

    The greedy text's confidence is exp(mean log-probability of its tokens), 0 for an empty text. Samples come as their
    distribution, as with ``selfverb``: the confidence is a text's share, and ``details["likelihood"]`` what greedy texts
    have as confidence. ``details["cut"]`` says whether ``max_new_tokens`` ended a text rather than EOS.

    Attributes:
        adapter: folder written by ``softverb translate train``, or the name of a translator that comes with the package.
        samples: 0 is greedy; otherwise how many to draw, from all tokens.
        temperature: of the samples.
        seed: of the samples; each also depends on the prompt's id and its number, and on nothing else.
        prefill: beginning of the text, put in the model's mouth and not part of the answer; ``details["with_prefill"]`` has
            both.
        rerank: JSONL file of unlabelled inputs by prompt; the text under which the frozen model behaves most like the soft
            prompt comes first (see :mod:`~lm_eval_softverb.verbalizers.rerank`).
        bridge: folder written by ``softverb translate bridge``, for prompts of another base model than the translator's.
        force_adapter: use the adapter (and bridge) on another base model of the same width than it was made for.
    """

    method: ClassVar[str] = "translator"

    adapter: str = ""
    samples: int = 0
    temperature: float = 1.0
    seed: int = 0
    prefill: str = ""
    rerank: str = ""
    bridge: str = ""
    force_adapter: bool = False

    def __post_init__(self) -> None:
        if not self.adapter:
            raise ConfigError(
                "Method 'translator' needs adapter=DIR, a folder written by `softverb translate train`, or the name of a "
                f"shipped translator (there are {', '.join(shipped()) or 'none'})."
            )
        if self.samples < 0:
            raise ConfigError(f"samples is {self.samples}, expected 0 (greedy) or the number of samples to draw.")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature is {self.temperature}, expected more than 0. Greedy texts: samples=0.")
        if self.rerank and self.bridge:
            raise ConfigError(
                "rerank compares behaviours of the prompts' own model, which a bridge leaves; pass only one of them."
            )
        _ = self.files  # what cannot be read is refused before a base model is loaded

    @cached_property
    def loaded(self) -> TranslatorAdapter:
        return TranslatorAdapter.load(self.adapter)

    @cached_property
    def files(self) -> dict[str, str]:
        """Hashes of what the paths among the settings stand for: other files, other texts."""
        hashes = {"adapter_id": self.loaded.id}
        if self.rerank:
            read_inputs(Path(self.rerank))
            hashes["rerank_sha256"] = storage.sha256_file(Path(self.rerank).expanduser())
        if self.bridge:
            hashes["bridge_id"] = Bridge.load(self.bridge).id
        return hashes

    def verbalize(
        self, backbone: Backbone, prompts: Sequence[SoftPrompt], *, kind: Kind, max_new_tokens: int
    ) -> list[list[Verbalization]]:
        """One text per prompt, or the distribution of its samples; a text does not depend on its batch.

        Raises:
            BaseModelMismatch: the adapter or bridge was made for another base model.
            ConfigError: the model is no decoder-only one, or prompt and text do not fit its context.
        """
        if backbone.is_seq2seq or not backbone.has_keys:
            raise ConfigError(f"Method {self.method!r} needs a decoder-only model, which {backbone.name} is not.")
        if not prompts:
            return []
        adapter, read = self.loaded, self._read(backbone, prompts)
        forced = adapter.check_fits(backbone.fingerprint, force=self.force_adapter)
        if self.bridge and adapter.between.answers:
            raise ConfigError(
                "This translator reads what the prompts' own model answers, which a bridge leaves; train one without."
            )
        before, asked, first_row = heads(backbone, read, adapter.between, adapter.kind, prefill=self.prefill), [], 0
        for index, prompt in enumerate(read):
            context = (*virtual_ids(first_row, prompt.n), *before[prompt.id].ids(backbone))
            first_row += prompt.n
            for sample in range(max(1, self.samples)):
                stream = storage.seed_from(self.seed, prompts[index].id, sample)
                asked.append(Row(index, context, stream))
        backbone.check_room(max(len(r.context) for r in asked) + max_new_tokens, "Lower max_new_tokens.")
        run = partial(self._write, backbone, backbone.stack(read), asked, max_new_tokens)
        texts: dict[int, Text] = {}
        with layers_of(backbone, adapter).on():
            for batch in batches(range(len(asked)), lambda i: len(asked[i].context) + max_new_tokens, None):
                texts.update(zip(batch, halving(run, batch, Counters()), strict=True))
        shared = {"adapter": adapter.id, "trained_for": adapter.kind} | ({"forced_despite": forced} if forced else {})
        found = [self._answers([texts[i] for i, r in enumerate(asked) if r.prompt == p], shared) for p in range(len(prompts))]
        return rerank(backbone, prompts, found, read_inputs(Path(self.rerank))) if self.rerank else found

    def _read(self, backbone: Backbone, prompts: Sequence[SoftPrompt]) -> list[SoftPrompt]:
        """The prompts as vectors of the translator's model."""
        if not self.bridge:
            return list(prompts)
        bridge = Bridge.load(self.bridge)
        bridge.check_fits(backbone.fingerprint, force=self.force_adapter)
        return [bridge.cross(prompt) for prompt in prompts]

    @torch.no_grad()
    def _write(
        self, backbone: Backbone, rows: Tensor, asked: Sequence[Row], max_new_tokens: int, batch: Sequence[int]
    ) -> list[Text]:
        contexts = [asked[i].context for i in batch]
        sampling = Sampling(do_sample=True, temperature=self.temperature, top_k=0) if self.samples else Sampling()
        new = generate(
            backbone,
            rows,
            contexts,
            max_new_tokens=max_new_tokens,
            finished=lambda _ids: False,  # end-of-sequence ids end a text anyway
            sampling=sampling,
            seeds=[asked[i].seed for i in batch],
        )
        sure = confidences(backbone, rows, contexts, new)
        prefill = plain_ids(backbone, self.prefill)
        return [
            Text(_decoded(backbone, ids), _decoded(backbone, [*prefill, *ids]), likelihood, len(ids) == max_new_tokens)
            for ids, likelihood in zip(new, sure, strict=True)
        ]

    def _answers(self, texts: Sequence[Text], shared: dict[str, Any]) -> list[Verbalization]:
        def details(text: Text) -> dict[str, Any]:
            both = {"prefill": self.prefill, "with_prefill": text.with_prefill} if self.prefill else {}
            return {"cut": text.cut, **shared, **both}

        if not self.samples:
            return [Verbalization(t.text, t.likelihood, details(t)) for t in texts]
        out = []
        for pool in pooled(texts, lambda text: text.text):
            share, best = len(pool) / len(texts), pool[0]
            counts = {"count": len(pool), "share": share, "likelihood": best.likelihood, "cut": any(t.cut for t in pool)}
            out.append(Verbalization(best.text, share, details(best) | counts))
        return out


@dataclass(frozen=True)
class Row:
    """One text to write: the index of its prompt, what stands before it, the seed of its random stream."""

    prompt: int
    context: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Text:
    """What was written; ``cut``: it was not over after ``max_new_tokens``."""

    text: str
    with_prefill: str
    likelihood: float
    cut: bool


def _decoded(backbone: Backbone, ids: Sequence[int]) -> str:
    return str(backbone.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip()
