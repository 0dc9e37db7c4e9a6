"""Tiny copies of Super-NaturalInstructions in its three layouts, and a DoD made of plain tasks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from lm_eval_softverb.data.dod.tokens import PIECES

SMALL = {"min_instances": 12, "rows": 12, "heldout": 4}


def instances(word: str, n: int = 16, words: int = 3) -> list[dict]:
    """Instances with one or, every fourth, two outputs; all inputs differ."""
    return [
        {
            "id": f"{word}-{i}",
            "input": " ".join([word, *(f"w{i}" for _ in range(words - 1))]),
            "output": [f"{word} out {i}", f"{word} other {i}"][: 1 + (i % 4 == 0)],
        }
        for i in range(n)
    ]


def task(word: str, split: str = "train", **changes) -> dict:
    return {
        "split": split,
        "Definition": [f"Answer with {word}."],
        "Input_language": ["English"],
        "Output_language": ["English"],
        "Source": [f"{word}_corpus"],
        "Domains": ["News"],
        "Categories": ["Testing"],
        "Instances": instances(word),
        **changes,
    }


def tasks() -> dict[str, dict]:
    return {
        "task1_red_one": task("red"),
        "task2_blue_two": task("blue"),
        "task3_green_three": task("green", "test"),
        "task4_black_four": task("black", "test"),
    }


def write_clone(root: Path, given: dict[str, dict]) -> str:
    """Tasks with None for their data are listed only."""
    (root / "tasks").mkdir(parents=True)
    (root / "splits" / "default").mkdir(parents=True)
    for split in ("train", "test", "excluded"):
        names = [name for name, value in given.items() if value["split"] == split]
        (root / "splits" / "default" / f"{split}_tasks.txt").write_text("".join(name + "\n" for name in names))
    for name, value in given.items():
        if "Instances" in value:
            (root / "tasks" / f"{name}.json").write_text(json.dumps({k: v for k, v in value.items() if k != "split"}))
    return str(root)


def write_hub(root: Path, given: dict[str, dict]) -> str:
    """Targets unwound, as in the hub dataset."""
    root.mkdir(parents=True)
    for split in ("train", "test"):
        rows = [
            {"task_name": name, "id": i["id"], "definition": value["Definition"][0], "inputs": i["input"], "targets": output}
            for name, value in given.items()
            for i in value.get("Instances", [])
            for output in i["output"]
            if value["split"] == split
        ]
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(root)


def write_rebuilt(root: Path, given: dict[str, dict], group: int = 20) -> str:
    import pyarrow as pa
    from pyarrow import parquet

    root.mkdir(parents=True)
    index, rows = [], []
    for name, value in given.items():
        own = value.get("Instances", [])
        counts = [sum(PIECES.count([i["input"], i["output"][0]])) for i in own]
        short = sum(n <= 400 for n in counts)
        entry = {"task": name, "split": value["split"], "definition": value["Definition"][0], "domain": ["News"]}
        entry |= {"category": "Testing", "input_language": "English", "output_language": "English"}
        index.append(entry | {"n_instances_stored": len(own), "n_instances_le400": short})
        rows += [
            {"task": name, "id": i["id"], "input": i["input"], "outputs": i["output"], "n_tokens": n}
            for i, n in zip(own, counts, strict=True)
            if n <= 400 and short >= 12
        ]
    columns = [("task", pa.string()), ("id", pa.string()), ("input", pa.string())]
    schema = pa.schema([*columns, ("outputs", pa.list_(pa.string())), ("n_tokens", pa.int16())])
    table = pa.Table.from_pylist(rows, schema)
    table = table.set_column(0, "task", table["task"].dictionary_encode())
    parquet.write_table(table, root / "ni_all_pass_500.parquet", row_group_size=group)
    (root / "ni_index.json").write_text(json.dumps(index))
    (root / "ni_filter.json").write_text("{}")
    return str(root)


@dataclass
class PlainDod:
    """A DoD of given tasks."""

    given: list
    kind: str = "general"
    sha256: str = "0" * 64

    def names(self, split=None):
        return [t.name for t in self.given if split in (None, t.split)]

    def task(self, name):
        return {t.name: t for t in self.given}[name]


def general_bank(root: Path):
    """Folder of a bank (manifest only) over a tiny clone, and its DoD; one test task has fewer rows than the others."""
    from lm_eval_softverb.data.dod.general import GeneralDod

    given = tasks()
    few = given["task4_black_four"]
    few["Definition"] = ["{{ 7*7 }}\nSay [black]."]
    few["Instances"] = [{**i, "output": i["output"][:1]} for i in few["Instances"][:12]]
    dod = GeneralDod.open(write_clone(root / "ni", given), **{**SMALL, "rows": 15, "heldout": 9})
    write_bank(root / "bank", dod)
    return root / "bank", dod


def write_bank(folder, dod, /, **changes):
    folder.mkdir(exist_ok=True)
    lines = [
        {
            "prompt_id": f"p-{name}",
            "path": name,
            "task": name,
            "split": dod.task(name).split,
            "dod": dod.reference(),
            "heldout_sha256": dod.task(name).info["heldout_sha256"],
            **changes,
        }
        for name in dod.names()
    ]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def labels_bank(folder: Path, names, split: str = "test"):
    """A bank of random prompts of the tiny models for shipped label sets, and their DoD."""
    import torch

    from lm_eval_softverb.bank import Bank
    from lm_eval_softverb.data.dod.classification import ClassificationDod
    from lm_eval_softverb.data.rows import data_sha256
    from lm_eval_softverb.prompt import SoftPrompt

    dod = ClassificationDod.from_labelsets()
    items = []
    for number, name in enumerate(names):
        task = dod.task(name)
        entry = {"prompt_id": f"p-{name}", "task": name, "split": split, "dod": dod.reference(), "labels": list(task.labels)}
        rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(number))
        items.append((SoftPrompt(rows), {**entry, "heldout_sha256": data_sha256(task.heldout)}))
    return Bank.save(folder, items), dod
