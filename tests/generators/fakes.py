"""Backends in a few lines, and an HTTP server that misbehaves as told."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from lm_eval_softverb.generators.backends import Reply

NOUNS = [
    "anvil",
    "basin",
    "cactus",
    "dagger",
    "eraser",
    "falcon",
    "gravel",
    "hinge",
    "igloo",
    "jigsaw",
    "kernel",
    "lantern",
    "mallet",
    "nickel",
    "otter",
    "pebble",
    "quiver",
    "raft",
    "saucer",
    "thimble",
    "urn",
    "vulture",
    "walnut",
    "yacht",
    "zipper",
    "acorn",
    "bobbin",
    "cobweb",
    "dynamo",
    "ember",
    "fiddle",
    "goblet",
    "harpoon",
    "ingot",
    "jasmine",
    "kayak",
    "locket",
    "muffin",
    "nozzle",
    "orchid",
    "parcel",
    "quartz",
    "rivet",
    "sickle",
    "trowel",
    "velvet",
    "wicker",
    "yogurt",
    "zebra",
    "almond",
    "badger",
    "candy",
    "dune",
]
VERBS = ["carried", "dropped", "found", "painted", "polished", "sold", "lost", "wanted", "borrowed", "admired"]


def draw(seed, options, n):
    """``n`` different options, a function of ``seed``."""
    return sorted(options, key=lambda o: hashlib.sha256(f"{seed}:{o}".encode()).digest())[:n]


@dataclass
class Writer:
    """Answers from the request alone: label sets from NOUNS, sentences with numbers made of words.

    ``fail_at``: the call that raises (as a kill would); ``quality``: share of usable sentences is 1 - 1/quality.
    """

    name: str = "writer"
    fail_at: int | None = None
    calls: int = 0
    asked: list = field(default_factory=list)
    labels: object = None

    def identity(self):
        return {"backend": "fake", "model": self.name}

    def events(self):
        return {"calls": self.calls}

    def count(self, request):
        return sum(len(m["content"].split()) for m in request.messages)

    def complete(self, requests):
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        self.asked += requests
        return [self.reply(r) for r in requests]

    def reply(self, request):
        text = self.text(request)
        return Reply(text, "" if text else "empty", "stop", self.count(request), len(text.split()) if text else 0, self.name)

    def text(self, request):
        question = request.messages[-1]["content"]
        if question.startswith("Words:"):
            return self.labels(request) if self.labels else "things: " + ", ".join(draw(request.seed, NOUNS, 8))
        lines = []
        for i in range(10):
            a, b, c = draw(f"{request.seed}{i}", ["north", "south", "east", "west", "spring", "summer", "autumn", "winter"], 3)
            verb = draw(f"{request.seed}{i}", VERBS, 1)[0]
            lines.append(f"{i + 1}. My {a} cousin {verb} it near the {b} harbor last {c} at {request.seed % 9999 + i}.")
        return "\n".join(lines)


# --- a server --------------------------------------------------------------------------------------------------------


def good(text="fine", **changes):
    """The body of a healthy reply."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    body = {"id": "x", "object": "chat.completion", "created": 1, "model": "served-model", "choices": [choice], "usage": usage}
    return body | changes


def error(code="", message="no", kind="error"):
    return {"error": {"message": message, "type": kind, "code": code}}


class Server:
    """``Server(script)``: call number ``i`` gets ``script[i]``, then healthy replies that repeat the question.

    An entry is ``(status, body, headers)``, ``"reset"``, ``"hang"``, ``"truncated"`` or ``"slow"``.
    """

    def __init__(self, script=(), delay=0.0):
        self.script, self.requests, self.times, self.keys = list(script), [], [], []
        self.delay, self.open, self.most_open = delay, 0, 0
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_args):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    number = len(outer.requests)
                    outer.requests.append(body)
                    outer.times.append(time.monotonic())
                    outer.keys.append(self.headers.get("authorization"))
                    outer.open += 1
                    outer.most_open = max(outer.most_open, outer.open)
                time.sleep(outer.delay)
                with lock:  # before the answer, which lets the client send its next request
                    outer.open -= 1
                self.answer(outer.script[number] if number < len(outer.script) else None, body)

            def answer(self, entry, body):
                if entry == "reset":
                    self.connection.close()
                    return
                if entry == "hang":
                    time.sleep(1.2)
                    self.connection.close()
                    return
                status, reply, headers = entry if isinstance(entry, tuple) else (200, good(body["messages"][-1]["content"]), {})
                data = json.dumps(reply).encode()
                if entry == "truncated":
                    data = data[: len(data) // 2]
                self.send_response(status)
                for name, value in {"content-type": "application/json", "content-length": len(data), **headers}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(data)

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._http.handle_error = lambda *_a: None
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self._http.shutdown()
        self._http.server_close()
