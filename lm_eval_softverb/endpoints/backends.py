"""What a chat model is asked and what comes back, whoever answers; and what it may cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from lm_eval_softverb import storage
from lm_eval_softverb.errors import ArtifactError, BackendError, BudgetExceeded, ConfigError, did_you_mean

Refusal = Literal[
    "", "no_choices", "null_content", "empty", "content_filter", "malformed", "connection", "server", "rate_limit", "timeout"
]
"""Why there is no text; empty where there is."""


@dataclass(frozen=True)
class ChatRequest:
    """One conversation to continue.

    Attributes:
        messages: ``role`` and ``content`` each; the last is the user's.
        max_tokens: of the answer.
        temperature: 0 is greedy.
        top_p: share of the probability that is sampled from.
        seed: of this request's random stream; the answer depends on nothing else that is random.
    """

    messages: tuple[Mapping[str, str], ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    @classmethod
    def of(cls, *turns: str, max_tokens: int, **sampling: Any) -> ChatRequest:
        """Turns of user and assistant in alternation; examples first, the question last."""
        roles = ("user", "assistant")
        return cls(tuple({"role": roles[i % 2], "content": t} for i, t in enumerate(turns)), max_tokens, **sampling)


@dataclass(frozen=True)
class Reply:
    """The answer to one request: a text or a reason why there is none, never both.

    Attributes:
        finish: why the text ends, in OpenAI's words (``stop``, ``length``, …).
        model: the model that the server says it ran.
        attempts: requests sent for it, this one included.
        seconds: from sending the first of them to this answer, waits included.
    """

    text: str | None
    refusal: Refusal = ""
    finish: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    model: str = ""
    attempts: int = 1
    seconds: float = 0.0

    @classmethod
    def from_json(cls, value: Any) -> Reply:
        """A text that was kept as ``dataclasses.asdict``.

        Raises:
            ArtifactError: something else.
        """
        kinds: dict[str, Any] = {"text": str, "finish": str, "model": str, "seconds": (int, float)}
        kinds |= dict.fromkeys(("prompt_tokens", "completion_tokens", "attempts"), int)
        known = {**value, "refusal": ""} if isinstance(value, dict) else {}
        if known.keys() != {f.name for f in fields(cls)} or not all(isinstance(known[n], k) for n, k in kinds.items()):
            raise ArtifactError("The cache holds something else than a chat model's answer. Use another file.")
        return cls(**known)


class ChatBackend(Protocol):
    """A chat model, in process or behind an endpoint."""

    name: str
    """The model asked for; part of the identity of everything it writes."""

    def complete(self, requests: Sequence[ChatRequest]) -> list[Reply]:
        """One reply per request, in their order.

        Raises:
            BackendError: the model cannot be used at all (key, quota, unknown model), so that going on is pointless.
        """
        ...

    def count(self, request: ChatRequest) -> int:
        """Tokens of the prompt: exact for local models, an estimate for others. Nothing is sent."""
        ...

    def identity(self) -> dict[str, Any]:
        """What decides its answers besides the requests; JSON, and without any secret."""
        ...

    def events(self) -> dict[str, int]:
        """What happened on the way so far, e.g. how often a batch was halved because memory ran out."""
        ...


class StreamingBackend(ChatBackend, Protocol):
    """A backend that hands out replies as they arrive."""

    def stream(self, requests: Sequence[ChatRequest], admit: Callable[[int], None] = ...) -> Iterator[tuple[int, Reply]]: ...


@dataclass
class Usage:
    """Requests and attempts (retries included), tokens, US dollars, refusals by reason, events of the backend."""

    requests: int = 0
    attempts: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    dollars: float = 0.0
    refused: dict[str, int] = field(default_factory=dict)
    events: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def spent(self) -> dict[str, int]:
        """What earlier runs must be known by for a budget to hold over all of them."""
        return {"requests": self.requests, "prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens."""

    prompt: float = 0.0
    completion: float = 0.0

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


FREE = Price()


