"""F24 one cache for two prompts or models, F25 a damaged, foreign or old cache file."""

from __future__ import annotations

import io
import os
import pickle  # noqa: TID251  (the attack itself)
import sqlite3
from pathlib import Path

import pytest
from toys import CHOICE_TASK, GENERATE_TASK, assert_same_scores, logged, loglikelihood

from lm_eval_softverb.models.ledger import Ledger

TASKS = [CHOICE_TASK, GENERATE_TASK]


def answers(results):
    return [logged(results, t["task"]) for t in TASKS], results["results"]


# --- F24 -------------------------------------------------------------------------------------------------------------


def test_f24_two_prompts_and_two_models_on_one_cache_equal_clean_runs(ours, tiny, random_prompt, evaluate, tmp_path):
    from lm_eval_softverb.models.softprompt import SoftPromptLM

    a, b = random_prompt(1), random_prompt(2)
    runs = [(0, a), (0, b), (7, a), (0, None)]

    def model(seed, prompt):
        return SoftPromptLM(pretrained=tiny("llama", seed=seed), peft=prompt, batch_size=4)

    clean = [answers(evaluate(model(*run), TASKS)) for run in runs]
    assert all(x != y for i, x in enumerate(clean) for y in clean[:i])
    for expected, run in zip(clean, runs, strict=True):
        results = evaluate(model(*run), TASKS, use_cache=str(tmp_path / "cache"))
        assert results["config"]["softprompt"]["n_from_cache"] == 0
        assert answers(results) == expected


def test_f24_positive_control_the_same_prompt_is_served(ours, random_prompt, evaluate, tmp_path):
    prompt = random_prompt(1)
    first = evaluate(ours("llama", peft=prompt, batch_size=4), TASKS, use_cache=str(tmp_path / "cache"))
    copy = random_prompt(1)  # the same rows in another folder
    assert copy != prompt
    second = evaluate(ours("llama", peft=copy, batch_size=16), TASKS, use_cache=str(tmp_path / "cache"))
    assert second["config"]["softprompt"]["n_from_cache"] == 24
    assert answers(second) == answers(first)


# --- F25 -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def full(ours, pairs, tmp_path):
    """A ledger with answers in its main file, and what they are."""
    lm = ours("llama", batch_size=4)
    lm.ledger = Ledger(tmp_path / "a.db")
    expected = loglikelihood(lm, pairs)
    lm.ledger.close()
    return tmp_path / "a.db", expected


def overwrite(path, start, data):
    with path.open("r+b") as f:
        f.seek(start)
        f.write(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p.write_bytes(b"not a database at all" * 500),
        lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
        lambda p: p.write_bytes(p.read_bytes()[:-4000]),
        lambda p: overwrite(p, 0, os.urandom(100)),
        lambda p: overwrite(p, 4096 * 2, os.urandom(4096)),
        lambda p: p.write_text('{"key": "value"}\n' * 300),
    ],
    ids=["text", "half", "torn-end", "header", "page", "jsonl"],
)
def test_f25_a_damaged_file_is_set_aside_and_counted(full, damage, ours, pairs):
    path, expected = full
    damage(path)
    lm = ours("llama", batch_size=4)
    lm.ledger = Ledger(path)
    assert_same_scores(loglikelihood(lm, pairs), expected)
    info = lm.get_model_info()["softprompt"]
    assert info["cache_quarantined"].startswith("a.db.corrupt-")
    assert info["n_from_cache"] == 0
    assert (path.parent / info["cache_quarantined"]).exists()
    lm.ledger.close()

    again = ours("llama", batch_size=4)
    again.ledger = Ledger(path)
    assert_same_scores(loglikelihood(again, pairs), expected)
    assert again.get_model_info()["softprompt"]["cache_quarantined"] is None
    assert again.counters.from_cache == len(pairs)


def test_f25_positive_control_a_whole_file_is_used(full, ours, pairs):
    path, expected = full
    lm = ours("llama", batch_size=4)
    lm.ledger = Ledger(path)
    assert loglikelihood(lm, pairs) == expected
    assert (lm.ledger.quarantined, lm.counters.from_cache) == (None, len(pairs))


@pytest.mark.parametrize(
    "columns", ["key TEXT", "key TEXT, answer TEXT, old TEXT", "answer TEXT, key TEXT", "hash TEXT, value BLOB"]
)
def test_f25_an_old_schema_is_set_aside(tmp_path, columns):
    with sqlite3.connect(tmp_path / "a.db") as db:
        db.execute(f"CREATE TABLE softverb_answers_v1 ({columns})")
    db.close()
    ledger = Ledger(tmp_path / "a.db")
    assert ledger.quarantined
    ledger.put("x", 1)
    assert ledger.get("x") == 1


class Exploit:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def harness_cache(path, rows):
    """A file as the harness's own cache writes it: pickles in a table called unnamed."""
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE unnamed (key TEXT PRIMARY KEY, value BLOB)")
        db.executemany("INSERT INTO unnamed VALUES (?, ?)", [(k, pickle.dumps(v)) for k, v in rows])
    db.close()


def test_f25_pickles_of_the_harness_are_never_opened(ours, evaluate, tmp_path):
    """The harness would find this answer under the request's text, and unpickle it."""
    from lm_eval.api.model import hash_args

    canary, path = tmp_path / "canary", tmp_path / "cache_rank0.db"
    clean = evaluate(ours("llama", batch_size=4), [CHOICE_TASK])
    keys = [
        hash_args("loglikelihood", tuple(arguments))
        for sample in clean["samples"]["toy_mc"]
        for arguments in sample["arguments"]
    ]
    harness_cache(path, [(key, Exploit(canary)) for key in keys])
    results = evaluate(ours("llama", batch_size=4), [CHOICE_TASK], use_cache=str(tmp_path / "cache"))
    assert not canary.exists()
    assert logged(results, "toy_mc") == logged(clean, "toy_mc")
    assert results["config"]["softprompt"]["cache_quarantined"] is None  # a foreign table is left in peace
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT COUNT(*) FROM unnamed").fetchone() == (len(keys),)


def test_f25_positive_control_the_stock_model_opens_them(stock, evaluate, tmp_path):
    from lm_eval.api.model import hash_args

    canary, path = tmp_path / "canary", tmp_path / "cache_rank0.db"
    clean = evaluate(stock("llama"), [CHOICE_TASK])
    first = clean["samples"]["toy_mc"][0]["arguments"][0]
    harness_cache(path, [(hash_args("loglikelihood", tuple(first)), Exploit(canary))])
    with pytest.raises((AssertionError, TypeError, ValueError)):
        evaluate(stock("llama"), [CHOICE_TASK], use_cache=str(tmp_path / "cache"))
    assert canary.is_dir()


def test_f25_pickles_in_our_own_table_are_not_opened(ours, pairs, full, tmp_path):
    path, expected = full
    canary = tmp_path / "canary"
    buffer = io.BytesIO()
    pickle.dump(Exploit(canary), buffer)
    with sqlite3.connect(path) as db:
        db.execute("UPDATE softverb_answers_v1 SET answer = ?", (buffer.getvalue(),))
    db.close()
    lm = ours("llama", batch_size=4)
    lm.ledger = Ledger(Path(path))
    assert_same_scores(loglikelihood(lm, pairs), expected)
    assert not canary.exists()
    assert lm.ledger.unreadable == len(pairs)
