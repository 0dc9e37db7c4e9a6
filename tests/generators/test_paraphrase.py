"""Paraphrase augmentation: training tasks only, condensed, different, resumable."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
from fakes import Writer, draw

from lm_eval_softverb.data.dod import DodTask
from lm_eval_softverb.endpoints.backends import Metered, Reply
from lm_eval_softverb.errors import ArtifactError, BudgetExceeded, ConfigError, DataError
from lm_eval_softverb.generators import paraphrase as module
from lm_eval_softverb.generators.paraphrase import ParaphraseConfig, paraphrase, plan, read_paraphrases

TEN = ParaphraseConfig(copies=10)


@dataclass
class Tasks:
    """Four training tasks and two test tasks that must not be read."""

    kind: str = "general"
    sha256: str = "x"
    lie: bool = False

    def names(self, split=None):
        both = {"train": [f"task{i}" for i in range(4)], "test": ["secret4", "secret5"]}
        return both[split] if split else both["train"] + both["test"]

    def task(self, name):
        assert name.startswith("task"), "a test task was read"
        text = f"Definition of {name}: answer yes or no to the question that you are given in the input."
        return DodTask(name, "test" if self.lie else "train", (), (), instruction=text)


class Rewriter(Writer):
    def text(self, request):
        parts = ["briefly", "say", "yes", "or", "no", "to", "a", "question", "whenever", "asked", "and", "nothing", "else"]
        return " ".join(draw(request.seed, parts, 8))


@pytest.mark.parametrize("copies", [1, 10])
def test_copies_are_paraphrases_and_differ(copies, tmp_path):
    out, writer = tmp_path / "p.jsonl", Rewriter()
    counts = paraphrase(Tasks(), ParaphraseConfig(copies=copies), Metered(writer), out)
    found = read_paraphrases(out)
    assert list(found) == Tasks().names("train")
    for name, texts in found.items():
        assert len(texts) == len(set(texts)) == copies
        assert Tasks().task(name).instruction not in texts
    assert counts["kept"] == 4 * copies and counts["missing"] == 0
    asked = [r.messages[-1]["content"] for r in writer.asked]
    assert all("Definition of task" in q for q in asked) and not any("secret" in q for q in asked)
    assert all(r.max_tokens == 300 for r in writer.asked)
    assert len({q.replace("task1", "") for q in asked}) >= min(copies, 10)


def test_some_tasks_first_and_the_others_later(tmp_path):
    out, first, second = tmp_path / "p.jsonl", Rewriter(), Rewriter()
    paraphrase(Tasks(), ParaphraseConfig(), Metered(first), out, only={"task2", "task0"})
    assert list(read_paraphrases(out)) == ["task0", "task2"]
    least, _ = plan(ParaphraseConfig(), Tasks(), Rewriter(), only={"task2"})
    assert least.requests == 1
    counts = paraphrase(Tasks(), ParaphraseConfig(), Metered(second), out)
    assert sorted(read_paraphrases(out)) == Tasks().names("train") and counts["kept"] == 4
    asked = [r.messages[-1]["content"] for r in second.asked]
    assert len(asked) == 2 and not any("task0" in q or "task2" in q for q in asked)
    paraphrase(Tasks(), ParaphraseConfig(), Metered(third := Rewriter()), out, only={"task3"})
    assert not third.asked
    for wrong, message in ({"task1", "secret4"}, "1 of 2 tasks .* 'secret4'"), (set(), "no tasks"):
        with pytest.raises(DataError, match=message):
            paraphrase(Tasks(), ParaphraseConfig(), Metered(Rewriter()), tmp_path / "q.jsonl", only=wrong)


def test_a_changed_definition_is_another_run_also_where_it_is_not_asked_for(tmp_path):
    out = tmp_path / "p.jsonl"
    paraphrase(Tasks(), ParaphraseConfig(), Metered(Rewriter()), out, only={"task0"})
    line = json.loads(out.read_text())
    for change in {"source_sha256": "0" * 64}, {"task": "secret4"}:
        out.write_text(json.dumps(line | change) + "\n")
        with pytest.raises(ArtifactError, match="another run"):
            paraphrase(Tasks(), ParaphraseConfig(), Metered(Rewriter()), out, only={"task3"})


class Stubborn(Rewriter):
    """Repeats the definition, writes too long, gets cut, is filtered, says nothing: by turns."""

    def reply(self, request):
        definition = request.messages[-1]["content"].rpartition("\n")[2]
        faults = [
            Reply(definition.upper()),
            Reply("word " * 60),
            Reply("half a sent", finish="length"),
            Reply(None, "content_filter"),
            Reply("?!"),
        ]
        self.turn = getattr(self, "turn", -1) + 1
        return faults[self.turn % 5]


def test_refusals_are_counted_and_nothing_bad_is_kept(tmp_path):
    counts = paraphrase(Tasks(), replace(TEN, attempts=1), Metered(Stubborn()), tmp_path / "p.jsonl")
    reasons = ("twice_or_unchanged", "not_condensed", "too_many_tokens", "reply_content_filter", "no_words")
    assert {reason: counts[reason] for reason in reasons} == dict.fromkeys(reasons, 8)
    assert counts["kept"] == 0 and counts["missing"] == 40 == counts["asked"]
    assert set(map(len, read_paraphrases(tmp_path / "p.jsonl").values())) == {0}


@pytest.mark.parametrize("torn", [b"", b'{"task": "task2", "para'])
def test_f03_a_killed_run_goes_on_and_ends_the_same(torn, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TOGETHER", 10)
    paraphrase(Tasks(), TEN, Metered(Rewriter()), tmp_path / "whole.jsonl")
    out = tmp_path / "part.jsonl"
    with pytest.raises(KeyboardInterrupt):
        paraphrase(Tasks(), TEN, Metered(Rewriter(fail_at=3)), out)
    done = len(out.read_bytes().splitlines())
    assert 1 <= done < 4
    with out.open("ab") as f:
        f.write(torn)
    writer = Rewriter()
    counts = paraphrase(Tasks(), TEN, Metered(writer), out)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert counts["kept"] == 40
    assert not any("task0" in r.messages[-1]["content"] for r in writer.asked)


@pytest.mark.parametrize(("copies", "calls"), [(1, 2), (2, 4), (10, 4)])
def test_tasks_are_asked_about_together_and_end_the_same(copies, calls, tmp_path, monkeypatch):
    settings = ParaphraseConfig(copies=copies)
    paraphrase(Tasks(), settings, Metered(Rewriter()), tmp_path / "all.jsonl")
    monkeypatch.setattr(module, "TOGETHER", 3)
    paraphrase(Tasks(), settings, Metered(writer := Rewriter()), tmp_path / "some.jsonl")
    assert writer.calls == calls
    assert (tmp_path / "some.jsonl").read_bytes() == (tmp_path / "all.jsonl").read_bytes()


def test_what_an_interrupted_call_left_whole_is_kept(tmp_path):
    """The second round of requests fails; of the four tasks one needed none."""

    class Late(Rewriter):
        def text(self, request):
            if self.calls == 1 and "task2" not in request.messages[-1]["content"]:
                return ""
            return super().text(request)

    out = tmp_path / "p.jsonl"
    with pytest.raises(KeyboardInterrupt):
        paraphrase(Tasks(), ParaphraseConfig(), Metered(Late(fail_at=2)), out)
    assert list(read_paraphrases(out)) == ["task2"]


def test_another_run_is_refused(tmp_path):
    out = tmp_path / "p.jsonl"
    paraphrase(Tasks(), TEN, Metered(Rewriter()), out)
    with pytest.raises(ArtifactError, match=r"p\.jsonl:1"):
        paraphrase(Tasks(), replace(TEN, seed=1), Metered(Rewriter()), out)


def test_a_dod_that_lists_test_tasks_for_training_or_has_no_definitions_is_refused(tmp_path):
    with pytest.raises(DataError, match="split 'test'"):
        paraphrase(Tasks(lie=True), TEN, Metered(Rewriter()), tmp_path / "p.jsonl")
    from lm_eval_softverb.data.dod.classification import ClassificationDod

    with pytest.raises(DataError, match="no definition"):
        paraphrase(ClassificationDod.from_labelsets(), TEN, Metered(Rewriter()), tmp_path / "p.jsonl")


def test_f23_plan_and_budget(tmp_path):
    writer = Rewriter()
    least, most = plan(TEN, Tasks(), writer)
    assert writer.calls == 0 and (least.requests, most.requests) == (40, 120)
    assert least.completion_tokens == 40 * 300
    out, limit = tmp_path / "p.jsonl", least.prompt_tokens // 2 + 300 * 10
    meter = Metered(writer, max_tokens=limit)
    with pytest.raises(BudgetExceeded):
        paraphrase(Tasks(), TEN, meter, out)
    assert meter.usage.prompt_tokens + meter.usage.completion_tokens <= limit
    done = len(read_paraphrases(out))
    assert 1 <= done < 4
    again = Metered(Rewriter(), max_tokens=limit)
    with pytest.raises(BudgetExceeded):  # what the first run spent is remembered
        paraphrase(Tasks(), TEN, again, out)
    assert again.usage.prompt_tokens + again.usage.completion_tokens <= limit and len(read_paraphrases(out)) == done


def test_files_that_cannot_be_used(tmp_path):
    out = tmp_path / "p.jsonl"
    for lines in ([{"task": "a", "paraphrases": "b"}], [{"task": "a", "paraphrases": ["b"]}] * 2):
        out.write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(DataError, match=rf"p\.jsonl:{len(lines)}"):
            read_paraphrases(out)
    with pytest.raises(ConfigError):
        ParaphraseConfig(copies=0)
