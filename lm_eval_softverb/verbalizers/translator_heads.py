"""What stands between a soft prompt's vectors and its text: BOS, words, and what the prompt itself answers when asked."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from tqdm import tqdm

from lm_eval_softverb import storage
from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.errors import ConfigError
from lm_eval_softverb.pretrained import cache_dir
from lm_eval_softverb.prompt import SoftPrompt
from lm_eval_softverb.verbalizers import Kind
from lm_eval_softverb.verbalizers.elicit import FORMS, NEUTRAL, Elicit
from lm_eval_softverb.verbalizers.translator_config import Between

ASKED: Mapping[Kind, Elicit] = {"labels": Elicit(), "instructions": Elicit(samples=4, answer_tokens=16)}
"""How the answers are drawn. Of a free answer the form tells, so fewer and longer ones do."""
MIN_SHARE: Mapping[Kind, float] = {"labels": 0.01, "instructions": 0.0}
"""Rarer answers are not shown: of labels far less than a text of answers alone needs, since a translator can tell them apart;
free answers come once each.
"""
MOST_TOKENS = 96
"""Of all answers together."""
TOGETHER = 16
"""Prompts whose answers are drawn together."""


@dataclass(frozen=True)
class Head:
    """What stands between a prompt's vectors and its text: ids, the prompt's own answers, ids.

    Attributes:
        answers: different answers with their shares, the most frequent first; None where there are to be none.
        kind: what they were asked for.
    """

    start: tuple[int, ...]
    answers: Mapping[str, float] | None
    end: tuple[int, ...]
    kind: Kind = "labels"

    def ids(self, backbone: Backbone) -> list[int]:
        """All of it; of each answer its share in percent, as far as they fit."""
        if self.answers is None:
            return [*self.start, *self.end]
        shown = [f"{text} {100 * share:.0f}" for text, share in self.answers.items() if share >= MIN_SHARE[self.kind]]
        while shown and len(plain_ids(backbone, ", ".join(shown))) > MOST_TOKENS:
            shown.pop()
        return [*self.start, *plain_ids(backbone, f"Answers: {', '.join(shown)}\n"), *self.end]

    def redrawn(self, stream: random.Random) -> Head:
        """With what as many draws from these answers give (a bootstrap sample): the prompt might have answered so as well."""
        if not self.answers:
            return self
        count = ASKED[self.kind].samples * len(NEUTRAL)
        drawn = Counter(stream.choices(list(self.answers), list(self.answers.values()), k=count))
        return replace(self, answers={text: n / count for text, n in drawn.most_common()})

    def first(self, labels: Sequence[str]) -> list[str]:
        """These labels, those that are among the answers first and in their order."""
        places = {text.casefold(): place for place, text in enumerate(self.answers or ())}
        return sorted(labels, key=lambda label: places.get(label.casefold(), len(places)))


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
) -> Heads:
    """What stands between each prompt's vectors and its text, and behind it a given beginning of the text.

    Without the LoRA layers in the model: the answers in it are the frozen model's. They are kept in the cache folder.

    Raises:
        ConfigError: BOS is asked for and the tokenizer has none; or as for ``elicit``.
    """
    own, different = backbone.tokenizer.bos_token_id, list({p.id: p for p in prompts}.values())
    if between.bos and own is None:
        raise ConfigError(f"The tokenizer of {backbone.name} has no BOS to put between prompt and text; train with bos=false.")
    start = (own,) if between.bos else ()
    end = (*plain_ids(backbone, between.words), *plain_ids(backbone, prefill))
    answers = _answers(backbone, different, kind, progress) if between.answers else {}
    return {prompt.id: Head(start, answers.get(prompt.id), end, kind) for prompt in different}


def _answers(backbone: Backbone, prompts: Sequence[SoftPrompt], kind: Kind, progress: bool) -> dict[str, dict[str, float]]:
    base = backbone.fingerprint
    model = [sorted(base.sketch.items()), base.tokenizer_sha256, str(backbone.dtype), str(backbone.device.type)]
    key = storage.sha256_json([model, asdict(ASKED[kind]), FORMS[kind], NEUTRAL])
    folder = cache_dir() / "answers" / key[:16]
    paths = {prompt.id: folder / f"{prompt.id}.json" for prompt in prompts}
    unknown = [prompt for prompt in prompts if not paths[prompt.id].exists()]
    with tqdm(total=len(unknown), desc="answers", unit="prompt", disable=not progress or not unknown) as bar:
        for first in range(0, len(unknown), TOGETHER):
            part = unknown[first : first + TOGETHER]
            for prompt, found in zip(part, ASKED[kind].answers(backbone, part, kind), strict=True):
                storage.write_json(paths[prompt.id], found)
            bar.update(len(part))
    return {name: dict(storage.read_json(path)) for name, path in paths.items()}


def plain_ids(backbone: Backbone, text: str) -> list[int]:
    """Ids of a text; what looks like a special token in it is only text."""
    ids = backbone.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) if text else []
    return list(ids)
