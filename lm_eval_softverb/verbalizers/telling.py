"""Answers in an instruction: what a prompt says to anything is also what an instruction for its task should name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

OFTEN = 0.06
"""Share of all draws from which an answer may be one of a few to choose from."""
MOST_CHOICES = 5
COVER = 0.5
"""Share of all draws that such answers have together; where they have less, the prompt writes freely."""
EXAMPLES = 4
CHOOSE = "In this task, you are given a text. Your task is to classify the given text."
WRITE = "In this task, you are given a text. Your task is to write an answer to the given text."
"""All that answers alone tell about a task: to choose among a few, or to write."""
CHOICES_ARE = "Answer with {}."
LOOKS_LIKE = "The output is a text such as {}."
QUOTED, OR = "'{}'", " or "
RULE = (OFTEN, MOST_CHOICES, COVER, EXAMPLES, CHOOSE, WRITE, CHOICES_ARE, LOOKS_LIKE, QUOTED, OR)
"""All of the above, for hashes."""


def choices(answers: Mapping[str, float]) -> list[str]:
    """The answers to choose from, the most frequent first; none where the prompt writes freely.

    Args:
        answers: different answers with their shares, the most frequent first.
    """
    often = [text for text, share in answers.items() if share >= OFTEN][:MOST_CHOICES]
    return often if sum(answers[text] for text in often) > COVER else []


def named(answers: Mapping[str, float]) -> list[str]:
    """The answers that an instruction names."""
    return choices(answers) or list(answers)[:EXAMPLES]


def ending(answers: Mapping[str, float], names: Sequence[str] | None = None) -> str:
    """The last sentence of an instruction: which answers to choose from, or how answers look; "" where there are none.

    Args:
        names: the answers to name, if not those of :func:`named`.
    """
    names = named(answers) if names is None else names
    sentence = CHOICES_ARE if choices(answers) else LOOKS_LIKE
    return sentence.format(OR.join(QUOTED.format(text) for text in names)) if names else ""


def instruction(answers: Mapping[str, float], names: Sequence[str] | None = None) -> str:
    """An instruction from answers alone, without training: of two kinds of task the likelier, and which answers it has."""
    return f"{CHOOSE if choices(answers) else WRITE} {ending(answers, names)}".rstrip()
