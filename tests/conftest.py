"""Fixtures: tiny models saved once per test run; nothing here needs a network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import hashlib
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from toys import TINY, save_tiny

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """``tiny(name, **changes)`` → folder of a tiny model, built on first use."""
    root = tmp_path_factory.mktemp("tiny")

    def folder(name: str, **changes) -> str:
        variant = replace(TINY[name], **changes)
        tag = "".join(f"-{k}{abs(hash(v)) % 10**8}" for k, v in changes.items())
        return save_tiny(variant, root / (name + tag))

    return folder


@pytest.fixture(scope="session")
def stock(tiny):
    """``stock(name, batch_size=…)`` → the harness's own HFLM on a tiny model, one per name and batch size."""
    from lm_eval.models.huggingface import HFLM

    kept = {}

    def build(name: str, batch_size: int = 1, **kwargs):
        key = (name, batch_size, *sorted(kwargs.items()))
        if key not in kept:
            kept[key] = HFLM(pretrained=tiny(name), device="cpu", batch_size=batch_size, **kwargs)
        return kept[key]

    return build


@pytest.fixture(scope="session")
def ours(tiny):
    """``ours(name, …)`` → our model class on a tiny model, always a fresh object."""
    from lm_eval_softverb.models.softprompt import SoftPromptLM

    def build(name: str, **kwargs):
        return SoftPromptLM(pretrained=tiny(name), **kwargs)

    return build


@pytest.fixture(scope="session")
def backbone(tiny):
    """``backbone(name)`` → a loaded Backbone, shared: do not change its weights."""
    from lm_eval_softverb.backbone import Backbone

    kept = {}

    def build(name: str):
        if name not in kept:
            kept[name] = Backbone.load(tiny(name), dtype="float32", device="cpu")
        return kept[name]

    return build


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def save_prompt(tmp_path):
    """``save_prompt(rows [n, d], placement=…, text=…, **SoftPrompt fields)`` → folder."""
    from lm_eval_softverb.frame import SLOT, Frame
    from lm_eval_softverb.prompt import SoftPrompt

    count = 0

    def save(rows, placement: str = "prefix", text: str = SLOT, **fields) -> str:
        nonlocal count
        count += 1
        prompt = SoftPrompt(rows.detach().float(), frame=Frame(placement, text), **fields)
        return str(prompt.save(tmp_path / f"prompt-{count}"))

    return save


@pytest.fixture
def random_prompt(save_prompt):
    """``random_prompt(seed, n)`` → folder of random rows of the tiny models' width."""

    def make(seed: int = 0, n: int = 5, placement: str = "prefix", text: str = "§", **fields) -> str:
        rows = torch.randn(n, 32, generator=torch.Generator().manual_seed(seed)) * 0.5
        return save_prompt(rows, placement, text, **fields)

    return make


# --- requests and tasks ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def texts():
    """Short texts of very different lengths, all within the tiny window."""
    return [
        "Good.",
        "The film is a joy from the first scene to the last",
        "Is it 42?",
        "A dull and slow story; I left before the end",
        "naïve café 🙂",
        "Review: the food was cold. Sentiment:",
        "red",
    ]


@pytest.fixture(scope="session")
def pairs(texts):
    """Multiple-choice requests: choices of one and of many tokens, some with a common beginning, some equal."""
    choices = [" positive", " negative", " neg", " good", " good music", " good music and", " 7", "."]
    chosen = random.Random(0)
    out = [(t, c) for t in texts for c in chosen.sample(choices, 4)]
    return [*out, (texts[0], " good"), (texts[0], " good"), (texts[1] + " ", "bad"), ("", "Good."), ("", "a film")]


@pytest.fixture(scope="session")
def evaluate():
    """``evaluate(lm, task configs, **simple_evaluate arguments)`` on tasks given as dicts with ``rows``."""
    import datasets
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    patch = pytest.MonkeyPatch()
    patch.setattr("lm_eval.evaluator.add_env_info", lambda _results: None)  # runs pip, for every evaluation
    manager = TaskManager(include_defaults=False)  # indexing the harness's own tasks takes ten seconds

    def run(lm, configs, **kwargs):
        tasks = []
        for config in configs:
            config = dict(config)
            rows = config.pop("rows")
            config |= {"custom_dataset": lambda rows=rows, **_kw: {"test": datasets.Dataset.from_list(rows)}}
            config = {"test_split": "test", "fewshot_split": "test", **config}
            tasks.append(ConfigurableTask(config=config))
        return lm_eval.simple_evaluate(
            model=lm, tasks=tasks, task_manager=manager, bootstrap_iters=0, verbosity="ERROR", **kwargs
        )

    yield run
    patch.undo()


@pytest.fixture
def command(monkeypatch, tmp_path):
    """``command(name, *arguments)`` → results and samples by task that ``lm_eval`` writes to ``tmp_path / name``.

    The real command, in this process; only the indexing of the harness's own tasks, and pip, are left out.
    """
    from lm_eval._cli.harness import HarnessCLI
    from lm_eval.tasks.manager import TaskManager

    from lm_eval_softverb.plugin import register

    register()
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _results: None)
    index = TaskManager.__init__

    def without_defaults(self, *args, **kwargs):
        index(self, *args, **kwargs | {"include_defaults": False})

    monkeypatch.setattr(TaskManager, "__init__", without_defaults)

    def run(name: str, *arguments: str):
        out = tmp_path / name
        monkeypatch.setattr("sys.argv", ["lm_eval", "run", *arguments, "--output_path", str(out), "--log_samples"])
        harness = HarnessCLI()
        harness.execute(harness.parse_args())
        [file] = out.rglob("results_*.json")
        results = json.loads(file.read_text())
        samples = {}
        for task in results["configs"]:
            [lines] = out.rglob(f"samples_{task}_2*.jsonl")
            rows = [json.loads(line) for line in lines.read_text().splitlines()]
            samples[task] = sorted(rows, key=lambda s: s["doc_id"])
        return results, samples

    return run


# --- sentence similarity without weights ------------------------------------------------------------------------------


def _rows(texts: list[str]) -> np.ndarray:
    rows = []
    for text in texts:
        seeds = [
            int(hashlib.sha256(word.encode()).hexdigest()[:15], 16) for word in ["", *text.lower().replace(",", " ").split()]
        ]
        rows.append(sum(np.random.default_rng(seed).normal(size=16) for seed in seeds))
    return np.array(rows)


@pytest.fixture(scope="session")
def hashed_rows():
    """Texts [N] → rows [N, 16], not of unit length; every word is a random direction, so common words make texts alike."""
    return _rows


@pytest.fixture
def hashing(monkeypatch, hashed_rows):
    """Stands in for MiniLM; ``.seen`` lists what was really encoded. Texts of more than twenty words are cut."""
    from lm_eval_softverb.metrics import similarity, tasks
    from lm_eval_softverb.metrics.similarity import Encoder

    seen: list[list[str]] = []

    def encode(texts):
        seen.append(list(texts))
        return hashed_rows(texts)

    encoder = Encoder(encode, lambda text: len(text.split()) > 20)
    encoder.seen = seen
    monkeypatch.setattr(similarity, "default", lambda: encoder)
    tasks._ranks.cache_clear()
    yield encoder
    tasks._ranks.cache_clear()
