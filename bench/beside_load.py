"""The quickstart's first steps alone and beside busy processes: how many times as long they take.

    python bench/beside_load.py --busy 4 --rounds 3

Each round runs both, one after the other. The busy processes have a session of their own, as another terminal's job:
Linux shares cores among sessions first (`sched_autogroup_enabled`). Needs the quickstart's base, and a machine on which
nothing else runs.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from bench.common import header, write_result

SHORT = ("training.max_steps=6", "training.exact_match_rows=8", "training.sample_count=1", "data.eval_limit=8")


def seconds(environment: dict[str, str]) -> float:
    """Of one short quickstart, from its start to its end."""
    overrides = [part for one in SHORT for part in ("--set", one)]
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "qvera", "quickstart", "--output-dir", f"{scratch}/run", *overrides]
        began = time.monotonic()
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS of both; default: qvera's choice")
    args = parser.parse_args()
    document = header() | {"busy": args.busy, "overrides": SHORT, "threads_asked": args.threads, "rounds": []}
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {} if args.threads is None else {"OMP_NUM_THREADS": str(args.threads)}
    for number in range(args.rounds):
        alone = seconds(environment)
        loops = "while :; do :; done & " * args.busy
        busy = subprocess.Popen(["sh", "-c", f"{loops} wait"], start_new_session=True)
        try:
            beside = seconds(environment)
        finally:
            os.killpg(busy.pid, signal.SIGKILL)
            busy.wait()
        document["rounds"].append({"alone_seconds": alone, "beside_seconds": beside})
        print(f"round {number + 1}: alone {alone:.1f} s, beside {args.busy} {beside:.1f} s, {beside / alone:.2f} times")
    document["times_as_long"] = statistics.median(r["beside_seconds"] / r["alone_seconds"] for r in document["rounds"])
    print(f"{document['times_as_long']:.2f} times as long; {write_result('beside_load', document)}")


if __name__ == "__main__":
    main()