def read_price(path: Path, model: str) -> Price:
    """The price of ``model`` in a JSON file ``{"model": {"in": dollars, "out": dollars}}`` per million tokens.

    Raises:
        ConfigError: the model is not in the file, or its entry is not a price.
    """
    table = storage.read_json(path)
    if not isinstance(table, dict) or model not in table:
        known = list(table) if isinstance(table, dict) else []
        raise ConfigError(f"{path} has no price of {model!r}. {did_you_mean(model, known)} Add it, in dollars per 1M tokens.")
    entry = table[model]
    values: list[Any] = [entry.get(key) for key in ("in", "out")] if isinstance(entry, dict) else []
    if len(values) != 2 or not all(type(v) in (int, float) and v >= 0 for v in values):
        raise ConfigError(f'{path}: the price of {model!r} is {entry!r}, expected {{"in": 0.15, "out": 0.6}}.')
    return Price(*map(float, values))


@dataclass(frozen=True)
class Plan:
    """What a generator is going to ask, at most; nothing was sent to find out."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    dollars: float

    def __str__(self) -> str:
        tokens = f"{self.prompt_tokens:,} prompt and at most {self.completion_tokens:,} completion tokens"
        return f"{self.requests:,} requests, {tokens}, at most ${self.dollars:,.2f}"


@dataclass
class Metered:
    """A backend with a meter, and a limit that is checked before sending.

    The worst case of a call (every answer as long as allowed) must fit what is left. Only malformed replies that an endpoint
    charges for and that are asked again can pass the limit, within one call; they are in ``usage`` like all others.

    Attributes:
        usage: spent so far; starts with what an earlier run of the same file spent.
        max_dollars: None: no limit; likewise ``max_tokens`` (prompt and completion).
    """

    backend: ChatBackend
    price: Price = FREE
    max_dollars: float | None = None
    max_tokens: int | None = None
    usage: Usage = field(default_factory=Usage)

    def add_earlier(self, requests: int, prompt_tokens: int, completion_tokens: int) -> None:
        """Counts what an earlier run spent, at today's price."""
        self.usage.requests += requests
        self.usage.prompt_tokens += prompt_tokens
        self.usage.completion_tokens += completion_tokens
        self.usage.dollars += self.price.of(prompt_tokens, completion_tokens)

    def complete(self, requests: Sequence[ChatRequest]) -> list[Reply]:
        """Like the backend's.

        Raises:
            BudgetExceeded: the requests might cost more than is left; none of them was sent.
        """
        self._check(requests)
        before = self.backend.events()
        try:
            replies = self.backend.complete(requests)
        except BackendError as error:
            self._add(error.replies)
            raise
        self._add(replies)
        for name, count in self.backend.events().items():
            self.usage.events[name] = self.usage.events.get(name, 0) + count - before.get(name, 0)
        return replies

    def stream(self, requests: Sequence[ChatRequest]) -> Iterator[tuple[int, Reply]]:
        """Like the backend's, which must be a :class:`StreamingBackend`; a request is checked when its turn comes, with those
        under way at their worst.

        Raises:
            BudgetExceeded: the next request might cost more than is left; it was not sent, and none is under way.
        """
        backend = cast(StreamingBackend, self.backend)
        under_way: dict[int, ChatRequest] = {}

        def admit(index: int) -> None:
            self._check([*under_way.values(), requests[index]])
            under_way[index] = requests[index]

        for i, reply in backend.stream(requests, admit):
            del under_way[i]
            self._add([reply])
            yield i, reply

    def _add(self, replies: Sequence[Reply]) -> None:
        for reply in replies:
            self.usage.requests += 1
            self.usage.attempts += reply.attempts
            self.usage.prompt_tokens += reply.prompt_tokens
            self.usage.completion_tokens += reply.completion_tokens
            self.usage.dollars += self.price.of(reply.prompt_tokens, reply.completion_tokens)
            if reply.refusal:
                self.usage.refused[reply.refusal] = self.usage.refused.get(reply.refusal, 0) + 1

    def _check(self, requests: Sequence[ChatRequest]) -> None:
        if self.max_dollars is None and self.max_tokens is None:
            return
        prompt, completion = sum(map(self.backend.count, requests)), sum(r.max_tokens for r in requests)
        dollars = self.usage.dollars + self.price.of(prompt, completion)
        tokens = self.usage.prompt_tokens + self.usage.completion_tokens + prompt + completion
        for what, need, limit in (("dollars", dollars, self.max_dollars), ("tokens", tokens, self.max_tokens)):
            if limit is not None and need > limit:
                raise BudgetExceeded(
                    f"The next {len(requests)} requests may bring the total to {need:,.6g} {what}, the limit is {limit:,.6g}. "
                    "What is finished is kept; raise the limit and run the same command again to go on."
                )
