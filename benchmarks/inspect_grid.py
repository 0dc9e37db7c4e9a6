"""InSPEcT's whole grid of layer pairs: one staggered pass against one pair at a time.

    make bench NAME=inspect_grid
    make bench NAME=inspect_grid ARGS="--dtype bfloat16"
    make bench NAME=inspect_grid ARGS="--every"

The packaged default (30 layers, 900 pairs), a trained prompt of 20 virtual tokens, 40 new tokens. Peers, both over pairs:
*cached*, ``mode=sequential``: transformers' ``generate`` with its cache; *uncached*, as the published code does it: the soft
prompt and the whole target prompt run again for every token. Of the peers a random sample of pairs is timed and scaled to all;
the sample is split around each run of ours. ``--every`` compares the texts of all pairs with the cached loop instead (long).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import peak_mib, report, reset_peak
from lm_eval_softverb.backbone import Backbone
from lm_eval_softverb.decoding import eos_ids, kv_bytes
from lm_eval_softverb.prompt import SoftPrompt
from lm_eval_softverb.residual import decoder_layers
from lm_eval_softverb.verbalizers.inspect_grid import Inspect, Pair, all_pairs
from lm_eval_softverb.verbalizers.patching import CHUNK_BUDGET

PROMPT = Path(__file__).parent / "prompts" / "sst2"


def main() -> None:
    a = arguments()
    prompt = SoftPrompt.load(a.prompt)
    if a.every:
        every(a, prompt)
        return
    cases = []
    for dtype in a.dtype.split(","):
        cases.append(case(a, prompt, dtype))
        print(f"# {json.dumps(cases[-1])}", flush=True)
    head = {key: cases[0][key] for key in ("ours", "peer", "ratio")}
    report("inspect_grid", head, all(c["same_texts"] == c["compared"] for c in cases if c["dtype"] != "bfloat16"), cases=cases)


def case(a: argparse.Namespace, prompt: SoftPrompt, dtype: str) -> dict[str, Any]:
    backbone = Backbone.load("smollm2-135m", dtype=dtype)
    pairs = all_pairs(len(decoder_layers(backbone)))
    length = len(backbone.tokenizer.encode(" | ".join(x.text for x in Inspect().examples("labels")) + " |")) + prompt.n + a.new
    chunk = a.rows or CHUNK_BUDGET // kv_bytes(backbone, length)
    sample = random.Random(a.seed).sample(pairs, a.cached)
    slow = sample[: a.uncached]
    passes = 0

    def counting(*_: Any) -> None:
        nonlocal passes
        passes += 1

    texts: dict[str, dict[Pair, str]] = {"ours": {}, "cached": {}, "uncached": {}}
    times: dict[str, list[float]] = {"ours": [], "cached": [], "uncached": []}
    for turn in range(a.repeats):
        for name, some in (("cached", sample[turn :: a.repeats]), ("uncached", slow[turn :: a.repeats])):
            for pair in some:
                start = time.perf_counter()
                texts[name][pair] = peer(name, backbone, prompt, pair, a.new)
                times[name].append(time.perf_counter() - start)
        handle = backbone.model.register_forward_pre_hook(counting)
        passes = 0
        reset_peak()
        start = time.perf_counter()
        [texts["ours"]] = Inspect(rows=a.rows).grid(backbone, [prompt], kind="labels", max_new_tokens=a.new)
        times["ours"].append(time.perf_counter() - start)
        peak = peak_mib()
        handle.remove()
    ours = statistics.median(times["ours"])
    whole = {name: statistics.mean(times[name]) * len(pairs) for name in ("cached", "uncached")}
    same = {name: sum(texts["ours"][p] == t for p, t in texts[name].items()) for name in ("cached", "uncached")}
    return {
        "dtype": dtype,
        "pairs": len(pairs),
        "new_tokens": a.new,
        "ours": round(ours, 2),
        "ours_range": [round(min(times["ours"]), 2), round(max(times["ours"]), 2)],
        "peer": round(whole["cached"], 1),
        "ratio": round(whole["cached"] / ours, 2),
        "uncached": round(whole["uncached"], 1),
        "ratio_uncached": round(whole["uncached"] / ours, 2),
        "sampled_pairs": {"cached": len(texts["cached"]), "uncached": len(texts["uncached"])},
        "same_texts": same["cached"] + same["uncached"],
        "compared": len(texts["cached"]) + len(texts["uncached"]),
        "forward_passes": passes,
        "chunks": -(-len(pairs) // chunk),
        "peak_mib": round(peak),
    }


def peer(name: str, backbone: Backbone, prompt: SoftPrompt, pair: Pair, new: int) -> str:
    if name == "cached":
        slow = Inspect(mode="sequential")
        return str(slow.grid(backbone, [prompt], kind="labels", max_new_tokens=new, pairs=[pair])[0][pair])
    return str(uncached(backbone, prompt, pair, new))


@torch.no_grad()
def uncached(backbone: Backbone, prompt: SoftPrompt, pair: Pair, new: int) -> str:
    """One pair the way the published code runs it: everything again for every token."""
    tokenizer, model = backbone.tokenizer, backbone.model
    source, target = pair
    ids = tokenizer.encode(" | ".join(x.text for x in Inspect().examples("labels")) + " |")
    place = slice(len(ids), len(ids) + prompt.n)
    ids += [tokenizer.encode(" x", add_special_tokens=False)[-1]] * prompt.n
    rows = prompt.embeddings.to(backbone.dtype)[None]
    for _ in range(new):
        hidden = model(inputs_embeds=rows, output_hidden_states=True, use_cache=False).hidden_states[source + 1]
        embeds = model.get_input_embeddings()(torch.tensor([ids]))
        if target < 0:
            embeds[:, place] = hidden
            logits = model(inputs_embeds=embeds, use_cache=False).logits
        else:

            def patch(_module: Any, _inputs: Any, out: Any, hidden: Any = hidden) -> Any:
                out[:, place] = hidden
                return out

            handle = decoder_layers(backbone)[target].register_forward_hook(patch)
            logits = model(inputs_embeds=embeds, use_cache=False).logits
            handle.remove()
        token = int(logits[0, -1].argmax())
        if token in eos_ids(backbone):
            break
        ids.append(token)
    return str(tokenizer.decode(ids[place.stop :], skip_special_tokens=True)).strip()


def every(a: argparse.Namespace, prompt: SoftPrompt) -> None:
    """Every pair against the cached loop, with a line per pair that differs; goes on where it was killed."""
    for dtype in a.dtype.split(","):
        backbone = Backbone.load("smollm2-135m", dtype=dtype)
        pairs = all_pairs(len(decoder_layers(backbone)))
        [fast] = Inspect(rows=a.rows).grid(backbone, [prompt], kind="labels", max_new_tokens=a.new)
        kept = Path(f"{a.every}-{dtype}.json")
        slow = {tuple(p): t for p, t in json.loads(kept.read_text())} if kept.exists() else {}
        for i, pair in enumerate(pairs):
            if pair not in slow:
                slow[pair] = peer("cached", backbone, prompt, pair, a.new)
            if i % 50 == 49 or i == len(pairs) - 1:
                kept.write_text(json.dumps([[list(p), t] for p, t in slow.items()]))
                same = sum(fast[p] == t for p, t in slow.items())
                print(f"# {dtype}: {same} of {len(slow)} pairs equal", flush=True)
        differ = [p for p in pairs if fast[p] != slow[p]]
        for pair in differ:
            print(f"# {pair}\n#   {fast[pair]!r}\n#   {slow[pair]!r}")
        same = len(pairs) - len(differ)
        report("inspect_grid_every", {"dtype": dtype, "same": same, "pairs": len(pairs)}, not differ)


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dtype", default="float32,bfloat16")
    p.add_argument("--prompt", type=Path, default=PROMPT)
    p.add_argument("--new", type=int, default=40)
    p.add_argument("--rows", type=int, default=0, help="pairs per chunk (default: what fits the budget)")
    p.add_argument("--cached", type=int, default=24, help="pairs of the cached loop to time")
    p.add_argument("--uncached", type=int, default=6, help="pairs of the uncached loop to time")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--every", metavar="FILE", help="compare all pairs; texts of the slow loop are kept in FILE-<dtype>.json")
    return p.parse_args()


if __name__ == "__main__":
    main()
