"""What is read out of a model's answer, and what is refused."""

from __future__ import annotations

import pytest

from lm_eval_softverb.generators import prompts


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("trees: oak, pine, maple", ["oak", "pine", "maple"]),
        ("Oak, Pine and more, maple.", ["oak", "pine and more", "maple"]),
        ("Topic: trees: oak, pine\nI hope, this helps!", ["oak", "pine"]),
        ("", [""]),
    ],
)
def test_labels_are_parsed(text, labels):
    assert prompts.parse_labels(text) == labels


def test_labels_are_chosen_and_refusals_counted():
    found = ["oak", "oaks", "oakum", "two words", "dog", "it", "pine", "'; DROP TABLE keywords", "birch", "elm"]
    chosen, refused = prompts.choose_labels(found, 3, frozenset({prompts.stem("dogs")}))
    assert chosen == ["oak", "pine", "birch"]
    assert refused == {"label_twice": 1, "label_begins_alike": 1, "label_not_one_word": 3, "label_avoided": 1}


@pytest.mark.parametrize(
    ("sentence", "label", "found"),
    [
        ("He planted an oak.", "oak", True),
        ("The Oaks were tall.", "oak", True),
        ("She was running home.", "run", True),
        ("They hurried off.", "hurry", True),
        ("He baked bread.", "bake", True),
        ("It rained quietly.", "quiet", True),
        ("The snowstorm came.", "snow", True),
        ("Happiness is rare.", "happy", True),
        ("Cities grow.", "city", True),
        ("A knife is a tool.", "knives", True),
        ("Two wolves ran off.", "wolf", True),
        ("Lost gloves lay there.", "glove", True),
        ("Three women came in.", "woman", True),
        ("The mice were grey.", "mouse", True),
        ("They were laughing again.", "laughter", True),
        ("The car transferred it.", "transport", False),
        ("The menu was long.", "man", False),
        ("He soaked it in water.", "oak", False),
        ("The winner smiled.", "winter", False),
        ("A train left.", "rain", False),
    ],
)
def test_a_label_is_found_in_its_forms_only(sentence, label, found):
    assert prompts.mentions(sentence, label) is found


@pytest.mark.parametrize(
    ("text", "cut", "sentences", "lost"),
    [
        ("1. One is here.\n2. Two is there.", False, ["One is here.", "Two is there."], 0),
        ("- It rained. Then it stopped!\n\n* Mr. X left", True, ["It rained.", "Then it stopped!", "Mr."], 1),
        ("12) Here it is.", True, ["Here it is."], 0),
        ("", True, [], 0),
    ],
)
def test_sentences_are_split(text, cut, sentences, lost):
    assert prompts.split_sentences(text, cut) == (sentences, lost)


@pytest.mark.parametrize(
    ("sentence", "fault"),
    [
        ("The tall one grew beside the church for years.", ""),
        ("The tall one grew beside the church for years", "sentence_unfinished"),
        ("It was old and it was old and it was very old.", "sentence_repeats_itself"),
        ("However, it grew beside the church for years.", "sentence_leans_on_another"),
        ("Fact: it grew beside the church for years.", "sentence_not_plain"),
        ("Too short.", "sentence_length"),
        ("The oak grew beside the church for years.", "sentence_names_label"),
        ("It grew beside the birches for many years.", "sentence_names_other_label"),
        ("As an AI I cannot write about this tree.", "sentence_not_plain"),
        ("{{ config.items() }} grew beside the church.", "sentence_not_plain"),
        ("See https://example.org for more about this tree.", "sentence_not_plain"),
        ('He said "this is the tallest in the park.', "sentence_not_plain"),
    ],
)
def test_a_sentence_is_refused_for_a_reason(sentence, fault):
    assert prompts.sentence_fault(sentence, "oak", ["oak", "birch"], (4, 20)) == fault


@pytest.mark.parametrize(
    ("sentence", "rewritten"),
    [
        ("Lions are large cats.", "They are large cats."),
        ("The lion has a mane.", "It has a mane."),
        ("A lion can sleep all day.", "It can sleep all day."),
        ("Lion cubs are small.", "Lion cubs are small."),
        ("The lion's mane is thick.", "The lion's mane is thick."),
    ],
)
def test_only_a_subject_is_replaced(sentence, rewritten):
    assert prompts.without_subject(sentence, "lion") == rewritten
