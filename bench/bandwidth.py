"""Seconds of a training step of two nodes by what the cable between them carries: ZeRO-1, whose ranks tell each other the vectors'
gradient, and ZeRO-3, which gathers every weight from the other node on each use.

The nodes are network namespaces of this machine (made and removed here), joined by a veth pair that `tc` tbf limits.
Bytes that came over the cable in a step are counted by the kernel and compared with `qvera plan`'s.

    python bench/bandwidth.py tiny                      a minute, to see that it works
    python bench/bandwidth.py 1b --tokens 64            8 minutes
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from bench.big import recipe, write_rows
from bench.common import header, train_records, write_result
from bench.namespaces import Nodes, problem
from bench.synthesise import SHAPES, synthesise
from bench.zero import free_port
from qvera.config.schema import load_recipe
from qvera.training.plan import Machine, Sharing, make_plan
from qvera.training.plan.memory import traffic

POLL_SECONDS = 0.05


def run_case(
    nodes: Nodes, stage: str, rate: str | None, model: Path, scratch: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """One run of a process on each node; the bytes that each of its steps brought to node 0."""
    name = f"{stage}-{rate or 'unlimited'}"
    out, rows, file = scratch / f"run-{name}", scratch / "rows.jsonl", scratch / f"{name}.yaml"
    write_rows(rows, args.tokens, 2 * (args.steps + 1))
    tree = recipe(model, rows, out, args.rank, args.tokens, args.steps)
    tree["training"] |= {"global_batch_size": 2, "sample_count": 0, "save_steps": args.steps}
    tree["deepspeed"] = stage
    file.write_text(yaml.safe_dump(tree))
    nodes.limit(rate)
    port, processes, logs = str(free_port()), [], []
    for number in range(2):
        place = {"RANK": str(number), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        place |= {"MASTER_ADDR": "node0", "MASTER_PORT": port}
        logs.append(scratch / f"{name}-{number}.log")
        with open(logs[-1], "w") as handle:
            command = nodes.command(number, [sys.executable, "-m", "qvera", "train", str(file)])
            processes.append(subprocess.Popen(command, env=os.environ | place, stdout=handle, stderr=handle))
    marks = [0]  # bytes when each line of the log was first seen
    try:
        while processes[0].poll() is None:
            lines = (out / "metrics.jsonl").read_text().count("\n") if (out / "metrics.jsonl").exists() else 0
            received = nodes.received_bytes(0)
            marks += [received] * (lines + 1 - len(marks))
            time.sleep(POLL_SECONDS)
        codes = [process.wait(60) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    found: dict[str, Any] = {"deepspeed": stage, "rate": rate, "returncodes": codes}
    if any(codes):
        found["errors"] = [log.read_text(errors="replace")[-2000:] for log in logs]
        return found
    records = train_records(out)
    seconds = [r["step_seconds"] for r in records]
    # the first step also records the order of the weights; it is not one of many
    between = [after - before for before, after in zip(marks[1:], marks[2:], strict=False)]
    found |= {
        "step_seconds": seconds,
        "median_step_seconds": statistics.median(seconds[1:]),
        "received_bytes_per_step": between,
        "losses": [r["loss"] for r in records],
    }
    planned = load_recipe(file, [])
    plan = make_plan(planned, Machine("", "cpu", torch.bfloat16, True, 0))
    brought = traffic(dataclasses.replace(plan, sharing=Sharing(int(stage[4]), None, 2, 1)))
    found["planned_bytes_per_step"] = brought._asdict()
    if between:
        found["planned_over_received"] = sum(brought) / statistics.median(between)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--model", type=Path, help="an NF4 checkpoint that is there already (kept)")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--stages", nargs="+", default=["zero1", "zero3"])
    parser.add_argument("--rates", nargs="+", default=["unlimited", "1gbit"], help="as tc writes them, or unlimited")
    parser.add_argument("--rank", type=int, default=256, help="of the adapter")
    parser.add_argument("--tokens", type=int, default=64, help="of the row on each node")
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    missing = problem()
    if missing is not None:
        raise SystemExit(missing)
    document: dict[str, Any] = {**header(), "shape": args.shape, "tokens": args.tokens, "cases": []}
    scratch = Path(tempfile.mkdtemp(prefix="qvera-bandwidth-", dir=args.scratch))
    try:
        model = (args.model or synthesise(args.shape, scratch / "nf4", nf4=True)).resolve()
        with Nodes() as nodes:
            document["delay"] = {"skipped": nodes.delay_problem()}
            for stage in args.stages:
                for rate in args.rates:
                    limit = None if rate == "unlimited" else rate
                    document["cases"].append(run_case(nodes, stage, limit, model, scratch, args))
                    print(json.dumps(document["cases"][-1]), file=sys.stderr)
        print(write_result(f"bandwidth-{args.shape}", document))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
