"""Which answers an instruction names, and how."""

from __future__ import annotations

import pytest

from lm_eval_softverb.verbalizers.telling import CHOOSE, WRITE, choices, ending, instruction, named


@pytest.mark.parametrize(
    ("answers", "few"),
    [
        ({"yes": 0.5, "no": 0.3, "maybe": 0.05}, ["yes", "no"]),  # rare ones are no choice
        ({"yes": 0.3, "no": 0.2}, []),  # most answers are others
        ({"a": 0.2, "b": 0.2, "c": 0.2, "d": 0.1, "e": 0.1, "f": 0.1}, ["a", "b", "c", "d", "e"]),  # five at most
        ({"same": 1.0}, ["same"]),
        ({}, []),
    ],
)
def test_a_few_answers_that_cover_most_draws_are_choices(answers, few):
    assert choices(answers) == few


def test_choices_are_all_named():
    answers = {"yes": 0.5, "no": 0.3, "maybe": 0.05}
    assert named(answers) == ["yes", "no"] and ending(answers) == "Answer with 'yes' or 'no'."
    assert instruction(answers) == f"{CHOOSE} Answer with 'yes' or 'no'."


def test_of_free_answers_a_few_are_examples():
    answers = {f"text {i}": 0.1 - i / 1000 for i in range(10)}
    few = [f"text {i}" for i in range(4)]
    assert named(answers | {"text 9": 0.01}) == few
    assert instruction(dict.fromkeys(answers, 0.04)) == (
        f"{WRITE} The output is a text such as 'text 0' or 'text 1' or 'text 2' or 'text 3'."
    )


def test_without_answers_nothing_is_named():
    assert ending({}) == "" and named({}) == [] and instruction({}) == WRITE


def test_fewer_names_do_not_change_what_the_task_is():
    answers = {"yes": 0.3, "no": 0.25}
    assert instruction(answers, ["yes"]) == f"{CHOOSE} Answer with 'yes'."
    assert instruction(answers, []) == CHOOSE
