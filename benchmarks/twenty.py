"""The bank of twenty: one soft prompt for each line of ``twenty.jsonl``, half to choose settings on, half to test them.

    make bench NAME=twenty ARGS="--out benchmarks/banks/twenty"

Twelve shipped label sets and the eight benchmark datasets (``SOFTVERB_DATA_DIR``, see README). Run it again after a kill.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.bank import Bank
from lm_eval_softverb.models.harness import find_rows
from lm_eval_softverb.prompt import SoftPrompt
from lm_eval_softverb.storage import read_jsonl
from lm_eval_softverb.tuners.config import SoftConfig
from lm_eval_softverb.tuners.soft import train_soft_prompt

LINES = Path(__file__).with_name("twenty.jsonl")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="folder of the bank; unfinished prompts lie in <out>.work")
    p.add_argument("--model", default="smollm2-135m")
    a = p.parse_args()
    backbone = Backbone.load(a.model)
    items: list[tuple[SoftPrompt, dict[str, Any]]] = []
    for _, line in read_jsonl(LINES):
        rows, info = find_rows(line["task"], max_rows=line.get("max_rows"))
        config = SoftConfig(max_length=line.get("max_length", 512), epochs=line.get("epochs", 20))
        work = a.out.with_name(a.out.name + ".work") / line["task"]
        prompt = train_soft_prompt(backbone, rows, config, work, info=info)
        entry = {key: line[key] for key in ("task", "split", "labels", "instruction")}
        items.append((prompt, {"prompt_id": line["task"], **entry, "validation_loss": prompt.info["best_validation_loss"]}))
        print(f"{line['task']}: validation loss {prompt.info['best_validation_loss']:.4f}", flush=True)
    print(Bank.save(a.out, items))


if __name__ == "__main__":
    main()
