"""What a first GPU is asked, in four parts of at most 9 minutes. No network is needed. docs/first-machine.md reads the lines.

    python bench/gpu/carry.py wheels                               # here: what the machine may lack, below 30 MB
    python bench/gpu/first_machine.py A --wheels wheels            # there; then B, C and D
    python bench/gpu/first_machine.py A B C D --shape tiny --device cpu --tokens 16 32 --steps 2     # what the tests run

A right (`right.py`), B fast (`fast.py`), C large (`large.py`), D serving (`serving.py`). Each part is a list of pieces. A
piece is a process group of its own, which dies with its time, and adds its lines to ``--lines`` as it measures. A piece that
fails leaves a line that says why, and the next one goes on. A piece that has ended well on this card and shape is not done
again, so the same command goes on where it was cut off. Part B compares its cases, so there it is the same commit too.
Weights are random.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
PART_SECONDS = 530.0
_CASES = (
    "ours r=256",
    "PEFT LoRA r=16",
    "frozen",
    "ours LoRA r=16",
    "PEFT VeRA r=256",
    "ours r=1024",
    "ours resident r=256",
)
_MODES = ("checkpointing", "no checkpointing", "offloaded", "packed", "float16", "streamed", "compiled")
# of each part: module, piece, and the seconds that it may take; together at most PART_SECONDS
PARTS: dict[str, list[tuple[str, str, int]]] = {
    "A": [
        ("right", "ceilings", 30), ("right", "operators", 70), ("right", "layer", 60), ("right", "resumed", 90),
        ("right", "export", 50), ("right", "tests", 130), ("right", "sanitizer", 90),
    ],
    "B": [
        ("fast", "qvera train", 70), ("fast", "host", 40),
        *(("fast", f"{case}, round {turn}", 30) for turn in (1, 2) for case in _CASES),
    ],
    "C": [
        *(("large", mode, 45) for mode in _MODES[:3]), ("large", "offloaded 32k", 70), ("large", "streamed 70b", 90),
        ("large", "profile", 50), *(("large", mode, 45) for mode in _MODES[3:]),
    ],
    "D": [*(("serving", f"{what} {rows}", 90) for rows in (32, 64) for what in ("ours", "PEFT")),
          ("serving", "beside training", 120), ("serving", "blocks 64", 30)],
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=list(PARTS))
    parser.add_argument("--lines", type=Path, default=ROOT / "bench" / "results" / "first_machine.jsonl")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "qvera-first-machine")
    parser.add_argument("--wheels", type=Path, help="install from this folder what the machine lacks, below --scratch")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="7b")
    parser.add_argument("--tokens", nargs="+", default=["512", "2048", "8192"])
    parser.add_argument("--steps", default="5")
    parser.add_argument("--pieces", nargs="*", default=[], help="only these, by name")
    parser.add_argument("--part-seconds", type=float, default=PART_SECONDS)
    args, began = parser.parse_args(), time.monotonic()
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C does it: the piece that runs is ended too
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    args.scratch.mkdir(parents=True, exist_ok=True)
    args.lines.parent.mkdir(parents=True, exist_ok=True)
    environment, here = environment_of(args)
    failed = 0
    for part in args.parts:
        for module, piece, limit in PARTS[part]:
            about = {"part": part, "piece": piece, "shape": args.shape, **here}
            same = {key: about[key] for key in about if part == "B" or key != "commit"}
            if (args.pieces and piece not in args.pieces) or has_ended(args.lines, same):
                continue
            left = args.part_seconds - (time.monotonic() - began)
            command = [sys.executable, "-m", f"bench.gpu.{module}", piece, "--lines", str(args.lines.resolve())]
            command += ["--scratch", str(args.scratch.resolve()), "--device", args.device, "--shape", args.shape]
            command += ["--tokens", *args.tokens, "--steps", args.steps]
            limit_seconds = min(limit * args.part_seconds / PART_SECONDS, left)
            found = run(command, environment, limit_seconds) if left > 5 else {"error": "left out: the time is up"}
            failed += "error" in found
            add_line(args.lines, {**about, "ended": "error" not in found, **found})
        began = time.monotonic()
    print(f"{args.lines}: {failed} pieces failed or were left out")
    return 1 if failed else 0


_ASKED = """
import json, os
from qvera.cli.main import main  # sets the allocator before it imports torch: for `--version` as much as for `train`
main(["--version"])
import torch
from bench.common import header
about = header()
print(json.dumps([about["device"], about["commit"], os.environ.get("PYTORCH_ALLOC_CONF", "")]))
"""


def environment_of(args: argparse.Namespace) -> tuple[dict[str, str], dict[str, str | None]]:
    """The pieces' environment (as `qvera` sets it for itself, with what was installed beside), and ``card`` and ``commit``."""
    site = args.scratch / "site"
    if args.wheels is not None:
        install(args.wheels, site)
    if args.device == "cpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    paths = [str(ROOT), *([str(site)] if site.exists() else []), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    said = subprocess.run([sys.executable, "-c", _ASKED], stdout=subprocess.PIPE, text=True, check=True).stdout
    card, commit, allocator = json.loads(said.splitlines()[-1])
    return {**os.environ, "PYTORCH_ALLOC_CONF": allocator, "PYTHONUNBUFFERED": "1"}, {"card": card, "commit": commit}


