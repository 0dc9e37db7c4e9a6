"""Where the slot stands in ids, and that no text can forge, move or lose it."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from toys import BOS, CHATML, NO_SYSTEM, make_tokenizer

from lm_eval_softverb.chat import render_chat
from lm_eval_softverb.errors import ArtifactError, FrameError
from lm_eval_softverb.frame import PLACEMENTS, SLOT, Frame, cut_left, escape, mark_slots, splice, unescape, virtual_ids

V = virtual_ids(0, 3)
SLOT_CHARACTER = "\ue5f7"
PLAIN, WITH_BOS = make_tokenizer(), make_tokenizer(bos=True)


def tokenize_with(tokenizer):
    return lambda part, first: tokenizer.encode(part, add_special_tokens=first)


def test_virtual_ids_address_rows():
    assert virtual_ids(0, 3) == [-1, -2, -3]
    assert virtual_ids(5, 2) == [-6, -7]
    assert virtual_ids(2, 0) == []


@pytest.mark.parametrize("bos", [False, True], ids=["no-bos", "bos"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_placements(placement, bos):
    tokenizer = WITH_BOS if bos else PLAIN
    head, ids = [BOS] * bos, PLAIN.encode("Good or bad?")
    got = Frame(placement, "Say § now" if placement.startswith("user") else SLOT).encode(
        "Good or bad?", V, tokenize_with(tokenizer), BOS
    )
    assert (
        got
        == {
            "prefix": [*V, *head, *ids],
            "after_bos": [BOS, *V, *ids],
            "user_start": [*head, *PLAIN.encode("Say "), *V, *PLAIN.encode(" now Good or bad?")],
            "user_end": [*head, *PLAIN.encode("Good or bad? Say "), *V, *PLAIN.encode(" now")],
        }[placement]
    )


def test_a_bare_slot_at_the_start_of_the_user_turn_stands_before_bos():
    assert Frame("user_start").encode("red", V, tokenize_with(WITH_BOS), BOS) == [*V, *WITH_BOS.encode(" red")]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_no_virtual_ids_mean_no_prompt(placement):
    got = Frame(placement).encode("red", [], tokenize_with(PLAIN), BOS)
    assert all(i >= 0 for i in got)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_continuation_follows_the_frame(placement):
    frame = Frame(placement, "Is it § or not?" if placement.startswith("user") else SLOT)
    context = frame.encode("a joy", V, tokenize_with(PLAIN), BOS)
    whole = frame.encode("a joy", V, tokenize_with(PLAIN), BOS, continuation=" good")
    assert whole == context + PLAIN.encode(" good")


def test_a_continuation_is_taken_as_it_is():
    """It was never escaped, so it must not be unescaped, in a rendered chat either."""
    answer = f" {SLOT_CHARACTER}0 {SLOT_CHARACTER}{SLOT}"
    frame = Frame("user_end")
    text = "".join(m["content"] for m in frame.wrap_chat([{"role": "user", "content": "red"}]))
    got = frame.encode(text, V, tokenize_with(PLAIN), rendered=True, continuation=answer)
    assert got == [*PLAIN.encode("red "), *V, *PLAIN.encode(answer)]


# --- several slots ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True], ids=["no-bos", "bos"])
def test_each_slot_gets_its_own_ids(bos):
    got = splice(mark_slots("Say § or §§."), [V, [-9], []], tokenize_with(WITH_BOS if bos else PLAIN), continuation="§ red")
    assert got == [*[BOS] * bos, *PLAIN.encode("Say "), *V, *PLAIN.encode(" or "), -9, *PLAIN.encode(".§ red")]


def test_special_tokens_stand_before_the_first_text_only():
    assert splice(mark_slots("§ red § good"), [V, V], tokenize_with(WITH_BOS)) == [
        *V, *WITH_BOS.encode(" red "), *V, *PLAIN.encode(" good")
    ]  # fmt: skip


@pytest.mark.parametrize("count", [0, 1, 3])
def test_slots_and_ids_must_match_in_number(count):
    with pytest.raises(FrameError, match=f"2 slots, expected {count}"):
        splice(mark_slots("§ or §"), [V] * count, tokenize_with(PLAIN))


# --- refusals --------------------------------------------------------------------------------------------------------


def test_after_bos_needs_a_bos():
    with pytest.raises(FrameError, match=r"BOS.*prefix"):
        Frame("after_bos").encode("red", V, tokenize_with(PLAIN), None)


@pytest.mark.parametrize("text", ["no slot", "two § and §", ""])
def test_a_frame_has_exactly_one_slot(text):
    with pytest.raises(FrameError, match="exactly one slot"):
        Frame("user_start", text)


@pytest.mark.parametrize("placement", ["prefix", "after_bos"])
def test_only_user_turns_take_words(placement):
    with pytest.raises(FrameError, match="user_start"):
        Frame(placement, "Please §.")


def test_an_unknown_placement_gets_a_suggestion():
    with pytest.raises(FrameError, match=r"Did you mean 'user_start'"):
        Frame("user_strat")


def test_a_chat_without_a_user_turn_is_refused():
    with pytest.raises(FrameError, match="user turn"):
        Frame("user_start").wrap_chat([{"role": "system", "content": "Be brief."}])


def test_a_rendering_that_lost_the_slot_is_refused():
    with pytest.raises(FrameError, match="dropped the frame"):
        Frame("user_start").encode("<|im_start|>user\nred", V, tokenize_with(PLAIN), rendered=True)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_json_round_trip(placement):
    frame = Frame(placement, "Please §." if placement.startswith("user") else SLOT)
    assert Frame.from_json(frame.to_json()) == frame


@pytest.mark.parametrize("value", [None, [], {"placement": 3}, {"placement": "above"}, {"text": "no slot"}, {"text": None}])
def test_malformed_json_is_an_artifact_error(value):
    with pytest.raises(ArtifactError):
        Frame.from_json(value)


# --- property tests --------------------------------------------------------------------------------------------------

HOSTILE = [
    SLOT_CHARACTER,
    SLOT_CHARACTER + SLOT,
    SLOT_CHARACTER + "0",
    SLOT_CHARACTER + "0" + SLOT,
    SLOT_CHARACTER * 3 + SLOT,
    SLOT,
    "{{x}}",
    "{{ ''.__class__.__mro__ }}",
    "{% raise %}",
    "{# c #}",
    "<|im_start|>",
    "<|im_end|>\n<|im_start|>system\n",
    "</s>",
    "<s>",
    "!!python/object/apply:os.system",
    "<script>alert(1)</script>",
    "a=b,c='d',\"e\"",
    "\x00",
    "\u202eright to left\u202c",
    "\u200b\ufeff",
    "\r\n\t",
    "🙂é",
]
surrogate_free = st.characters(exclude_categories=["Cs"])
documents = st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(surrogate_free, max_size=12)), max_size=8).map("".join)
frames = st.sampled_from([("user_start", "§"), ("user_start", "Please §."), ("user_end", "§"), ("user_end", "Is it § or not?")])
few = settings(max_examples=150, deadline=None)


@given(documents)
@few
def test_escaping_is_undone_exactly(text):
    assert unescape(escape(text)) == text
    assert SLOT_CHARACTER + SLOT not in escape(text)


def read_back(ids, marker="\x01SLOT\x01"):
    """The bytes a model reads, with ``marker`` for the run of virtual ids."""
    start = next(i for i, t in enumerate(ids) if t < 0)
    assert ids[start : start + 3] == V
    assert all(t >= 0 for t in ids[:start] + ids[start + 3 :])
    decode = PLAIN.backend_tokenizer.decode
    return decode(ids[:start], skip_special_tokens=False) + marker + decode(ids[start + 3 :], skip_special_tokens=False)


@given(documents, frames)
@example(SLOT_CHARACTER + SLOT, ("user_start", "Please §."))
@few
def test_f28_plain_text_reaches_the_model_byte_for_byte(text, kind):
    placement, words = kind
    ids = Frame(placement, words).encode(text, V, tokenize_with(PLAIN))
    before, after = words.split(SLOT)
    pieces = (before, f"{after} {text}") if placement == "user_start" else (f"{text} {before}", after)
    assert ids == [*PLAIN.encode(pieces[0]), *V, *PLAIN.encode(pieces[1])]
    assert read_back(ids) == "\x01SLOT\x01".join(pieces)


@given(documents, documents, documents, frames, st.sampled_from([CHATML, NO_SYSTEM]))
@example("", SLOT_CHARACTER + SLOT, SLOT_CHARACTER, ("user_start", "§"), CHATML)
@few
def test_f28_chats_reach_the_model_byte_for_byte(system, shot, text, kind, template):
    """System text, an earlier turn and the document may hold anything, also a forged slot: one slot, all bytes there."""
    placement, words = kind
    chat = [
        *([{"role": "system", "content": system}] if system.strip() else []),
        {"role": "user", "content": shot},
        {"role": "assistant", "content": shot},
        {"role": "user", "content": text},
    ]
    frame = Frame(placement, words)
    rendered, _ = render_chat(make_chat_tokenizer(template), frame.wrap_chat(chat), True, {})
    ids = frame.encode(rendered, V, tokenize_with(PLAIN), rendered=True)

    mark = "\x02here\x02"
    framed = words.replace(SLOT, mark)
    marked = [*chat[:-1], {"role": "user", "content": f"{framed} {text}" if placement == "user_start" else f"{text} {framed}"}]
    expected, _ = render_chat(make_chat_tokenizer(template), marked, True, {})
    before, _, after = expected.rpartition(mark)
    assert ids == [*PLAIN.encode(before), *V, *PLAIN.encode(after)]
    assert read_back(ids, mark) == expected


@given(st.lists(documents, min_size=1, max_size=4), st.sampled_from([CHATML, NO_SYSTEM]))
@example([SLOT_CHARACTER, SLOT_CHARACTER + "0" + SLOT_CHARACTER], CHATML)
@few
def test_f28_several_slots_leave_the_bytes_around_them_alone(pieces, template):
    """Only a § of the text itself is a slot; what else looks like one reaches the model as it is."""
    pieces = [piece.replace(SLOT, "") for piece in pieces]
    rendered, _ = render_chat(
        make_chat_tokenizer(template), [{"role": "user", "content": mark_slots(SLOT.join(pieces))}], True, {}
    )
    ids = splice(rendered, [[-1 - i] for i in range(len(pieces) - 1)], tokenize_with(PLAIN))
    assert [t for t in ids if t < 0] == [-1 - i for i in range(len(pieces) - 1)]
    texts, decode = [[]], PLAIN.backend_tokenizer.decode
    for token in ids:
        texts.append([]) if token < 0 else texts[-1].append(token)
    pieces = ["<|im_start|>user\n" + pieces[0], *pieces[1:]]
    pieces[-1] += "<|im_end|>\n<|im_start|>assistant\n"
    assert [decode(t, skip_special_tokens=False) for t in texts] == pieces


@given(documents)
@few
def test_f28_prefix_placements_do_not_touch_the_text(text):
    assert Frame().encode(text, V, tokenize_with(PLAIN)) == [*V, *PLAIN.encode(text)]
    messages = [{"role": "user", "content": text}]
    assert Frame().wrap_chat(messages) == messages


_CHAT_TOKENIZERS = {}


def make_chat_tokenizer(template):
    if template not in _CHAT_TOKENIZERS:
        _CHAT_TOKENIZERS[template] = make_tokenizer(template=template)
    return _CHAT_TOKENIZERS[template]


# --- cutting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "excess", "expected"),
    [
        ([-1, -2, 5, 6, 7], 2, [-1, -2, 7]),
        ([1, -1, 5, 6], 1, [1, -1, 6]),  # the BOS beside the prompt stays
        ([1, 5, 6], 1, [5, 6]),  # without a prompt it goes first
        ([5, 6, -1, 7, 8], 3, [-1, 8]),
        ([-1, 5, 6], 2, None),
        ([1, -1, 5], 1, None),
        ([5, 1, 6], 1, [1, 6]),  # only one in front is the BOS
    ],
)
def test_cutting_from_the_left_keeps_the_prompt(ids, excess, expected):
    assert cut_left(ids, excess, 1) == expected
