"""What stands between a soft prompt's vectors and its text: BOS, words, and what the prompt itself answers when asked."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from tqdm import tqdm

import lm_eval_softverb
from lm_eval_softverb import storage
from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.decoding import eos_ids
from lm_eval_softverb.errors import ArtifactError, ConfigError
from lm_eval_softverb.fitting import Processes
from lm_eval_softverb.frame import virtual_ids
from lm_eval_softverb.pretrained import cache_dir
from lm_eval_softverb.prompt import SoftPrompt
from lm_eval_softverb.verbalizers import Kind
from lm_eval_softverb.verbalizers.answers import normalised, without_order
from lm_eval_softverb.verbalizers.elicit import FORMS, NEUTRAL, Elicit
from lm_eval_softverb.verbalizers.rerank import with_slot
from lm_eval_softverb.verbalizers.telling import RULE
from lm_eval_softverb.verbalizers.translator_config import Between

ASKED: Mapping[Kind, Elicit] = {"labels": Elicit(), "instructions": Elicit(samples=4, answer_tokens=16)}
"""How the answers are drawn. Of a free answer the form tells, so fewer and longer ones do."""
MIN_SHARE: Mapping[Kind, float] = {"labels": 0.01, "instructions": 0.0}
"""Rarer answers are not shown: of labels far less than a text of answers alone needs, since a translator can tell them apart;
free answers come once each.
"""
MOST_CHARACTERS = 360
"""Of all answers that are shown: about a hundred tokens."""
REDRAWN = 0.75
"""Share of the draws that an epoch of training sees."""
TOGETHER = 16
"""Prompts whose answers are drawn together."""


def reads(kind: Kind, names_answers: bool = False) -> str:
    """Hash of how answers are drawn and shown: a translator reads only what it has learnt to read.

    Args:
        names_answers: also of how a text names them.
    """
    rules = [
        asdict(ASKED[kind]),
        FORMS[kind],
        NEUTRAL,
        MIN_SHARE[kind],
        MOST_CHARACTERS,
        REDRAWN,
        _shown({"a": 0.5, "b": 0.25}),
    ]
    return storage.sha256_json([*rules, RULE] if names_answers else rules)


@dataclass(frozen=True)
class Head:
    """What stands between a prompt's vectors and its text: ids, the prompt's own answers, ids.

    Attributes:
        answers: different answers with their shares, the most frequent first; None where there are to be none. Empty answers
            are missing, so the shares need not sum to 1.
        kind: what they were asked for.
    """

    start: tuple[int, ...]
    answers: Mapping[str, float] | None
    end: tuple[int, ...]
    kind: Kind = "labels"

    @cached_property
    def shown(self) -> dict[str, float]:
        """The answers that a translator sees: frequent ones, as far as there is room."""
        out: dict[str, float] = {}
        room = MOST_CHARACTERS
        for text, share in (self.answers or {}).items():
            room -= len(text) + 4
            if share < MIN_SHARE[self.kind] or room < 0:
                break
            out[text] = share
        return out

    def ids(self, backbone: Backbone) -> list[int]:
        """All of it."""
        answers = [] if self.answers is None else plain_ids(backbone, _shown(self.shown))
        return [*self.start, *answers, *self.end]

    def redrawn(self, stream: random.Random) -> Head:
        """With what a part of the draws gave: the prompt might have answered so as well."""
        if self.answers is None:
            return self
        count = ASKED[self.kind].samples * len(NEUTRAL)
        drawn = [text for text, share in self.answers.items() for _ in range(round(share * count))]
        drawn += [""] * (count - len(drawn))
        kept = stream.sample(drawn, round(REDRAWN * count))
        found = Counter(text for text in kept if text)
        return replace(self, answers={text: n / len(kept) for text, n in found.most_common()})

    def first(self, labels: Sequence[str]) -> list[str]:
        """These labels, those that are among the answers shown first and in their order."""
        places = {normalised(text): place for place, text in reversed(list(enumerate(self.shown)))}
        return sorted(labels, key=lambda label: places.get(normalised(label), len(places)))


def _shown(answers: Mapping[str, float]) -> str:
    """Of each answer its share in percent."""
    return f"Answers: {', '.join(f'{text} {100 * share:.0f}' for text, share in answers.items())}\n"


Heads = Mapping[str, Head]
"""By the prompt's id."""


