"""Everything that a first GPU is asked, in one command, in the order of what it is worth. No network is needed.

    python bench/gpu/run.py --out $OUT/gpu.jsonl                                   # under 9 minutes
    python bench/gpu/run.py --device cpu --shape tiny --tokens 16 32 --steps 2     # what the tests run

1. `numerics.py`: every kernel, a training step and an export against fp32 on the CPU.
2. `training.py`: `qvera train`, killed and resumed.
3. `speed.py`: seconds a step and peak memory of a 7B shape: ours, stock PEFT VeRA and LoRA, the frozen base; a process each.
4. `modes.py`: checkpointing modes, streaming, packing, float16; the plan against what was reserved.
5. `decoding.py`: tokens a second.
6. `profile_step.py`: one step, kernel by kernel.

Each part is a process of its own and appends rows to the results file as it measures them, so a run that is cut off
leaves what it has. Weights are random. Packages that such a machine lacks are carried: bench/gpu/carry.sh.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

SPEED_CASES = (
    "ours r=256",
    "PEFT LoRA r=16",
    "frozen, stock",
    "ours r=1024",
    "PEFT VeRA r=256",
    "frozen, ours",
    "PEFT VeRA r=1024",
)
LIMIT_SECONDS = 530.0
# part, its options, and the seconds that it may take, of these
PARTS: list[tuple[str, list[str], int]] = [
    ("numerics", ["--small"], 90),
    ("training", ["--small"], 120),
    *(("speed", ["--case", case], 60) for case in SPEED_CASES[:4]),
    ("modes", ["--few-layers"], 240),
    ("decoding", ["--few-layers"], 90),
    ("profile_step", ["--few-layers"], 60),
    *(("speed", ["--case", case], 60) for case in SPEED_CASES[4:]),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="7b")
    parser.add_argument("--tokens", nargs="+", default=["512", "2048", "8192"])
    parser.add_argument("--steps", default="5")
    parser.add_argument("--parts", nargs="*", default=[], help="only these, by name")
    parser.add_argument("--limit-seconds", type=float, default=LIMIT_SECONDS, help="all parts together")
    args = parser.parse_args()
    began, failed = time.perf_counter(), 0
    args.out.parent.mkdir(parents=True, exist_ok=True)

    from bench.common import header  # here, so that --help needs no torch

    with open(args.out, "w", encoding="utf-8") as handle:
        handle.write(json.dumps({"part": "header", **header()}) + "\n")
    with tempfile.TemporaryDirectory(prefix="qvera-gpu-") as scratch:
        for part, extra, limit in PARTS:
            if args.parts and part not in args.parts:
                continue
            left = args.limit_seconds - (time.perf_counter() - began)
            row: dict[str, object] = {"part": part, "options": extra}
            if left < 15:
                failed += 1
                row["error"] = "left out: the time is up"
            else:
                command = [
                    sys.executable,
                    "-m",
                    f"bench.gpu.{part}",
                    "--out",
                    str(args.out.resolve()),
                    "--scratch",
                    scratch,
                ]
                command += [
                    "--device",
                    args.device,
                    "--tokens",
                    *args.tokens,
                    "--steps",
                    args.steps,
                    *_sizes(args.shape, extra),
                ]
                row |= _run(command, min(limit * args.limit_seconds / LIMIT_SECONDS, left))
                failed += "error" in row
            with open(args.out, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(row) + "\n")
            print(json.dumps(row), file=sys.stderr, flush=True)
    print(f"{args.out}: {time.perf_counter() - began:.0f} s, {failed} parts failed or left out")
    return 1 if failed else 0


def _sizes(shape: str, extra: list[str]) -> list[str]:
    """A part's shape: the whole one, four layers of it, or a small one, whose reference a CPU computes in a moment."""
    if extra == ["--small"]:
        return ["--shape", "tiny"]
    return ["--shape", shape, *(["--layers", "4"] if extra == ["--few-layers"] and shape != "tiny" else [])] + [
        word for word in extra if word != "--few-layers"
    ]


def _run(command: list[str], limit_seconds: float) -> dict[str, object]:
    """Run one part; what it writes to stderr goes through, and the end of it into the row where it failed."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "QVERA_CACHE": os.environ.get("QVERA_CACHE", "")}
    if not env["QVERA_CACHE"]:
        del env["QVERA_CACHE"]
    began = time.perf_counter()
    try:
        done = subprocess.run(command, env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=limit_seconds)
    except subprocess.TimeoutExpired as error:
        text = (error.stderr or b"").decode(errors="replace") if isinstance(error.stderr, bytes) else str(error.stderr)
        return {"error": f"stopped after {limit_seconds:.0f} s", "stderr": text[-2000:]}
    sys.stderr.write(done.stderr)
    seconds = time.perf_counter() - began
    return (
        {"seconds": seconds}
        if done.returncode == 0
        else {"error": f"exit {done.returncode}", "stderr": done.stderr[-2000:]}
    )


if __name__ == "__main__":
    sys.exit(main())
