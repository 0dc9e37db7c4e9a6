"""A backend in a few lines."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from lm_eval_softverb.endpoints.backends import Reply

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
