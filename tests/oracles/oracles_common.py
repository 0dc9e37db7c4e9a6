"""Where a prompt's tokens belong in a text, written down a second time and independently of the package."""

from __future__ import annotations

from toys import BOS

HARD = "Please decide whether the text"  # becomes the soft prompt
PLACES = [("prefix", "§"), ("after_bos", "§"), ("user_start", "Please §."), ("user_end", "Is it § or not?")]


def pieces(tokenizer, placement, frame, hard, text):
    """Ids of ``text`` with the ids ``hard`` in their place, by the words of the Frame docstring."""

    def more(part):
        return tokenizer.encode(part, add_special_tokens=False) if part else []

    if placement == "prefix":
        return hard + tokenizer.encode(text)
    if placement == "after_bos":
        return [BOS, *hard, *more(text)]
    before, after = frame.split("§")
    if placement == "user_start":
        return tokenizer.encode(before) + hard + more(f"{after} {text}")
    return tokenizer.encode(f"{text} {before}") + hard + more(after)


def hard_cases(kinds):
    """Every kind of model with a prefix, and every placement on some."""
    return [(name, *place) for place in PLACES for name in kinds if place[0] == "prefix" or name in ("llama", "gpt2", "gemma3")]
