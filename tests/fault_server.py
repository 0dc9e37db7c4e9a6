"""An OpenAI-compatible HTTP server on the loopback device that misbehaves as told."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


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
