"""The classification generator: what it keeps, what it refuses, that it goes on where it was, that it stays in budget."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from fakes import NOUNS, Writer
from toys import ROOT

from lm_eval_softverb.data.dod.classification import ClassificationDod, Reading
from lm_eval_softverb.endpoints.backends import Metered, Price, Reply, read_price
from lm_eval_softverb.errors import ArtifactError, BackendError, BudgetExceeded, ConfigError, DataError, OutputError
from lm_eval_softverb.generators import prompts
from lm_eval_softverb.generators.classification import generate, plan
from lm_eval_softverb.generators.config import ClassificationConfig, evaluation_labels, read_words
from lm_eval_softverb.generators.store import open_store

SMALL = ClassificationConfig(sets=4, sentences=12, per_request=10)


def tables(path):
    with sqlite3.connect(path) as db:
        return {t: db.execute(f"SELECT * FROM {t} ORDER BY id").fetchall() for t in ("datasets", "keywords", "sentences")}


def meta(path, key):
    with sqlite3.connect(path) as db:
        return json.loads(db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()[0])


def test_a_file_with_what_was_asked_for(tmp_path):
    out = tmp_path / "dod.sqlite"
    counts = generate(SMALL, Metered(Writer()), out)
    found = tables(out)
    assert [len(found[t]) for t in ("datasets", "keywords", "sentences")] == [4, 20, 240]
    assert counts["sets"] == 4 and counts["kept"] == 240 == meta(out, "counts")["kept"]
    label_of = {row[0]: row[2] for row in found["keywords"]}
    assert set(label_of.values()) <= set(NOUNS)
    assert not any(prompts.mentions(text, label_of[keyword]) for _, keyword, text in found["sentences"])
    texts = [prompts.normalised(row[2]) for row in found["sentences"]]
    assert len(set(texts)) == len(texts)
    assert meta(out, "usage")["requests"] == counts["label_requests"] + counts["sentence_requests"]
    dod = ClassificationDod.open(out, Reading(heldout=2))
    assert len(dod.names()) == 4 and len(dod.task(dod.names()[0]).labels) == 5


def test_words_and_streams_depend_on_seed_and_number_only(tmp_path):
    generate(SMALL, Metered(Writer()), tmp_path / "a.sqlite")
    generate(replace(SMALL, sets=2), Metered(Writer()), tmp_path / "b.sqlite")
    generate(replace(SMALL, sets=2, seed=1), Metered(Writer()), tmp_path / "c.sqlite")
    a, b, c = (tables(tmp_path / f"{x}.sqlite") for x in "abc")
    assert a["datasets"][:2] == b["datasets"] != c["datasets"]
    assert a["sentences"][: len(b["sentences"])] == b["sentences"]


@pytest.mark.parametrize("call", range(1, 9))
def test_f03_interrupted_anywhere_and_run_again_gives_the_same_tables(call, tmp_path):
    generate(SMALL, Metered(Writer()), tmp_path / "whole.sqlite")
    out = tmp_path / "part.sqlite"
    with pytest.raises(KeyboardInterrupt):
        generate(SMALL, Metered(Writer(fail_at=call)), out)
    generate(SMALL, Metered(Writer()), out)
    assert tables(out) == tables(tmp_path / "whole.sqlite")
    assert meta(out, "counts") == meta(tmp_path / "whole.sqlite", "counts")


CHILD = """
import sys, time
sys.path.insert(0, "tests/generators")
from fakes import Writer
from pathlib import Path
from lm_eval_softverb.endpoints.backends import Metered
from lm_eval_softverb.generators.classification import generate
from lm_eval_softverb.generators.config import ClassificationConfig
class Slow(Writer):
    def complete(self, requests):
        time.sleep(0.1)
        return super().complete(requests)