def install(wheels: Path, site: Path) -> None:
    """Install the folder's wheels whose package this machine lacks, or has in an older version, into ``site``."""
    sys.path.insert(0, str(site))  # where an earlier command may have put them
    lacking = []
    for wheel in sorted(wheels.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        try:
            here = metadata.version(name)
        except metadata.PackageNotFoundError:
            here = "0"
        if numbers(here) < numbers(version):
            lacking.append(str(wheel))
    if lacking:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade"]
        subprocess.run([*pip, "--target", str(site), *lacking], check=True)
    # qvera itself: methods and commands are found by the entry points of what is installed
    about = site / "qvera-0.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: qvera\nVersion: 0\n")
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    points = (
        f"[{group}]\n" + "".join(f"{name} = {at}\n" for name, at in group_of.items())
        for group, group_of in groups.items()
    )
    (about / "entry_points.txt").write_text("\n".join(points))


def numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def has_ended(lines: Path, about: dict[str, Any]) -> bool:
    """Whether this piece has ended well before."""
    if not lines.exists():
        return False
    rows = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    return any(row.get("ended") and about.items() <= row.items() for row in rows)


def add_line(lines: Path, row: dict[str, Any]) -> None:
    """Add a row as one line, in one write, and show it."""
    line = json.dumps(row)
    with open(lines, "ab", buffering=0) as handle:
        handle.write(line.encode() + b"\n")
    print(line, file=sys.stderr, flush=True)


def run(command: list[str], environment: dict[str, str], limit_seconds: float) -> dict[str, Any]:
    """Run one piece, in a process group that ends with it; its seconds, or the error with the end of what it said."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        # PR_SET_PDEATHSIG: a piece does not outlive this process, even where that is killed
        dies = functools.partial(ctypes.CDLL(None).prctl, 1, signal.SIGKILL)
        child = subprocess.Popen(
            command, env=environment, cwd=ROOT, stderr=said, start_new_session=True, preexec_fn=dies
        )
        try:
            problem = f"exit {code}" if (code := child.wait(limit_seconds)) else None
        except subprocess.TimeoutExpired:
            problem = f"stopped after {limit_seconds:.0f} s"
        finally:  # Ctrl-C too; what a piece has started does not outlive it
            try:
                os.killpg(child.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            child.wait()
        said.seek(0)
        text = said.read()
    sys.stderr.write(text)
    return {"seconds": time.monotonic() - began} if problem is None else {"error": problem, "said": text[-2000:]}


if __name__ == "__main__":
    sys.exit(main())