def heads(
    backbone: Backbone,
    prompts: Iterable[SoftPrompt],
    between: Between,
    kind: Kind,
    *,
    prefill: str = "",
    progress: bool = False,
    processes: Processes | None = None,
) -> Heads:
    """What stands between each prompt's vectors and its text, and behind it a given beginning of the text.

    Without the LoRA layers in the model: the answers in it are the frozen model's. They are kept in the cache folder.

    Args:
        processes: all of them ask for the same prompts, and share the work.

    Raises:
        ConfigError: BOS is asked for and the tokenizer has none; or as for ``elicit``.
    """
    own, different = backbone.tokenizer.bos_token_id, list({p.id: p for p in prompts}.values())
    if between.bos and own is None:
        raise ConfigError(f"The tokenizer of {backbone.name} has no BOS to put between prompt and text; train with bos=false.")
    start = (own,) if between.bos else ()
    end = (*plain_ids(backbone, between.words), *plain_ids(backbone, prefill))
    answers = _answers(backbone, different, kind, progress, processes) if between.answers else {}
    return {prompt.id: Head(start, answers.get(prompt.id), end, kind) for prompt in different}


def _answers(
    backbone: Backbone, prompts: Sequence[SoftPrompt], kind: Kind, progress: bool, processes: Processes | None
) -> dict[str, dict[str, float]]:
    """Each prompt's answers, from the cache where they are there."""
    base, folder = backbone.fingerprint, cache_dir() / "answers"
    model = [sorted(base.sketch.items()), base.tokenizer_sha256, str(backbone.dtype), backbone.device.type]
    rules = [lm_eval_softverb.__version__, model, sorted(eos_ids(backbone)), asdict(ASKED[kind])]
    paths = {}
    for prompt in prompts:
        slot = virtual_ids(0, prompt.n)
        asked = [with_slot(backbone, prompt, slot, FORMS[kind].format(text)) for text in NEUTRAL]
        paths[prompt.id] = folder / f"{prompt.id}-{storage.sha256_json([rules, asked])[:16]}.json"
    found = {name: kept for name, path in paths.items() if (kept := _kept(path)) is not None}
    unknown = [prompt for prompt in prompts if prompt.id not in found]
    if processes:
        processes.wait()  # all have seen the same files
        unknown = unknown[processes.rank :: processes.count]
    with tqdm(total=len(unknown), desc="answers", unit="prompt", disable=not progress or not unknown) as bar:
        for first in range(0, len(unknown), TOGETHER):
            part = unknown[first : first + TOGETHER]
            for prompt, shares in zip(part, ASKED[kind].answers(backbone, part, kind), strict=True):
                found[prompt.id] = without_order(shares, prompt.id)
                storage.write_json(paths[prompt.id], found[prompt.id])
            bar.update(len(part))
    if processes:
        processes.wait()
        found |= {name: dict(storage.read_json(path)) for name, path in paths.items() if name not in found}
    return {prompt.id: found[prompt.id] for prompt in prompts}


def _kept(path: Path) -> dict[str, float] | None:
    """Answers from the cache; None where they are to be drawn (again)."""
    if not path.exists():
        return None
    try:
        value = storage.read_json(path)
        numbers = [float(x) for x in value.values() if type(x) in (int, float)]
        if len(numbers) == len(value) and all(0 < x <= 1 for x in numbers) and sum(numbers) < 1.001:
            return dict(zip(map(str, value), numbers, strict=True))
    except (ArtifactError, AttributeError):
        pass
    warnings.warn(f"{path} holds no answers with their shares; they are drawn again.", stacklevel=2)
    return None


def plain_ids(backbone: Backbone, text: str) -> list[int]:
    """Ids of a text; what looks like a special token in it is only text."""
    ids = backbone.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) if text else []
    return list(ids)