generate(ClassificationConfig(sets=12, sentences=12), Metered(Slow()), Path(sys.argv[1]))
"""


def test_f03_f06_kill_9_and_run_again(tmp_path):
    out, config = tmp_path / "killed.sqlite", replace(SMALL, sets=12)
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(out)], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while not (out.exists() and sets_in(out) >= 3):
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(OutputError, match="Another process"):  # F06: while the first one writes
            generate(config, Metered(Writer()), out)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert 3 <= sets_in(out) < 12
    before = tables(out)
    generate(config, Metered(Writer()), out)
    generate(config, Metered(Writer()), tmp_path / "whole.sqlite")
    assert tables(out) == tables(tmp_path / "whole.sqlite")
    assert tables(out)["datasets"][: len(before["datasets"])] == before["datasets"]


def sets_in(path):
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as db:
            return db.execute("SELECT count(*) FROM datasets").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


def test_another_config_is_refused_and_the_file_left_alone(tmp_path):
    out = tmp_path / "dod.sqlite"
    generate(SMALL, Metered(Writer()), out)
    before = out.read_bytes()
    for config, writer in ((replace(SMALL, temperature=0.5), Writer()), (SMALL, Writer("other"))):
        with pytest.raises(ArtifactError, match="other settings"):
            generate(config, Metered(writer), out)
    assert out.read_bytes() == before
    (tmp_path / "text.sqlite").write_text("no database, but some text that is long enough to be looked at")
    with pytest.raises(ArtifactError, match="not a file of"):
        generate(SMALL, Metered(Writer()), tmp_path / "text.sqlite")
    generate(replace(SMALL, sets=5), Metered(Writer()), out)  # more of the same is no other config
    assert sets_in(out) == 5


def same_labels(answers):
    """A function for ``Writer.labels`` that repeats ``answers``."""
    waiting = iter(answers)
    return lambda _request: "things: " + ", ".join(next(waiting).split())


def test_label_sets_that_were_there_or_nearly_are_refused(tmp_path):
    answers = ["anvil basin cactus dagger eraser", "eraser dagger cactus basin anvils", "anvil basin cactus dagger falcon"]
    answers += ["anvil basin cactus gravel falcon", "gravel hinge igloo jigsaw"]
    answers += ["gravel hinge igloo jigsaw kernel"]
    counts = generate(replace(SMALL, sets=3), Metered(Writer(labels=same_labels(answers))), tmp_path / "dod.sqlite")
    assert counts["set_twice"] == 1 and counts["set_nearly_twice"] == 1 and counts["set_too_few_labels"] == 1
    assert counts["sets"] == 3


def test_labels_of_evaluations_are_avoided_unless_told_otherwise(tmp_path):
    answer = "positive kitchen doctors anvil basin cactus dagger eraser"
    assert prompts.stem("positive") in evaluation_labels()
    for avoid, expected in ((True, "anvil basin cactus dagger eraser"), (False, "positive kitchen doctors anvil basin")):
        out = tmp_path / f"{avoid}.sqlite"
        config = replace(SMALL, sets=1, avoid=avoid)
        counts = generate(config, Metered(Writer(labels=same_labels([answer]))), out)
        assert [row[2] for row in tables(out)["keywords"]] == expected.split()
        assert counts.get("label_avoided", 0) == (3 if avoid else 0)


class Bad(Writer):
    """Every second sentence is the same; no reply at all for every third request."""

    def reply(self, request):
        if request.seed % 3 == 0 and "Words" not in request.messages[-1]["content"]:
            return Reply(None, "content_filter")
        return super().reply(request)

    def text(self, request):
        text = super().text(request)
        return text if text.startswith("things") else text + "\n11. We saw the same thing here again and again."


def test_refusals_are_counted_by_reason(tmp_path):
    counts = generate(SMALL, Metered(Bad()), tmp_path / "dod.sqlite")
    assert counts["reply_content_filter"] > 0
    assert counts["sentence_twice"] > 10
    usage = meta(tmp_path / "dod.sqlite", "usage")
    assert usage["refused"] == {"content_filter": counts["reply_content_filter"]}
    read = counts["sentences_read"]
    unused = sum(n for reason, n in counts.items() if reason.startswith("sentence_") and reason != "sentence_requests")
    assert read == counts["kept"] + unused


def test_a_model_that_writes_nothing_usable_ends_the_run(tmp_path):
    meter = Metered(Writer(labels=lambda _request: "no idea"))
    with pytest.raises(BackendError, match="3 label sets in a row"):
        generate(replace(SMALL, give_up=3), meter, tmp_path / "dod.sqlite")
    with pytest.raises(DataError, match="no label sets"):
        ClassificationDod.open(tmp_path / "dod.sqlite")


def test_sentences_of_a_label_that_differ_in_a_word_or_two_are_refused():
    same = "My north cousin carried it near the east harbor at noon."
    assert prompts.nearly_same(same, same.replace("noon", "night"))
    assert not prompts.nearly_same(same, "My south aunt sold it near the west harbor last summer.")


class LikesShort:
    """A judge that keeps sentences by their length, and knows no word with a j."""

    def knows(self, label):
        return "j" not in label

    def identity(self):
        return {"judge": "length"}

    def start(self, labels):
        return lambda candidates: {label: [len(s) % 2 == 0 for s in found] for label, found in candidates.items()}


def test_the_filter_decides_and_is_counted(tmp_path):
    counts = generate(replace(SMALL, sets=12), Metered(Writer()), tmp_path / "dod.sqlite", judge=LikesShort())
    assert counts["sentence_fits_another_label"] > 0
    found = tables(tmp_path / "dod.sqlite")
    assert all(len(row[2]) % 2 == 0 for row in found["sentences"])
    assert counts["label_not_known"] > 0 and not any("j" in row[2] for row in found["keywords"])


# --- plan and budget -------------------------------------------------------------------------------------------------


def test_f23_the_plan_sends_nothing_and_bounds_what_is_spent(tmp_path):
    writer, price = Writer(), Price(1.0, 10.0)
    least, most = plan(SMALL, writer, price)
    assert writer.calls == 0
    meter = Metered(writer, price)
    generate(SMALL, meter, tmp_path / "dod.sqlite")
    assert least.requests <= meter.usage.requests <= most.requests
    assert meter.usage.dollars <= most.dollars
    assert least.dollars == pytest.approx((least.prompt_tokens + 10 * least.completion_tokens) / 1e6)
    assert "requests" in str(most)


def test_f23_a_budget_stops_before_it_is_passed_and_more_money_goes_on(tmp_path):
    out, price = tmp_path / "dod.sqlite", Price(0.0, 1000.0)
    many = replace(SMALL, sets=12)
    free = Metered(Writer(), price)
    generate(many, free, tmp_path / "whole.sqlite")
    limit = free.usage.dollars / 2 + price.of(0, 320 * 10)  # the worst case of one call more than half
    meter = Metered(Writer(), price, max_dollars=limit)
    with pytest.raises(BudgetExceeded, match="raise the limit"):
        generate(many, meter, out)
    assert 0 < meter.usage.dollars <= limit
    assert meta(out, "usage")["dollars"] == meter.usage.dollars
    with pytest.raises(BudgetExceeded):  # what was spent is remembered
        generate(many, again := Metered(Writer(), price, max_dollars=limit), out)
    assert again.usage.dollars <= limit
    generate(many, Metered(Writer(), price), out)
    assert tables(out) == tables(tmp_path / "whole.sqlite")


def test_f23_tokens_are_a_budget_too(tmp_path):
    meter = Metered(Writer(), max_tokens=10)
    with pytest.raises(BudgetExceeded, match="tokens"):
        generate(SMALL, meter, tmp_path / "dod.sqlite")
    assert meter.usage.requests == 0


def test_prices(tmp_path):
    path = tmp_path / "prices.json"
    path.write_text(json.dumps({"big": {"in": 2, "out": 8.5}, "odd": {"in": "2"}}))
    assert read_price(path, "big").of(1_000_000, 2_000_000) == 19.0
    for model in ("bug", "odd"):
        with pytest.raises(ConfigError, match="price"):
            read_price(path, model)


# --- settings and words ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", [{"labels": 1}, {"sentences": 0}, {"variant": "loose"}, {"temperature": -1}, {"min_words": 40}, {"top_p": 0}]
)
def test_settings_out_of_range(change):
    with pytest.raises(ConfigError):
        replace(SMALL, **change)


def test_words(tmp_path):
    own = read_words()
    assert len(own) >= 600 and len(set(own)) == len(own) and all(len(w) > 3 for w in own)
    (tmp_path / "w.txt").write_text("\n".join(NOUNS[:12]))
    assert read_words(tmp_path / "w.txt") == tuple(NOUNS[:12])
    (tmp_path / "bad.txt").write_text("anvil\ntwo words\n")
    with pytest.raises(DataError, match=r"bad\.txt:2"):
        read_words(tmp_path / "bad.txt")


def test_the_variants_ask_differently():
    tight, loose = (prompts.label_request(v, NOUNS[:3], 5, temperature=1, top_p=1, seed=0) for v in ("tight", "preliminary"))
    assert "kind" in tight.messages[-1]["content"] and "kind" not in loose.messages[-1]["content"]
    assert all(word in tight.messages[-1]["content"] for word in NOUNS[:3])


def test_hostile_text_stays_text(tmp_path):
    with open_store(tmp_path / "s.sqlite", {}) as store:
        evil = "'); DROP TABLE sentences; --"
        store.add(0, [evil], {evil: [evil], "b": [evil]}, next=1)
    assert [row[2] for row in tables(tmp_path / "s.sqlite")["sentences"]] == [evil, evil]
