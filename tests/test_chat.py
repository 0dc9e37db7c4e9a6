"""Chat templates: nothing of a conversation is dropped, and what was moved is counted."""

from __future__ import annotations

import pytest
from toys import CHATML, NO_SYSTEM, make_tokenizer

from lm_eval_softverb.chat import render_chat
from lm_eval_softverb.errors import FrameError

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Good or bad?"}]
SILENT = "{% for m in messages %}{% if m['role'] == 'user' %}[U]{{ m['content'] }}{% endif %}{% endfor %}"


def test_a_template_with_a_system_role_gets_the_messages_as_they_are():
    text, folded = render_chat(make_tokenizer(template=CHATML), CHAT, True, {})
    assert folded == 0
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nGood or bad?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("template", [NO_SYSTEM, SILENT], ids=["rejects", "leaves-out"])
def test_a_template_without_a_system_role_gets_the_text_in_the_user_turn(template):
    text, folded = render_chat(make_tokenizer(template=template), CHAT, True, {})
    assert folded == 1
    assert "Be brief.\n\nGood or bad?" in text


def test_a_trimmed_system_message_is_no_dropped_one():
    template = CHATML.replace("m['content']", "m['content'] | trim")
    chat = [{"role": "system", "content": " Be brief. \n"}, CHAT[1]]
    text, folded = render_chat(make_tokenizer(template=template), chat, True, {})
    assert (folded, text.count("Be brief.")) == (0, 1)


def test_the_first_user_turn_takes_it_and_the_messages_are_not_changed():
    chat = [CHAT[0], CHAT[1], {"role": "assistant", "content": "good"}, {"role": "user", "content": "And now?"}]
    before = [dict(m) for m in chat]
    text, _ = render_chat(make_tokenizer(template=NO_SYSTEM), chat, True, {})
    assert "user\nBe brief.\n\nGood or bad?" in text
    assert "user\nAnd now?" in text
    assert chat == before


def test_an_unfinished_answer_is_continued():
    chat = [CHAT[1], {"role": "assistant", "content": "The answer is"}]
    text, _ = render_chat(make_tokenizer(template=CHATML), chat, False, {})
    assert text.endswith("<|im_start|>assistant\nThe answer is")


def test_arguments_reach_the_template():
    template = CHATML + "{% if enable_thinking is defined %}<think={{ enable_thinking }}>{% endif %}"
    text, _ = render_chat(make_tokenizer(template=template), CHAT, True, {"enable_thinking": False})
    assert text.endswith("<think=False>")


def test_no_template_is_an_error_with_the_remedy():
    with pytest.raises(FrameError, match=r"no chat template.*--apply_chat_template"):
        render_chat(make_tokenizer(template=None), CHAT, True, {})


@pytest.mark.parametrize(
    ("template", "chat"),
    [
        (NO_SYSTEM, CHAT[:1]),
        ("{{ raise_exception('never') }}", CHAT[1:]),
        ("{{ raise_exception('never') }}", CHAT),
    ],
    ids=["nothing-to-fold-into", "rejected-without-system", "rejected-even-folded"],
)
def test_messages_that_a_template_rejects_are_an_error(template, chat):
    with pytest.raises(FrameError, match="rejects"):
        render_chat(make_tokenizer(template=template), chat, True, {})
