"""Answers of ``generate_until`` requests: the harness's settings in, batches with a shared prefix, texts out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.models.utils_hf import stop_sequences_criteria

from lm_eval_softverb.backbone import Prefix
from lm_eval_softverb.batching import batches, halving, leading_virtual, shared_length
from lm_eval_softverb.decoding import Sampling, decode_rows, generate, generate_stock
from lm_eval_softverb.errors import ConfigError
from lm_eval_softverb.models.scoring import Ids

if TYPE_CHECKING:
    from lm_eval_softverb.models.softprompt import SoftPromptLM


def answer_generations(
    lm: SoftPromptLM, requests: Sequence[Instance], places: Sequence[int | None], report: Callable[[int, str], None]
) -> None:
    """Generates for ``requests``, which share their settings; ``report`` gets (index, text) as answers are ready."""
    settings = dict(normalize_gen_kwargs(requests[0].args[1], lm.max_gen_toks))
    eos = lm.tok_decode(lm.eot_token_id, skip_special_tokens=False)
    until = handle_stop_sequences(settings.pop("until", None), eos=eos)
    new = int(settings.pop("max_gen_toks"))
    if "max_length" in settings:
        raise ConfigError("Generation setting max_length depends on each prompt's length; use max_gen_toks.")
    causal = lm.backend == "causal"
    contexts = [
        lm.slots.fit(lm.slots.whole(r.args[0], place), lm.window - (new if causal else 0))
        for r, place in zip(requests, places, strict=True)
    ]
    # Beams, encoder-decoders, models without keys and values, settings we do not know: transformers' own generate.
    own = causal and lm.backbone.has_keys and not set(settings) - Sampling.known()
    sampling = Sampling.of(lm.model.generation_config, settings) if own else None
    finished, seeds = _stopper(lm, until), _seeds(requests) if sampling and sampling.do_sample else []

    groups: dict[Ids, list[int]] = {}
    for i, context in enumerate(contexts):
        groups.setdefault(leading_virtual(context), []).append(i)
    for group in groups.values():
        prefix: Prefix | None = None
        if sampling:
            shared = contexts[group[0]][: shared_length([contexts[i][:-1] for i in group])]
            with torch.no_grad(), lm.cast():
                prefix = lm.backbone.prefix(shared, lm.rows)
            lm.counters.prefix_tokens += len(shared) if prefix else 0

        def run(part: Sequence[int], prefix: Prefix | None = prefix) -> list[tuple[int, list[int]]]:
            texts = [contexts[i] for i in part]
            with lm.cast():
                if sampling is None:
                    out = _stock(lm, texts, until, new, settings)
                else:
                    out = generate(
                        lm.backbone,
                        lm.rows,
                        texts,
                        prefix=prefix,
                        prefill_rows=lm.rows_per_batch,
                        max_new_tokens=new,
                        finished=finished,
                        sampling=sampling,
                        seeds=[seeds[i] for i in part] if seeds else None,
                    )
            return list(zip(part, out, strict=True))

        together = lm.rows_per_batch
        if together and sampling:
            together = decode_rows(lm.backbone, together, max(len(contexts[i]) for i in group) + new)
        for batch in batches(group, lambda i: len(contexts[i]) + new, together):
            for i, ids in halving(run, batch, lm.counters):
                report(i, _text(lm, ids, until))


def _stock(lm: SoftPromptLM, texts: list[Ids], until: list[str], new: int, settings: dict[str, Any]) -> list[list[int]]:
    settings = {k: v for k, v in settings.items() if not (k == "temperature" and not v)}
    settings.setdefault("do_sample", "temperature" in settings)
    criteria = stop_sequences_criteria(lm.tokenizer, until, 0, len(texts))
    return generate_stock(lm.backbone, lm.rows, texts, max_new_tokens=new, stopping_criteria=criteria, **settings)


def _stopper(lm: SoftPromptLM, until: Sequence[str]) -> Callable[[list[int]], bool]:
    """Whether the end of a row's new ids holds a stop sequence; looks back far enough for the longest of them."""
    stops = [s for s in until if s]
    look_back = max((len(s.encode()) for s in stops), default=0) + 4

    def finished(ids: list[int]) -> bool:
        tail = lm.tok_decode(ids[-look_back:], skip_special_tokens=False)
        return any(s in tail for s in stops)

    return finished


def _text(lm: SoftPromptLM, ids: list[int], until: list[str]) -> str:
    think = lm.think_end_token
    if isinstance(think, int) and think in ids:
        ids = ids[len(ids) - ids[::-1].index(think) :]
    text = lm.tok_decode(ids)
    text = text.lstrip() if isinstance(think, int) else text
    return str(postprocess_generated_text(text, until, think if isinstance(think, str) else None))


def _seeds(requests: Sequence[Instance]) -> list[int]:
    """Random streams for sampling: each of the run's seed, the request and its repeat, not of the batch it falls into."""
    repeats: dict[int, int] = {}
    seeds = []
    for request in requests:
        repeat = repeats[id(request)] = repeats.get(id(request), -1) + 1
        text = f"{torch.initial_seed()} {repeat} {request.task_name} {request.doc_id} {request.args[0]}"
        seeds.append(int(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:15], 16))
    return seeds
