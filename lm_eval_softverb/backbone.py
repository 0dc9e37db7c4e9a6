"""The frozen language model: embed token ids (real and virtual), run them after a shared prefix, read chosen positions."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lm_eval_softverb import storage
from lm_eval_softverb.errors import ConfigError
from lm_eval_softverb.prompt import Fingerprint, SoftPrompt

_PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "In 1984, 3.14159 and 1,000,000 were 42 numbers; 007 too.",
    "  two  spaces\n\nnew lines\tand tabs ",
    "naïve café — “quotes”, ellipsis… Привет 你好 🙂",
    "def f(x): return {'a': [x**2, -1]}  # comment",
    " positive negative Label: Answer:",
)


@dataclass(frozen=True)
class Prefix:
    """Keys and values of tokens that many rows share: one prefix for all, or one for each of several groups of rows.

    Attributes:
        layers: per decoder layer (keys, values), each [groups, heads, length, head size].
        length: number of tokens.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    length: int

    def expand(self, batch: int, config: Any) -> DynamicCache:
        """A cache for ``batch`` rows that begin with the one prefix; nothing is copied until the first new token."""
        return self._cache(config, lambda x: x.expand(batch, -1, -1, -1))

    def repeat(self, counts: Sequence[int], config: Any) -> DynamicCache:
        """A cache for ``counts[g]`` rows with the prefix of each group g, group by group.

        Written with ``expand``, whose backward pass is a sum: indexing would add up the gradients of a group's rows one by one
        in the model's dtype, and in bfloat16 that loses much of them.
        """

        def rows_of(x: Tensor) -> Tensor:
            if len(set(counts)) == 1:
                return x.unsqueeze(1).expand(-1, counts[0], *x.shape[1:]).flatten(0, 1)
            return torch.cat([x[g : g + 1].expand(n, *x.shape[1:]) for g, n in enumerate(counts)])

        return self._cache(config, rows_of)

    def _cache(self, config: Any, rows_of: Callable[[Tensor], Tensor]) -> DynamicCache:
        cache = DynamicCache(config=config)
        for index, (keys, values) in enumerate(self.layers):
            cache.update(rows_of(keys), rows_of(values), index)
        return cache


