"""Memory of each rank under ZeRO-1, where every rank maps the 4-bit base, and under ZeRO-3, which spreads it while it is read.

Each rank is a real `qvera train` in a memory cgroup of its own: peak private memory (RssAnon + RssShmem + VmSwap,
sampled from outside, loading included), compared with the plan of a rank, and peak mapped pages; seconds a step; the
losses, which have to agree.

    python bench/zero.py tiny                                             a minute, to see that it works
    python bench/zero.py 7b --limits 6GB 3.2GB --tokens 64                6 minutes of 2 cores
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from bench.big import recipe, write_rows
from bench.common import header, train_records, write_result
from bench.synthesise import SHAPES, synthesise

HERE = Path(__file__).resolve().parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_stage(
    stage: str, max_bytes: str | None, model: Path, scratch: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """One run of ``args.ranks`` processes, each in its own cgroup; what each of them held."""
    out, rows = scratch / f"run-{stage}", scratch / "rows.jsonl"
    write_rows(rows, args.tokens, args.ranks * (args.steps + 1))
    tree = recipe(model, rows, out, args.rank, args.tokens, args.steps)
    tree["training"] |= {"global_batch_size": args.ranks, "sample_count": 0}
    if stage != "none":
        tree["deepspeed"] = stage
    file = scratch / f"{stage}.yaml"
    file.write_text(yaml.safe_dump(tree))
    limit = [] if max_bytes is None else ["--limit", max_bytes]
    command = [sys.executable, str(HERE / "limits.py"), *limit, "--", sys.executable, "-m", "qvera", "train", str(file)]
    port, logs, processes = str(free_port()), [], []
    began = time.perf_counter()
    for rank in range(args.ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(args.ranks)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": str(args.threads)}
        logs.append(scratch / f"{stage}-{rank}.log")
        with open(logs[-1], "w") as handle:
            processes.append(subprocess.Popen(command, env=os.environ | place, stdout=handle, stderr=handle))
    codes = [process.wait() for process in processes]
    found: dict[str, Any] = {"stage": stage, "seconds": time.perf_counter() - began, "returncodes": codes, "ranks": []}
    for log in logs:
        text = log.read_text(errors="replace")
        at = text.rfind('{\n "command"')  # limits.py says what it measured last
        one = json.loads(text[at:]) if at >= 0 else {"error": text[-2000:]}
        one.pop("command", None)
        found["ranks"].append(one)
    if any(codes):
        found["errors"] = [log.read_text(errors="replace")[-2000:] for log in logs]
    else:
        records = train_records(out)
        found["step_seconds"] = [r["step_seconds"] for r in records]
        found["losses"] = [r["loss"] for r in records]
        run = json.loads((out / "run.json").read_text())
        found["base_bytes"], planned = run["model"]["base_bytes"], run["plan"]["memory"]
        for one in found["ranks"]:
            one["planned_private_bytes"] = planned["private_bytes"]
            one["plan_relative_error"] = planned["private_bytes"] / one["peak_bytes"] - 1
        found["planned"] = planned["moments"][planned["peak_moment"]]
    print(json.dumps(found), file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--model", type=Path, help="an NF4 checkpoint that is there already (kept)")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument(
        "--stages",
        nargs="+",
        default=["zero1", "zero3"],
        help="and none, zero2, zero3-offload-cpu, zero3-offload-nvme, a file",
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--rank", type=int, default=256, help="of the adapter")
    parser.add_argument(
        "--limits",
        nargs="*",
        default=[],
        metavar="BYTES",
        help="of each rank's cgroup, such as 2.5GB: one for each stage",
    )
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()
    document: dict[str, Any] = {
        **header(),
        "shape": args.shape,
        "tokens": args.tokens,
        "ranks": args.ranks,
        "cases": [],
    }
    scratch = Path(tempfile.mkdtemp(prefix="qvera-zero-", dir=args.scratch))
    try:
        model = args.model or synthesise(args.shape, scratch / "nf4", nf4=True)
        limits = args.limits or [None] * len(args.stages)
        for stage, limit in zip(args.stages, limits, strict=True):
            document["cases"].append(run_stage(stage, limit, model.resolve(), scratch, args))
        print(write_result(f"zero-{args.shape}", document))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
