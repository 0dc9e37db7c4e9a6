"""InSPEcT: a soft prompt's hidden states, patched into a prompt of example descriptions, and what the model writes then.

arXiv 2410.11660. The target prompt is three example task descriptions joined by " | " and n placeholder tokens; the stream of
the soft prompt after one layer replaces the placeholders' after another (:mod:`lm_eval_softverb.verbalizers.patching`).
Which pair of layers to use decides everything, so a pair always says where it comes from: fixed, or selected on training
prompts (a :class:`Selection` file). The best pair of the very prompt that is scored is an oracle, not a method.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import exp
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lm_eval_softverb import storage
from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.errors import ArtifactError, ConfigError, did_you_mean
from lm_eval_softverb.prompt import SoftPrompt
from lm_eval_softverb.residual import decoder_layers, states
from lm_eval_softverb.verbalizers import KINDS, Kind
from lm_eval_softverb.verbalizers.base import Verbalization
from lm_eval_softverb.verbalizers.patching import Continuation, Patch, sequential, target_prefix, together

EXAMPLES = 3
SEPARATOR = " | "
INJECTIONS = ("embedding", "layer0")
MODES = ("fast", "sequential")
Pair = tuple[int, int]


@dataclass(frozen=True)
class Example:
    """One task description of the target prompt; its task occurs in no evaluation."""

    name: str
    text: str
    labels: tuple[str, ...] = ()


@cache
def examples(kind: Kind) -> tuple[Example, ...]:
    """The shipped descriptions of one kind."""
    lines = [line for _, line in storage.read_jsonl(Path(__file__).with_name("examples.jsonl"))]
    return tuple(Example(x["name"], x["text"], tuple(x.get("labels", ()))) for x in lines if x["kind"] == kind)


def choose_examples(kind: Kind, seed: int = 0, avoid: Iterable[str] = ()) -> tuple[Example, ...]:
    """Three descriptions in an order given by ``seed``, none of which has a label among the words ``avoid``.

    Raises:
        ConfigError: fewer than three are left.
    """
    words = {word.strip().lower() for word in avoid}
    shuffled = random.Random(seed).sample(examples(kind), len(examples(kind)))
    found = [x for x in shuffled if not words & {label.lower() for label in x.labels}]
    if len(found) < EXAMPLES:
        raise ConfigError(
            f"Only {len(found)} example descriptions share no label with what is evaluated; InSPEcT needs {EXAMPLES}. "
            "Evaluate fewer label sets at a time."
        )
    return tuple(found[:EXAMPLES])


@dataclass(frozen=True)
class Selection:
    """Pairs of layers chosen on training prompts, one for each kind of text.

    Attributes:
        pairs: kind → (source, target).
        layers: L of the model they were chosen on.
        info: how they were chosen, by kind: prompts, metric, score, examples, runner-up; free-form JSON.
    """

    pairs: Mapping[str, Pair]
    layers: int
    info: Mapping[str, Any]

    def save(self, path: Path) -> None:
        storage.write_json(
            path,
            {"schema": 1, "layers": self.layers, "pairs": {k: list(p) for k, p in self.pairs.items()}, "info": dict(self.info)},
        )

    @classmethod
    def load(cls, name: str | Path) -> Selection:
        """A file, or the name of one shipped with the package, such as ``smollm2-135m``.

        Raises:
            ArtifactError: missing or malformed.
        """
        path, shipped = Path(name).expanduser(), Path(__file__).with_name("selections")
        if not path.suffix and not path.exists():
            path = shipped / f"{name}.json"
            if not path.exists():
                known = sorted(p.stem for p in shipped.glob("*.json"))
                raise ArtifactError(f"There is no selection file {name!r}. {did_you_mean(str(name), known)}")
        value = storage.read_json(path)
        try:
            pairs = {str(k): (int(p[0]), int(p[1])) for k, p in value["pairs"].items()}
            found = cls(pairs, int(value["layers"]), dict(value["info"]))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ArtifactError(f"{path} is no selection of layer pairs ({error!r}); `softverb select` writes one.") from error
        if not pairs.keys() <= set(KINDS) or not pairs:
            raise ArtifactError(f"{path} has pairs for {sorted(pairs)}, expected some of {', '.join(KINDS)}.")
        return found


@dataclass(frozen=True)
class Inspect:
    """InSPEcT with one pair of layers. Its confidence is the mean probability (geometric) of the text's tokens.

    Attributes:
        source_layer: after which the soft prompt's stream is taken, -1 … L - 2.
        target_layer: after which it replaces the placeholders'. Both or none; with none, ``selection`` decides, else a fixed
            pair: the one the translator paper tuned for instructions, (22, 1) of 32 layers, scaled to this model's depth.
        selection: file of :class:`Selection`, or the name of a shipped one.
        injection: where the source pass puts the soft prompt: ``embedding`` (the input, default), or ``layer0``: over the
            stream of placeholders after decoder layer 0, so that source layer 0 is the prompt itself and -1 says nothing.
        seed: which example descriptions, in which order.
        avoid: words, separated by "|", that no example description may have as a label (what is evaluated).
        placeholder: word whose (last) token fills the target prompt's n places.
        mode: ``fast``, or ``sequential``: the slow oracle, one pair at a time.
        rows: layer pairs to work on together; 0 takes as many as 1 GiB of keys and values holds.
    """

    method: ClassVar[str] = "inspect"

    source_layer: int | None = None
    target_layer: int | None = None
    selection: str = ""
    injection: str = "embedding"
    seed: int = 0
    avoid: str = ""
    placeholder: str = "x"
    mode: str = "fast"
    rows: int = 0

    def __post_init__(self) -> None:
        if (self.source_layer is None) != (self.target_layer is None):
            raise ConfigError("A layer pair needs both source_layer and target_layer.")
        if self.selection and self.source_layer is not None:
            raise ConfigError("Pass source_layer and target_layer, or selection, not both.")
        for name, value, options in (("injection", self.injection, INJECTIONS), ("mode", self.mode, MODES)):
            if value not in options:
                raise ConfigError(f"Unknown {name} {value!r}. {did_you_mean(value, list(options))}")

    # --- one pair ----------------------------------------------------------------------------------------------------

    def pair(self, layers: int, kind: Kind) -> Pair:
        """The pair in use on a model of ``layers`` layers.

        Raises:
            ConfigError: outside of the model, or the selection has none for ``kind`` or another depth.
        """
        if self.selection:
            chosen = Selection.load(self.selection)
            if kind not in chosen.pairs or chosen.layers != layers:
                raise ConfigError(
                    f"Selection {self.selection} has pairs for {', '.join(chosen.pairs)} on a model of {chosen.layers} layers; "
                    f"expected one for {kind} on {layers} layers. Choose one with `softverb select`."
                )
            found = chosen.pairs[kind]
        elif self.source_layer is not None and self.target_layer is not None:
            found = (self.source_layer, self.target_layer)
        else:
            found = (min(round(22 * layers / 32), layers - 2), min(1, layers - 2))
        if not all(-1 <= layer <= layers - 2 for layer in found):
            raise ConfigError(f"Layer pair {found} does not fit a model of {layers} layers; expected -1 to {layers - 2} each.")
        return found

    def verbalize(
        self, backbone: Backbone, prompts: Sequence[SoftPrompt], *, kind: Kind, max_new_tokens: int
    ) -> list[list[Verbalization]]:
        """One text per prompt; see :class:`~lm_eval_softverb.verbalizers.base.Verbalizer`."""
        pair = self.pair(len(decoder_layers(backbone)), kind)
        found = self._continue(backbone, prompts, [pair], kind, max_new_tokens, score=True)
        details = {
            "source_layer": pair[0],
            "target_layer": pair[1],
            "pair": "selected" if self.selection else "fixed" if self.source_layer is None else "given",
            "injection": self.injection,
            "examples": [x.name for x in self.examples(kind)],
        }
        out = []
        for [answer] in found:
            spoken = len(answer.ids) + answer.stopped
            sure = exp(answer.log_probability / spoken) if self.mode == "fast" else None
            out.append([Verbalization(_text(backbone, answer), sure, {**details, "stopped": answer.stopped})])
        return out

    # --- the whole grid ----------------------------------------------------------------------------------------------

    def grid(
        self,
        backbone: Backbone,
        prompts: Sequence[SoftPrompt],
        *,
        kind: Kind,
        max_new_tokens: int,
        pairs: Sequence[Pair] | None = None,
        done: Callable[[int], None] = lambda _count: None,
    ) -> list[dict[Pair, str]]:
        """Texts of all pairs (or of ``pairs``) for each prompt; ``done`` is told how many pairs were finished."""
        chosen = list(pairs) if pairs is not None else all_pairs(len(decoder_layers(backbone)))
        found = self._continue(backbone, prompts, chosen, kind, max_new_tokens, done=done)
        return [{p: _text(backbone, a) for p, a in zip(chosen, answers, strict=True)} for answers in found]

    def examples(self, kind: Kind) -> tuple[Example, ...]:
        """The example descriptions in use."""
        return choose_examples(kind, self.seed, self.avoid.split("|") if self.avoid else ())

    def _continue(
        self,
        backbone: Backbone,
        prompts: Sequence[SoftPrompt],
        pairs: Sequence[Pair],
        kind: Kind,
        max_new_tokens: int,
        *,
        score: bool = False,
        done: Callable[[int], None] = lambda _count: None,
    ) -> list[list[Continuation]]:
        """The continuations of all pairs for each prompt; prompts of equal length run together."""
        text = SEPARATOR.join(x.text for x in self.examples(kind)) + SEPARATOR.rstrip()
        words = backbone.tokenizer.encode(text)
        filler = backbone.tokenizer.encode(f" {self.placeholder}", add_special_tokens=False)[-1]
        longest = len(words) + max((p.n for p in prompts), default=0) + max_new_tokens
        backbone.check_room(longest, "InSPEcT's target prompt, the virtual tokens and the text count; lower max_new_tokens.")
        prefix = target_prefix(backbone, words) if self.mode == "fast" else None
        out: list[list[Continuation]] = [[] for _ in prompts]
        for n in sorted({p.n for p in prompts}):
            members = [i for i, p in enumerate(prompts) if p.n == n]
            placeholders = backbone.embedding(backbone.tensor([[filler] * n]))[0].detach()
            streams = self._streams(backbone, torch.stack([prompts[i].embeddings for i in members]), placeholders)
            patches = [Patch(m, *pair) for m in range(len(members)) for pair in pairs]
            if prefix is None:
                found = sequential(backbone, streams, patches, words, placeholders, max_new_tokens=max_new_tokens, done=done)
            else:
                found = together(
                    backbone,
                    streams,
                    patches,
                    prefix,
                    placeholders,
                    max_new_tokens=max_new_tokens,
                    rows=self.rows or None,
                    score=score,
                    done=done,
                )
            for m, i in enumerate(members):
                out[i] = found[m * len(pairs) : (m + 1) * len(pairs)]
        return out

    def _streams(self, backbone: Backbone, prompts: Tensor, placeholders: Tensor) -> Tensor:
        """Residual stream [L, P, n, d] of the soft prompts [P, n, d], each alone in the model."""
        embeds = prompts.to(backbone.device, backbone.dtype)
        if self.injection == "embedding":
            return states(backbone, embeds)
        entering = states(backbone, embeds)[0]  # scaled as the architecture scales its input

        def inject(layer: int, stream: Tensor) -> Tensor:
            return entering if layer == 0 else stream

        return states(backbone, placeholders.expand_as(embeds), inject)


def all_pairs(layers: int) -> list[Pair]:
    """Every (source, target) of a model of ``layers`` layers."""
    return [(s, t) for s in range(-1, layers - 1) for t in range(-1, layers - 1)]


def _text(backbone: Backbone, answer: Continuation) -> str:
    return str(backbone.tokenizer.decode(answer.ids, skip_special_tokens=True)).strip()
