"""``softverb compare`` on recorded outputs: the same numbers as scipy computes by hand, and what it refuses."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from scipy import stats as scipy_stats

from lm_eval_softverb.compare import pages
from lm_eval_softverb.compare.comparison import MACRO, compare
from lm_eval_softverb.compare.runs import read_run
from lm_eval_softverb.compare.stats import holm, macro_interval, paired_p, sign_flip_p
from lm_eval_softverb.errors import ArtifactError, ConfigError, DataError

STAMP = "2026-11-20T20-49-28.494689"


def write(folder, tasks, *, stamp=STAMP, config=None, better=True, drop=()):
    """A run as the harness writes it; ``tasks``: name → metric → scores by document number (None: unscored)."""
    root = folder / "some__model"
    root.mkdir(parents=True, exist_ok=True)
    results = {t: {} for t in tasks}
    up = {t: dict.fromkeys(metrics, better) for t, metrics in tasks.items()}
    value = {"results": results, "config": config or {"model": "toy"}, "higher_is_better": up}
    (root / f"results_{stamp}.json").write_text(json.dumps(value))
    for task, metrics in tasks.items():
        lines = []
        for i in range(len(next(iter(metrics.values())))):
            if (task, i) in drop:
                continue
            doc = {"text": f"{task} {i}"} | ({"task": f"inner{i % 3}"} if task.startswith("dod_") else {})
            line = {"doc_id": i, "doc": doc, "doc_hash": f"hash{task}{i}", "filter": "none", "metrics": list(metrics)}
            line |= {m: scores[i] for m, scores in metrics.items()}
            line |= {"arguments": {"gen_args_0": {"arg_0": f"in {i}"}}, "target": f"t{i}", "filtered_resps": [f"a{i}"]}
            lines.append(json.dumps(line))
        (root / f"samples_{task}_{stamp}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def mean_gap(p, q):
    return np.mean(p - q)


@pytest.fixture
def scores():
    rng = np.random.default_rng(0)
    a = {t: {"acc": rng.integers(0, 2, 40).tolist(), "rouge_l": rng.random(40).round(3).tolist()} for t in ("t1", "t2", "t3")}
    b = {t: {"acc": rng.integers(0, 2, 40).tolist(), "rouge_l": (rng.random(40) * 0.8).round(3).tolist()} for t in a}
    return a, b


@pytest.fixture
def runs(scores, tmp_path):
    return [read_run(write(tmp_path / name, s), name) for name, s in zip(("a", "b"), scores, strict=True)]


def test_every_number_by_hand(scores, runs):
    found = compare(runs)
    a, b = scores
    assert (found.baseline, found.runs, found.tasks) == ("a", ("a", "b"), ("t1", "t2", "t3"))
    raw = []
    for task in a:
        ours, theirs = np.array(b[task]["acc"], float), np.array(a[task]["acc"], float)
        cell = found.cell("b", task, "acc")
        assert cell.score.value == pytest.approx(ours.mean())
        assert cell.difference.interval.value == pytest.approx((ours - theirs).mean())
        wins, losses = int(((ours == 1) & (theirs == 0)).sum()), int(((ours == 0) & (theirs == 1)).sum())
        assert (cell.difference.wins, cell.difference.losses) == (wins, losses)
        assert cell.difference.wins + cell.difference.ties + cell.difference.losses == 40
        # McNemar's exact test is a two-sided binomial test of the discordant pairs
        expected = min(1.0, 2 * scipy_stats.binom.cdf(min(wins, losses), wins + losses, 0.5))
        assert cell.difference.p == pytest.approx(expected) and cell.difference.test == "McNemar"
        raw.append(cell.difference.p)
        boot = scipy_stats.bootstrap(
            (ours - theirs,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(1)
        )
        assert cell.difference.interval.low == pytest.approx(boot.confidence_interval.low, abs=0.03)
        assert found.cell("a", task, "acc").difference is None
    adjusted = [found.cell("b", t, "acc").difference.adjusted for t in a]
    order = np.argsort(raw)
    steps = np.maximum.accumulate([min(1, (3 - k) * raw[i]) for k, i in enumerate(order)])
    assert [adjusted[i] for i in order] == pytest.approx(list(steps))


def test_scores_between_0_and_1_get_a_permutation_test(scores, runs):
    a, b = scores
    cell = compare(runs).cell("b", "t2", "rouge_l")
    x, y = np.array(b["t2"]["rouge_l"]), np.array(a["t2"]["rouge_l"])
    peer = scipy_stats.permutation_test(
        (x, y), lambda p, q: np.mean(p - q), permutation_type="samples", n_resamples=9999, rng=2
    )
    assert cell.difference.test == "sign flip"
    assert cell.difference.p == pytest.approx(peer.pvalue, abs=0.02)


def test_the_macro_average_is_over_tasks(scores, runs):
    a, b = scores
    cell = compare(runs).cell("b", MACRO, "rouge_l")
    means = [np.mean(b[t]["rouge_l"]) for t in a]
    assert cell.score.value == pytest.approx(np.mean(means)) and cell.score.n == 3
    gaps = [np.mean(b[t]["rouge_l"]) - np.mean(a[t]["rouge_l"]) for t in a]
    assert cell.difference.interval.value == pytest.approx(np.mean(gaps))
    assert cell.difference.interval.low < np.mean(gaps) < cell.difference.interval.high
    patterns = [abs(np.dot(s, gaps)) >= abs(sum(gaps)) - 1e-12 for s in itertools.product((1, -1), repeat=3)]
    assert cell.difference.p == pytest.approx(np.mean(patterns))


def test_the_cluster_bootstrap_is_wider_than_that_of_pooled_documents():
    """Documents of one task are alike: twenty tasks of fifty documents are twenty draws, not a thousand."""
    rng = np.random.default_rng(3)
    level = rng.normal(0.5, 0.2, 20)
    tasks = {f"t{i}": list(level[i] + rng.normal(0, 0.05, 50)) for i in range(20)}
    found = macro_interval(tasks)
    se = np.std([np.mean(v) for v in tasks.values()], ddof=1) / np.sqrt(20)
    assert found.high - found.low == pytest.approx(2 * 1.96 * se, rel=0.15)
    one = macro_interval({"only": tasks["t0"]})
    assert one.high - one.low == pytest.approx(2 * 1.96 * np.std(tasks["t0"]) / np.sqrt(50), rel=0.15)


def test_statistics_against_other_implementations():
    x = np.array([0.3, -0.1, 0.2, 0.5, 0.0, -0.4, 0.6])
    exact = scipy_stats.permutation_test(
        (x, np.zeros(7)), lambda p, q: np.mean(p - q), permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flip_p(x) == pytest.approx(exact.pvalue)
    assert sign_flip_p([0.0, 0.0]) == 1.0
    assert paired_p([1, 0, 1], [1, 0, 1]) == (1.0, "McNemar")
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    many = np.random.default_rng(4).normal(0.1, 1, 200)
    assert sign_flip_p(many) == pytest.approx(scipy_stats.ttest_1samp(many, 0).pvalue, abs=0.02)


def test_lower_is_better_turns_wins_round(tmp_path):
    a, b = ({"t": {"loss": [1.0, 2.0, 3.0]}}, {"t": {"loss": [0.5, 2.0, 2.5]}})
    runs = [read_run(write(tmp_path / n, s, better=False), n) for n, s in (("a", a), ("b", b))]
    found = compare(runs).cell("b", "t", "loss").difference
    assert (found.wins, found.ties, found.losses) == (2, 1, 0) and found.interval.value < 0


def test_documents_one_run_could_not_score_are_left_out_of_all(tmp_path):
    a, b = {"t": {"acc": [1, 1, 0, 0]}}, {"t": {"acc": [None, 1, 1, 0]}}
    runs = [read_run(write(tmp_path / n, s), n) for n, s in (("a", a), ("b", b))]
    found = compare(runs)
    assert found.cell("a", "t", "acc").score.n == 3 and found.cell("a", "t", "acc").score.value == pytest.approx(1 / 3)
    assert found.cell("b", "t", "acc").unscored == 1
    assert runs[1].tasks["t"].unscored == {"hasht0/0"}


def test_tasks_of_a_dod_are_tasks_of_their_own(tmp_path):
    a, b = ({"dod_general": {"rouge_l": [x * s for x in (0.1, 0.5, 0.9, 0.2, 0.6, 1.0)]}} for s in (0.5, 1.0))
    runs = [read_run(write(tmp_path / n, s), n) for n, s in (("a", a), ("b", b))]
    found = compare(runs, baseline="b")
    assert found.tasks == ("dod_general/inner0", "dod_general/inner1", "dod_general/inner2")
    assert found.cell("a", MACRO, "rouge_l").score.value == pytest.approx(0.275)


def test_other_documents_are_refused_with_a_list(scores, tmp_path):
    a, b = scores
    one = read_run(write(tmp_path / "a", a), "a")
    two = read_run(write(tmp_path / "b", b, drop={("t1", 3), ("t1", 4)}), "b")
    with pytest.raises(DataError, match=r"t1: 2 documents only in a, 0 only in b .*number [34]"):
        compare([one, two])
    three = read_run(write(tmp_path / "c", {"t1": b["t1"], "t9": b["t2"]}), "c")
    with pytest.raises(DataError, match=r"(?s)t2: only in a.*t3: only in a.*t9: only in c"):
        compare([one, three])


def test_f40_limited_runs_are_left_out_and_noted(scores, tmp_path):
    a, b = scores
    whole = [read_run(write(tmp_path / name, s), name) for name, s in (("a", a), ("b", b))]
    part = read_run(write(tmp_path / "c", b, config={"limit": 10}), "c")
    found = compare([*whole, part])
    assert found.runs == ("a", "b") and [c for c in found.cells if c.run == "c"] == []
    assert found.notes == ("c is left out: it ran with --limit 10, the others did not.",)
    assert "c is left out" in pages.to_markdown(found) and "c is left out" in pages.to_html(found, [*whole, part])
    assert compare(whole).notes == ()
    both = [read_run(write(tmp_path / f"{name}10", s, config={"limit": 10.0}), name) for name, s in (("a", a), ("b", b))]
    assert compare(both).runs == ("a", "b") and "only the first documents" in compare(both).notes[0]
    with pytest.raises(DataError, match="Only c ran with --limit"):
        compare([*whole, part], baseline="c")
    with pytest.raises(DataError, match="1 of 2 scored whole tasks"):
        compare([whole[0], part])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"baseline": "bb"}, "Did you mean 'b'"),
        ({"metrics": ["rouge"]}, "Did you mean 'rouge_l'"),
    ],
)
def test_wrong_use(runs, arguments, message):
    with pytest.raises(ConfigError, match=message):
        compare(runs, **arguments)
    with pytest.raises(ConfigError, match="at least two runs"):
        compare(runs[:1])


def test_what_is_no_run(scores, tmp_path):
    with pytest.raises(ArtifactError, match="--output_path"):
        read_run(tmp_path)
    folder = write(tmp_path / "a", scores[0])
    for path in folder.rglob("samples_*"):
        path.unlink()
    with pytest.raises(ArtifactError, match="--log_samples"):
        read_run(folder)


def test_the_newest_run_counts(scores, tmp_path):
    a, b = scores
    write(tmp_path / "a", a)
    write(tmp_path / "a", b, stamp="2026-11-21T00-00-00.000001")
    found = read_run(tmp_path / "a", "a")
    assert list(found.tasks["t1"].scores["acc"].values()) == b["t1"]["acc"]


def test_a_document_scored_twice(scores, tmp_path):
    folder = write(tmp_path / "a", scores[0])
    [path] = folder.rglob("samples_t1_*")
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    with pytest.raises(DataError, match="scored twice"):
        read_run(folder)
