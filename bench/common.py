"""What all benches share: the header of a result file, interleaved timing, the models that are compared."""

from __future__ import annotations

import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from qvera.cli.quickstart_base import fetch_quickstart_base
from qvera.utils import memory

RESULTS = Path(__file__).resolve().parent / "results"


def header() -> dict[str, Any]:
    """Command, commit, machine and versions: what a figure is worth nothing without."""
    root = Path(__file__).resolve().parent.parent
    git = lambda *a: subprocess.run(["git", *a], cwd=root, capture_output=True, text=True).stdout.strip()  # noqa: E731
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "command": "python " + " ".join([str(Path("bench") / Path(sys.argv[0]).name), *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "qvera") else ""),
        "device": memory.device_name(device),
        "memory_bytes": psutil.virtual_memory().total,
        "threads": torch.get_num_threads(),
        "load_average_before": psutil.getloadavg()[0],
        "versions": memory.versions(),
    }


def write_result(name: str, document: dict[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return path


def train_records(run_dir: Path) -> list[dict[str, Any]]:
    """The optimizer steps of a run, as its metrics.jsonl has them."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "train"]


def interleaved(cases: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, dict[str, float]]:
    """Time the cases in turn, round after round, so that a slow moment of the machine hits them all.

    Returns:
        For each case ``median``, ``min`` and ``max`` in seconds over ``rounds``, and ``user_median`` and ``user_min`` of
        this process's user CPU seconds, which other work on the machine lengthens less.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    user: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warmup + rounds):
        for name, run in cases.items():
            began, user_began = time.perf_counter(), os.times().user
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmup:
                times[name].append(time.perf_counter() - began)
                user[name].append(os.times().user - user_began)
        print(f"round {turn + 1} of {warmup + rounds}", file=sys.stderr)
    return {
        name: {
            "median": statistics.median(t),
            "min": min(t),
            "max": max(t),
            "user_median": statistics.median(user[name]),
            "user_min": min(user[name]),
        }
        for name, t in times.items()
    }


def smollm2() -> str:
    """Directory of the quickstart's base."""
    return str(fetch_quickstart_base(report=lambda text: print(text, file=sys.stderr)))


def perturb(model: torch.nn.Module, size: float = 0.05) -> None:
    """Move every trained number off its start: zero vectors would make some paths cheaper than they are."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * size
                parameter.add_(noise.to(parameter))
