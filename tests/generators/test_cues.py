"""Label sets with cues: how they are read, and sentences written on them."""

from __future__ import annotations

import re
import sqlite3
from dataclasses import replace

import pytest
from fakes import NOUNS, Writer, draw

from lm_eval_softverb.endpoints.backends import Metered
from lm_eval_softverb.errors import ArtifactError, ConfigError, DataError
from lm_eval_softverb.generators.classification import generate, plan
from lm_eval_softverb.generators.config import ClassificationConfig
from lm_eval_softverb.generators.cues import echoes, read_cues

TEXT = """# kitchen tools
ladle: serves soup into bowls; deep bowl, long handle
whisk: thin wire loops; folds air into cream

# sounds
thunder: follows the lightning; rattles windows before rain
applause: the audience claps; hands beat together after the show
"""
CONFIG = ClassificationConfig(sets=2, labels=2, sentences=4, style="cues", per_request=1, requests=8)


@pytest.fixture
def cued(tmp_path):
    path = tmp_path / "cues.txt"
    path.write_text(TEXT)
    return read_cues(path)


class Echo(Writer):
    """Sentences with the cue's words, some of them not."""

    def text(self, request):
        cue = re.fullmatch(r"Write one sentence that describes: (.*)\.", request.messages[-1]["content"])[1]
        some = " ".join(draw(request.seed, NOUNS, 5))
        return f"Nobody in {some} believed me." if request.seed % 5 == 0 else f"Once {cue} with {some}."


def kept(path):
    with sqlite3.connect(path) as db:
        query = "SELECT keyword, sentence FROM sentences JOIN keywords ON keywords.id = keyword_id"
        return db.execute(query).fetchall(), [row[0] for row in db.execute("SELECT seed_words FROM datasets ORDER BY id")]


def test_reading(cued):
    assert [(s.topic, list(s.cues)) for s in cued] == [
        ("kitchen tools", ["ladle", "whisk"]),
        ("sounds", ["thunder", "applause"]),
    ]
    assert cued[0].cues["ladle"] == ("serves soup into bowls", "deep bowl, long handle")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no label sets"),
        ("ladle: serves soup", ":1: "),
        ("# a\nladle: \n", ":2: "),
        ("# a\ntwo words: x y\n", "expected '# topic'"),
        ("# a\nladle: soup\nladles: soup\n", "stands twice"),
        ("# a\nladle: soup\nbowl: served by the ladle\n", "names 'ladle'"),
    ],
)
def test_f26_files_that_cannot_be_used(text, message, tmp_path):
    path = tmp_path / "cues.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_cues(path)
    with pytest.raises(DataError, match="Cannot read"):
        read_cues(tmp_path)


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("He was serving soup into two bowls.", True),
        ("A bowl of soup.", True),
        ("Into the bowl it went.", False),  # "into" does not count
        ("Nobody believed me.", False),
    ],
)
def test_echoes(sentence, expected):
    assert echoes(sentence, "serves soup into bowls") == expected


def test_a_file_with_sentences_on_cues(cued, tmp_path):
    writer, out = Echo(), tmp_path / "dod.sqlite"
    counts = generate(CONFIG, Metered(writer), out, cued=cued)
    rows, topics = kept(out)
    assert counts["sets"] == 2 and topics == ["kitchen tools", "sounds"] and "label_requests" not in counts
    assert {label for label, _ in rows} == {"ladle", "whisk", "thunder", "applause"} and len(rows) == 16
    assert counts["sentence_misses_cue"] > 0 and not any("believed" in sentence for _, sentence in rows)
    for label, sentence in rows:
        own = next(s.cues[label] for s in cued if label in s.cues)
        assert any(echoes(sentence, cue) for cue in own)
    said = [cue for cue in cued[0].cues["whisk"] for label, s in rows if label == "whisk" and cue in s]
    assert set(said) == set(cued[0].cues["whisk"]), "all cues are used"


def test_more_sets_may_be_added_but_none_changed(cued, tmp_path):
    whole, out = tmp_path / "whole.sqlite", tmp_path / "part.sqlite"
    generate(CONFIG, Metered(Echo()), whole, cued=cued)
    counts = generate(CONFIG, Metered(Echo()), out, cued=cued[:1])
    assert counts["sets"] == 1, "it ends with the cues"
    generate(CONFIG, Metered(Echo()), out, cued=cued)
    assert kept(out) == kept(whole)
    with pytest.raises(ArtifactError, match="other cues"):
        generate(CONFIG, Metered(Echo()), out, cued=[replace(cued[0], topic="tools"), cued[1]])
    assert kept(out) == kept(whole)


def test_cues_and_their_style_belong_together(cued, tmp_path):
    for config, sets in ((CONFIG, ()), (replace(CONFIG, style="list"), cued)):
        with pytest.raises(ConfigError, match="cues"):
            generate(config, Metered(Echo()), tmp_path / "dod.sqlite", cued=sets)
    with pytest.raises(ConfigError, match="fewer than 3 labels"):
        generate(replace(CONFIG, labels=3), Metered(Echo()), tmp_path / "dod.sqlite", cued=cued)


def test_the_plan_counts_no_requests_for_labels(cued):
    writer = Echo()
    least, most = plan(CONFIG, writer, cued=cued)
    assert writer.calls == 0
    assert least.requests == 2 * 2 * 7 and most.requests == 2 * (14 + 5 * 16)  # 1.25 * 4 / .75 requests for each label
