"""Chat templates, with nothing dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from lm_eval_softverb.errors import FrameError


def render_chat(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool, arguments: Mapping[str, Any]
) -> tuple[str, int]:
    """Renders ``messages`` with the tokenizer's chat template.

    A template that rejects or leaves out a system message gets its text at the head of the first user turn (the harness
    drops it).

    Returns:
        The text, and 1 if a system message was folded, else 0.

    Raises:
        FrameError: no chat template, or the template rejects the messages for another reason.
    """
    if not tokenizer.chat_template:
        raise FrameError(
            f"{tokenizer.name_or_path} has no chat template. Run without --apply_chat_template, or use another tokenizer."
        )

    def render(chat: Sequence[Mapping[str, str]]) -> str:
        return str(
            tokenizer.apply_chat_template(
                [dict(m) for m in chat],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **arguments,
            )
        )

    system = [m["content"] for m in messages if m["role"] == "system"]
    try:
        text = render(messages)
        if all(content.strip() in text for content in system):
            return text, 0
        reason = "it leaves the system message out"
    except jinja2.exceptions.TemplateError as error:
        reason = str(error)
    rest = [dict(m) for m in messages if m["role"] != "system"]
    user = next((m for m in rest if m["role"] == "user"), None)
    if not system or user is None:
        raise FrameError(
            f"The chat template of {tokenizer.name_or_path} rejects the messages ({reason}); roles: "
            f"{[m['role'] for m in messages]}."
        )
    user["content"] = "\n\n".join([*system, user["content"]])
    try:
        return render(rest), 1
    except jinja2.exceptions.TemplateError as error:
        raise FrameError(
            f"The chat template of {tokenizer.name_or_path} rejects the messages even without a system role ({error})."
        ) from error
