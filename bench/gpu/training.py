"""The real `qvera train`, killed in the middle and resumed: the adapter must be that of a run which nobody killed.

The base is SmolLM2-135M where the quickstart's is in the cache (`qvera quickstart --fetch-only`), else the synthetic one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from bench.gpu.common import ROOT, Results, base_on_disk, options, qvera, wait_for_step, write_rows
from qvera.utils.paths import cache_root

STEPS, KILLED_AFTER = 12, 5


def main() -> None:
    args = options(__doc__)
    results = Results(args.out, "training")
    fetched = cache_root() / "quickstart" / "smollm2-135m-instruct"
    base = fetched if (fetched / "config.json").exists() else base_on_disk(args)
    rows = write_rows(args.scratch / "rows.jsonl", 64, 240)

    def recipe(name: str) -> tuple[str, Path]:
        run_dir = args.scratch / name
        tree = {
            "model": {"path": str(base)},
            "data": {"path": str(rows), "eval_fraction": 0.1, "template": "plain"},
            "adapter": {"rank": 64},
            "training": {
                "output_dir": str(run_dir), "max_steps": STEPS, "save_steps": 4, "learning_rate": 0.02,
                "full_determinism": True, "sample_count": 1, "sample_max_new_tokens": 8, "report_to": [],
            },
        }  # fmt: skip
        path = args.scratch / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return str(path), run_dir

    path, whole = recipe("whole")
    began = time.perf_counter()
    qvera("train", path, device=args.device)
    seconds = time.perf_counter() - began
    path, killed = recipe("killed")
    env = {**os.environ, "PYTHONPATH": str(ROOT)} | ({"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {})
    process = subprocess.Popen(
        [sys.executable, "-m", "qvera", "train", path], env=env, stderr=subprocess.DEVNULL, text=True
    )
    try:
        wait_for_step(killed / "metrics.jsonl", KILLED_AFTER, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    qvera("train", path, "--resume", device=args.device)
    same = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (whole, killed)]
    text = (whole / "run.json").read_text()
    results.add(base=base.name, steps=STEPS, killed_after=KILLED_AFTER, run_seconds=seconds,
                resumed_adapter_is_bit_equal=same[0] == same[1], result=yaml.safe_load(text)["result"])  # fmt: skip


if __name__ == "__main__":
    main()
