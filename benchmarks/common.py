"""What every benchmark shares: the machine, alternating timing, peak memory, and the JSON line printed last."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {p: version(p) for p in ("torch", "transformers", "peft", "lm_eval")},
    }


def alternate(ours: Callable[[], Any], peer: Callable[[], Any], repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of ``repeats`` runs of each, taking turns, after one warm-up each."""
    times: tuple[list[float], list[float]] = ([], [])
    ours(), peer()
    for i in range(repeats):
        order = [(0, ours), (1, peer)] if i % 2 == 0 else [(1, peer), (0, ours)]
        for side, run in order:
            start = time.perf_counter()
            run()
            times[side].append(time.perf_counter() - start)
    return times


def ratio(ours: list[float], peer: list[float]) -> dict[str, Any]:
    """Medians and their ratio, with the range of the ratio over the turns."""
    turns = [b / a for a, b in zip(ours, peer, strict=True)]
    return {
        "ours": round(statistics.median(ours), 4),
        "peer": round(statistics.median(peer), 4),
        "ratio": round(statistics.median(peer) / statistics.median(ours), 3),
        "ratio_range": [round(min(turns), 3), round(max(turns), 3)],
    }


def reset_peak() -> None:
    """Forgets the peak of resident memory so far (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """Peak resident memory since :func:`reset_peak`, MiB (Linux)."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def in_child(module: str, arguments: list[str]) -> dict[str, Any]:
    """Runs ``python -m module arguments`` and returns the JSON object it prints last."""
    out = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=True)
    return json.loads(out.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


def report(name: str, headline: dict[str, Any], agree: bool, **more: Any) -> None:
    """Prints the result, one JSON line, last."""
    print(json.dumps({"name": name, **headline, "agree": agree, **more, "machine": machine()}), flush=True)
