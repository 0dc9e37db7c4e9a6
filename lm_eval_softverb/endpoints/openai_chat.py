"""Any OpenAI-compatible endpoint. The only file that imports the ``openai`` package, and only when a backend is made.

The SDK's own retries are off: it retries an exhausted quota and accepts replies without choices. Here a failure is either
final for the whole run, or tried again a bounded number of times and then counted as a refusal.
"""

from __future__ import annotations

import email.utils
import json
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

from lm_eval_softverb.endpoints.backends import ChatRequest, Refusal, Reply
from lm_eval_softverb.errors import BackendError, BudgetExceeded, ConfigError, MissingExtra

KEY = "OPENAI_API_KEY"
OFFICIAL = "https://api.openai.com/v1"
TRANSPORT = frozenset({"connection", "server", "rate_limit", "timeout"})
QUOTA = frozenset({"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"})
# A request is worth trying again after these (and after any 5xx); every other status will be the same next time.
TRANSIENT = frozenset({408, 409, 425, 429})


class OpenAIChat:
    """Chat completions over HTTP, several at a time.

    Args:
        model: as the endpoint calls it.
        base_url: of the endpoint, e.g. ``http://127.0.0.1:8000/v1``; default: OpenAI's.
        concurrency: most requests under way at a time.
        attempts: how often one request is sent at most.
        timeout: seconds per attempt.
        backoff: seconds before the second attempt; doubles each time, at most ``max_wait``. A server's Retry-After wins.
        max_wait: a server that asks for a longer wait ends the run instead.
        tokens_field: newer OpenAI models want ``max_completion_tokens``.

    The key comes from the environment variable ``OPENAI_API_KEY`` only; endpoints of one's own may do without.

    Raises:
        ConfigError: no key, a URL with credentials in it, or settings out of range.
        MissingExtra: the package ``openai`` is not installed.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        *,
        concurrency: int = 8,
        attempts: int = 5,
        timeout: float = 120.0,
        backoff: float = 1.0,
        max_wait: float = 120.0,
        tokens_field: str = "max_tokens",
    ) -> None:
        if concurrency < 1 or attempts < 1 or timeout <= 0:
            raise ConfigError(f"concurrency {concurrency}, attempts {attempts} and timeout {timeout} must be positive.")
        if base_url and ("@" in base_url or "?" in base_url):
            raise ConfigError(f"The base URL must not carry credentials or parameters; put the key into {KEY}.")
        key = os.environ.get(KEY, "")
        if not key and not base_url:
            raise ConfigError(f"{KEY} is not set. Set it, or pass the base URL of a server of your own.")
        try:
            import openai
        except ImportError as error:
            raise MissingExtra("The package openai is not installed: pip install 'lm_eval_softverb[api]'.") from error
        self.name = model
        self.base_url = base_url or OFFICIAL
        self._sdk: Any = openai
        self._key = key
        self._client: Any = openai.OpenAI(api_key=key or "none", base_url=self.base_url, max_retries=0, timeout=timeout)
        self._concurrency, self._attempts = concurrency, attempts
        self._backoff, self._max_wait = backoff, max_wait
        self.tokens_field = tokens_field

    def identity(self) -> dict[str, Any]:
        return {"backend": "openai", "model": self.name, "base_url": self.base_url}

    def events(self) -> dict[str, int]:
        return {}

    def count(self, request: ChatRequest) -> int:
        """A generous estimate: three bytes a token, eight tokens a message."""
        return sum(len(m["content"].encode()) // 3 + 8 for m in request.messages)

    def complete(self, requests: Sequence[ChatRequest]) -> list[Reply]:
        """Replies in the order of ``requests``.

        Raises:
            BackendError: bad key, no permission, unknown model, a request that is wrong, an exhausted quota, or every
                request failed. Its ``replies`` are those that came before.
        """
        found: dict[int, Reply] = {}
        try:
            for i, reply in self.stream(requests):
                found[i] = reply
        except BackendError as error:
            raise BackendError(str(error), [found[i] for i in sorted(found)]) from None
        replies = [found[i] for i in range(len(requests))]
        if replies and all(r.refusal in TRANSPORT for r in replies):
            raise BackendError(self.nothing_but_failures(len(replies), replies[-1].refusal), replies)
        return replies

    def nothing_but_failures(self, n: int, reason: str) -> str:
        return (
            f"All {n} requests to {self.base_url} failed, each after {self._attempts} attempts (last reason: {reason}). "
            "Check the endpoint; the same command goes on where this one stopped."
        )

    def stream(
        self, requests: Sequence[ChatRequest], admit: Callable[[int], None] = lambda _index: None
    ) -> Iterator[tuple[int, Reply]]:
        """``(index, reply)`` as they arrive, in the caller's thread.

        Args:
            admit: asked before a request is sent. When it raises :class:`BudgetExceeded` it is asked again after each reply
                to those under way, and raised only when there are none left.

        Raises:
            BackendError: as :meth:`complete`, but after everything that was under way has been yielded.
        """
        stop = threading.Event()
        waiting = deque(range(len(requests)))
        under_way: dict[Future[Reply], int] = {}
        failure: BackendError | None = None
        with ThreadPoolExecutor(max_workers=self._concurrency) as pool:
            try:
                while waiting or under_way:
                    while waiting and not failure and len(under_way) < self._concurrency:
                        try:
                            admit(waiting[0])
                        except BudgetExceeded:
                            if not under_way:
                                raise
                            break
                        i = waiting.popleft()
                        under_way[pool.submit(self._one, requests[i], stop)] = i
                    if not under_way:
                        break
                    for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                        i = under_way.pop(future)
                        try:
                            reply = future.result()
                        except BackendError as error:
                            failure = failure or error
                            stop.set()
                            continue
                        yield i, reply
            finally:
                stop.set()  # Ctrl-C: let those that wait for another attempt go home
        if failure:
            raise failure

    def _one(self, request: ChatRequest, stop: threading.Event) -> Reply:
        prompt, completion, began = 0, 0, time.monotonic()
        for attempt in range(1, self._attempts + 1):
            reply, pause = self._attempt(request)
            # A malformed answer was paid for like a good one.
            prompt, completion = prompt + reply.prompt_tokens, completion + reply.completion_tokens
            if not reply.refusal or attempt == self._attempts or stop.is_set():
                seconds = time.monotonic() - began
                return Reply(reply.text, reply.refusal, reply.finish, prompt, completion, reply.model, attempt, seconds)
            if pause is None:
                pause = min(self._max_wait, self._backoff * 2 ** (attempt - 1)) * random.uniform(1.0, 1.25)
            elif pause > self._max_wait:
                raise BackendError(
                    f"{self.base_url} asks to wait {pause:.0f} s, more than the {self._max_wait:.0f} s allowed. Run the same "
                    "command again later; what is finished is kept."
                )
            stop.wait(pause)
        raise AssertionError("unreachable")

    def _attempt(self, request: ChatRequest) -> tuple[Reply, float | None]:
        """One reply, and the seconds that the server wants us to wait before the next, where it says so."""
        sampling: dict[str, Any] = {self.tokens_field: request.max_tokens, "temperature": request.temperature}
        if request.top_p < 1.0:
            sampling["top_p"] = request.top_p
        try:
            answer = self._client.chat.completions.create(
                model=self.name,
                messages=[dict(m) for m in request.messages],
                seed=request.seed % 2**31,
                **sampling,
            )
        except self._sdk.APITimeoutError:
            return Reply(None, "timeout"), None
        except self._sdk.APIConnectionError:
            return Reply(None, "connection"), None
        except self._sdk.APIStatusError as error:
            return self._status(error)
        except (self._sdk.APIError, ValueError):  # ValueError: the SDK lets a JSONDecodeError through
            return Reply(None, "malformed"), None
        reply = _reply(answer)
        # A server that repeats the key must not bring it into results.
        return replace(reply, text=reply.text and self._hide(reply.text), model=self._hide(reply.model)), None

    def _status(self, error: Any) -> tuple[Reply, float | None]:
        code, status = str(getattr(error, "code", "") or ""), int(error.status_code)
        kind = str(getattr(error, "type", "") or "")
        if {code, kind} & QUOTA:
            raise BackendError(f"The quota at {self.base_url} is exhausted ({self._clean(error)}). What is finished is kept.")
        if status in TRANSIENT or status >= 500:
            return Reply(None, "rate_limit" if status == 429 else "server"), retry_after(error.response.headers)
        if code == "content_filter" or kind == "content_filter":
            return Reply(None, "content_filter"), None
        advice = {401: f"Check {KEY}.", 403: f"Check what {KEY} may use.", 404: "Check the model and the base URL."}
        raise BackendError(
            f"{self.base_url} refused model {self.name!r} with status {status}: {self._clean(error)}. "
            f"{advice.get(status, 'The request will not be right the next time either.')}"
        )

    def _clean(self, error: Any) -> str:
        """The server's words in one short line; some servers repeat the key."""
        text, body = str(getattr(error, "message", error)), getattr(error, "body", None)
        if body and " - " not in text:  # the SDK quotes OpenAI's own shape of errors only
            text += f" - {body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)}"
        return self._hide(" ".join(text.split()))[:300]

    def _hide(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


def _reply(answer: Any) -> Reply:
    """Checks the shape: the SDK builds its objects from whatever JSON came."""
    usage = getattr(answer, "usage", None)
    counts = [getattr(usage, name, 0) for name in ("prompt_tokens", "completion_tokens")]
    prompt, completion = (n if isinstance(n, int) and n > 0 else 0 for n in counts)
    model = getattr(answer, "model", "")
    model = model[:200] if isinstance(model, str) else ""

    def refused(reason: Refusal, finish: str = "") -> Reply:
        return Reply(None, reason, finish, prompt, completion, model)

    choices = getattr(answer, "choices", None)
    if not isinstance(choices, list) or not choices:
        return refused("no_choices")
    message, finish = getattr(choices[0], "message", None), str(getattr(choices[0], "finish_reason", "") or "")
    text = getattr(message, "content", None)
    if finish == "content_filter" or getattr(message, "refusal", None):
        return refused("content_filter", finish)
    if not isinstance(text, str):
        return refused("null_content", finish)
    if not text.strip():
        return refused("empty", finish)
    return Reply(text, "", finish, prompt, completion, model)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait according to ``retry-after-ms`` or ``Retry-After`` (seconds or a date); None: the server does not say.

    A date is read by the server's own clock, where the answer has one.
    """
    try:
        return max(0.0, float(headers["retry-after-ms"]) / 1000)
    except (KeyError, ValueError):
        pass
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    until, now = _seconds(value), _seconds(headers.get("date", ""))
    return None if until is None else max(0.0, until - (time.time() if now is None else now))


def _seconds(date: str) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):
        return None
