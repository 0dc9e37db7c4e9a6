"""Examples and majority classes from the training rows of a prompt's task, by hand."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from toy_dods import PlainDod, general_bank

from lm_eval_softverb.bank import Bank
from lm_eval_softverb.data import shots
from lm_eval_softverb.data.dod import DodTask
from lm_eval_softverb.data.rows import Row, data_sha256
from lm_eval_softverb.errors import ConfigError, DataError
from lm_eval_softverb.metrics.dod import open_with


def row(number: int, label: str) -> Row:
    return Row(f"Sentence: s{number} Label:", label)


ROWS = [*(row(i, "red") for i in range(6)), *(row(10 + i, "blue") for i in range(3)), row(20, "green")]
HELD = (row(30, "red"), row(31, "blue"))


@pytest.mark.parametrize(
    ("k", "counts"),
    [(1, [1]), (2, [1, 1]), (3, [1, 1, 1]), (4, [2, 1, 1]), (5, [2, 2, 1]), (7, [3, 3, 1]), (10, [6, 3, 1])],
)
def test_labels_are_as_varied_as_k_allows(k, counts):
    for seed in range(20):
        drawn = shots.draw(ROWS, k, seed, "p")
        assert sorted(Counter(r.output for r in drawn).values(), reverse=True) == counts
        assert len(set(drawn)) == k and set(drawn) <= set(ROWS)


def test_the_draw_depends_on_seed_and_name_only():
    first = shots.draw(ROWS, 5, 0, "p")
    assert shots.draw(list(ROWS), 5, 0, "p") == first
    assert len({tuple(shots.draw(ROWS, 5, seed, name)) for seed in (0, 1) for name in ("p", "q")}) == 4
    orders = [[r.output for r in shots.draw(ROWS, 3, seed, "p")] for seed in range(30)]
    assert len(set(map(tuple, orders))) == 6  # no label always comes first


def test_no_input_comes_twice():
    twice = [Row("Input: a\nOutput:", "x"), Row("Input: a\nOutput:", "y"), Row("Input: b\nOutput:", "z")]
    for seed in range(10):
        assert sorted(r.input[7] for r in shots.draw(twice, 2, seed, "p")) == ["a", "b"]
    with pytest.raises(DataError, match="p has 2 training rows of different inputs, too few for 3"):
        shots.draw(twice, 3, 0, "p")
    with pytest.raises(ConfigError, match="is 0, expected at least 1"):
        shots.draw(twice, 0, 0, "p")


def test_the_document_goes_on_like_one_more_example():
    general = [Row("Input: two\nlines\nOutput:", "a\nb"), Row("Input: c\nOutput:", "d")]
    assert shots.as_text(general) + shots.BREAK + "Input: e\nOutput:" == (
        "Input: two\nlines\nOutput: a\nb\n\nInput: c\nOutput: d\n\nInput: e\nOutput:"
    )
    assert shots.as_text([row(1, "red"), row(2, "blue")]) == "Sentence: s1 Label: red\n\nSentence: s2 Label: blue"


def test_the_same_text_as_the_harness_writes_few_shot_examples(evaluate):
    from lm_eval.api.model import LM

    class Listening(LM):
        seen: str

        def generate_until(self, requests, disable_tqdm=False):
            self.seen = requests[0].args[0]
            return ["x"] * len(requests)

        loglikelihood = loglikelihood_rolling = None

    lm = Listening()
    docs = [{"input": f"Sentence: {word} Label:", "target": word} for word in ("a", "b", "c")]
    task = {"task": "t", "output_type": "generate_until", "doc_to_text": "input", "doc_to_target": "target", "rows": docs}
    evaluate(lm, [task | {"metric_list": [{"metric": "exact_match"}]}], num_fewshot=2)
    parts = lm.seen.split(shots.BREAK)
    given = [Row(p.rpartition(" ")[0], p.rpartition(" ")[2]) for p in parts[:-1]]
    assert len(given) == 2 and shots.as_text(given) + shots.BREAK + parts[-1] == lm.seen


def test_majority():
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    assert shots.majority(shuffled) == "red"
    assert shots.majority([row(0, "b"), row(1, "a"), row(2, "a"), row(3, "b")]) == "b"


def test_rows_are_those_of_training(tmp_path):
    task = DodTask("t", "test", tuple(ROWS), HELD, ("red", "blue", "green"))
    entry = {"prompt_id": "p", "task": "t", "dod": {"kind": "classification", "source": "x"}}

    def read(**changes):
        return shots.training_rows(Bank((), ({**entry, **changes},), "bank"), None, lambda *_: PlainDod([task]))

    assert read() == read(heldout_sha256=data_sha256(HELD)) == {"p": tuple(ROWS)}
    with pytest.raises(DataError, match="not those of the prompt's training"):
        read(heldout_sha256="0" * 64)
    with pytest.raises(DataError, match="bank: 'p': 'dod' is None"):
        read(dod=None)
    with pytest.raises(DataError, match="'task' is None"):
        read(task=None)
    with pytest.raises(DataError, match=r"expected kind .* dod=…"):
        read(dod={"kind": "poems"})
    empty = DodTask("t", "test", (), HELD)
    with pytest.raises(DataError, match="no rows to train on"):
        shots.training_rows(Bank((), (entry,), "bank"), None, lambda *_: PlainDod([empty]))


def test_a_bank_whose_dod_has_moved(tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTVERB_CACHE", str(tmp_path / "cache"))
    folder, dod = general_bank(tmp_path)
    from lm_eval_softverb.storage import read_jsonl

    bank = Bank((), tuple(entry for _, entry in read_jsonl(folder / "manifest.jsonl")), str(folder))
    wanted = {f"p-{name}": dod.task(name).train for name in dod.names()}
    assert shots.training_rows(bank, None, open_with) == wanted
    held = {f"p-{name}": {r.input for r in dod.task(name).heldout} for name in dod.names()}
    (tmp_path / "ni").rename(tmp_path / "moved")
    assert shots.training_rows(bank, f"general:{tmp_path / 'moved'}", open_with) == wanted
    for name, rows in wanted.items():
        assert not held[name] & {r.input for r in shots.draw(rows, 3, 0, name)}