class Backbone:
    """A frozen causal or sequence-to-sequence model and its tokenizer.

    The model is the stock transformers model; nothing is patched. Prompt rows [R, d] are passed to each call, since
    training changes them and a bank has many: id ``-1 - r`` of a sequence is row ``r``.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "", revision: str | None = None
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name or str(getattr(model, "name_or_path", ""))
        self.revision = revision
        self._parameters = frozenset(inspect.signature(model.forward).parameters)

    @classmethod
    def load(cls, pretrained: str, *, dtype: str = "auto", device: str | None = None, revision: str | None = None) -> Backbone:
        """Loads a hub id, a folder, or a packaged name such as ``smollm2-135m``, frozen and in evaluation mode.

        Raises:
            ConfigError: an unknown dtype.
            ModelUnavailable: not on disk and not reachable.
        """
        wanted: Any = dtype if dtype == "auto" else getattr(torch, dtype, None)
        if not isinstance(wanted, (str, torch.dtype)):
            raise ConfigError(f"Unknown dtype {dtype!r}; expected auto, float32, bfloat16, float16 or float64.")
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

        from lm_eval_softverb.pretrained import loading, locate

        path = locate(pretrained)
        with loading(pretrained):
            config = AutoConfig.from_pretrained(path, revision=revision)
            kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            model = kind.from_pretrained(path, revision=revision, dtype=wanted)
            tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval().requires_grad_(False)
        return cls(model, tokenizer, pretrained, revision)

    # --- facts -------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def embedding(self) -> nn.Embedding:
        return self.model.get_input_embeddings()  # type: ignore[no-any-return]

    @property
    def hidden_size(self) -> int:
        return int(self.embedding.weight.shape[1])

    @property
    def vocab_size(self) -> int:
        return int(self.embedding.weight.shape[0])

    @property
    def is_seq2seq(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)

    @property
    def has_keys(self) -> bool:
        """Whether the model remembers tokens as keys and values, rather than in a state of its own."""
        return "past_key_values" in self._parameters

    @property
    def text_config(self) -> Any:
        """The configuration of the language model, which models that also see images keep apart."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def sees_all(self) -> bool:
        """Whether every layer attends to all earlier tokens, however far away; windows count columns, padding included."""
        config = self.text_config
        kinds = {*(getattr(config, "layer_types", None) or []), *(getattr(config, "attention_layers", None) or [])}
        return kinds <= {"full_attention", "global"} and not getattr(config, "sliding_window", None)

    @cached_property
    def gaps_are_harmless(self) -> bool:
        """Whether masked padding may stand between a shared prefix and the text of a row."""
        layers = DynamicCache(config=self.model.config).layers
        plain = all(type(layer) is DynamicLayer for layer in layers)
        return "position_ids" in self._parameters and plain and self.sees_all

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Identity of weights and tokenizer, the same for every dtype the model is loaded in."""
        rows = [i * self.vocab_size // 8 for i in range(8)]
        sketch = {"input embedding": tuple(self.embedding.weight[rows, :16].detach().float().flatten().tolist())}
        for name, parameter in self.model.named_parameters():
            if parameter.is_floating_point() and parameter.device.type != "meta":
                at = int(hashlib.sha256(name.encode()).hexdigest()[:12], 16) % parameter.numel()
                sketch[name] = (float(parameter.detach().view(-1)[at]),)
        return Fingerprint(
            name=self.name,
            revision=self.revision,
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            sketch=sketch,
            tokenizer_sha256=self._tokenizer_sha256(),
        )

    def _tokenizer_sha256(self) -> str:
        t = self.tokenizer
        probes = [t.encode(text, add_special_tokens=False) for text in _PROBES]
        return storage.sha256_json([sorted(t.get_vocab().items()), probes, t.bos_token_id, t.eos_token_id])

    def tokenize(self, text: str, first: bool = True) -> list[int]:
        """Ids of ``text``; special tokens go around it only where it is ``first``, and not where it brings its BOS itself."""
        bos = self.tokenizer.bos_token
        special = first and not (bos and text.startswith(bos))
        return list(self.tokenizer.encode(text, add_special_tokens=special))

    def check_room(self, tokens: int, advice: str) -> None:
        """Refuses sequences that the model has no positions for.

        Raises:
            ConfigError: ``tokens`` are more than the context; ``advice`` says what to do.
        """
        window = getattr(self.text_config, "max_position_embeddings", None)
        if window and tokens > window:
            raise ConfigError(f"{tokens} tokens do not fit the {window} tokens of {self.name}. {advice}")

    # --- running -----------------------------------------------------------------------------------------------------

    def stack(self, prompts: Sequence[SoftPrompt]) -> Tensor:
        """Rows of all ``prompts`` one after the other, [R, d], in the model's dtype and on its device."""
        rows = torch.cat([p.embeddings for p in prompts]) if prompts else torch.zeros(0, self.hidden_size)
        return rows.to(self.device, self.dtype)

    def embed(self, ids: Tensor, rows: Tensor) -> Tensor:
        """Input embeddings [B, T, d] of ``ids`` [B, T]; negative ids take their row of ``rows`` [R, d]."""
        virtual = ids < 0
        embeds: Tensor = self.embedding(ids.masked_fill(virtual, 0))
        if rows.shape[0] == 0 or not bool(virtual.any()):
            return embeds  # also spares the backward pass a scatter over all tokens
        own = rows[(-1 - ids).clamp(min=0)].to(embeds.dtype)  # in this order the gradients of many rows add up in float32
        return torch.where(virtual.unsqueeze(-1), own, embeds)

    def prefix(self, ids: Sequence[int], rows: Tensor) -> Prefix | None:
        """Keys and values of ``ids``, run once; None where the architecture keeps other state than keys and values."""
        return self.prefixes([ids], rows)

    def prefixes(self, sequences: Sequence[Sequence[int]], rows: Tensor) -> Prefix | None:
        """The same for several prefixes of equal length, one per group of rows."""
        length = len(sequences[0])
        if self.is_seq2seq or not length or not self.has_keys:
            return None
        cache = DynamicCache(config=self.model.config)
        with self._head_at(torch.zeros(len(sequences), length, dtype=torch.bool)):
            out = self.model(inputs_embeds=self.embed(self.tensor(sequences), rows), past_key_values=cache, use_cache=True)
        layers = []
        for layer in getattr(out.past_key_values, "layers", ()):
            plain = type(layer) is DynamicLayer
            unslid = type(layer) is DynamicSlidingWindowLayer and length < layer.sliding_window
            if not (plain or unslid) or layer.keys is None or layer.keys.shape[-2] != length:
                return None
            layers.append((layer.keys, layer.values))
        return Prefix(tuple(layers), length) if layers else None

    def logits(
        self,
        embeds: Tensor,
        keep: Tensor,
        *,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Next-token logits [K, V] at the K true positions of ``keep`` [B, T], in row-major order.

        Only these positions go through the LM head. ``cache`` holds what comes before ``embeds`` [B, T, d] and is extended.
        Without masks the rows must be padded on the right only.
        """
        arguments: dict[str, Any] = {"inputs_embeds": embeds, "use_cache": cache is not None}
        if cache is not None:
            arguments["past_key_values"] = cache
        if attention_mask is not None:
            arguments["attention_mask"] = attention_mask
        if position_ids is not None and "position_ids" in self._parameters:
            arguments["position_ids"] = position_ids
        with self._head_at(keep):
            return self.model(**arguments).logits  # type: ignore[no-any-return]

    def seq2seq_logits(self, embeds: Tensor, attention_mask: Tensor, decoder_ids: Tensor, keep: Tensor) -> Tensor:
        """Logits [K, V] of an encoder-decoder at the true positions of ``keep`` [B, T] over ``decoder_ids`` [B, T]."""
        with self._head_at(keep):
            return self.model(  # type: ignore[no-any-return]
                inputs_embeds=embeds, attention_mask=attention_mask, decoder_input_ids=decoder_ids, use_cache=False
            ).logits

    @contextmanager
    def _head_at(self, keep: Tensor) -> Iterator[None]:
        """Feeds the LM head only the hidden states [K, d] that ``keep`` selects from [B, T, d].

        Whatever a model does after its head (scaling, soft-capping) is element-wise, so this holds for every architecture.
        """
        head = self.model.get_output_embeddings()

        def select(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (inputs[0][keep.to(inputs[0].device)], *inputs[1:])

        handle = head.register_forward_pre_hook(select)
        try:
            yield
        finally:
            handle.remove()

    # --- tensors -----------------------------------------------------------------------------------------------------

    def tensor(self, sequences: Sequence[Sequence[int]], *, left: bool = False, pad: int = 0) -> Tensor:
        """Ids [B, T] on the model's device, padded with ``pad`` to the longest."""
        width = max(len(s) for s in sequences)
        padded = [[pad] * (width - len(s)) + list(s) if left else list(s) + [pad] * (width - len(s)) for s in sequences]
        return torch.tensor(padded, dtype=torch.long, device=self.device)
