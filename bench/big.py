"""Train a 7B, 13B or 70B of real shape on this machine under a memory limit, from a mapped NF4 file.

Each case is a real `qvera train` in a memory cgroup: peak private memory (RssAnon + RssShmem + VmSwap of all its
processes, sampled from outside), seconds a step, bytes read from the disk. Beside it the frozen base alone: the same
model, tokens and loss, with gradient checkpointing and gradients flowing to the embeddings, no adapter.

    python bench/big.py 7b --ranks 256 1024 --limits 2.5GB 6GB
    python bench/big.py 70b --tokens 128 --steps 3 --no-frozen
    python bench/big.py qwen3-30b --experts each --tokens 128 --steps 3 --no-frozen
"""

from __future__ import annotations

import argparse
import json
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

from bench.common import header, train_records, write_result
from bench.limits import measured, parse_bytes
from bench.synthesise import SHAPES, synthesise
from qvera.config.sections import ModelSection, TrainingSection
from qvera.models.checkpointing import enable_checkpointing
from qvera.models.forward import hidden_states
from qvera.models.loader import load_base
from qvera.models.loss import Head, target_loss


def write_rows(path: Path, tokens: int, count: int) -> None:
    """Text rows of more than ``tokens`` bytes (the tokenizer's tokens are bytes), so that each is cut to exactly that many."""
    words = "the quick brown fox jumps over a lazy dog while seven wizards brew "
    with open(path, "w", encoding="utf-8") as handle:
        for row in range(count):
            text = (f"{row} " + words * (tokens // len(words) + 1))[: tokens + 8]
            handle.write(json.dumps({"text": text}) + "\n")


def recipe(
    model: Path, rows: Path, out: Path, rank: int, tokens: int, steps: int, experts: str = "none"
) -> dict[str, Any]:
    return {
        "model": str(model),
        "data": {"path": str(rows), "format": "text", "train_on": "all", "max_length": tokens},
        "adapter": {"rank": rank, "experts": experts},
        "training": {
            "output_dir": str(out), "max_steps": steps, "global_batch_size": 1, "per_device_train_batch_size": 1,
            "report_to": [], "try_longest_batch": False,  # all rows are of one length
        },
    }  # fmt: skip


def train_under_limit(
    model: Path, scratch: Path, rank: int, tokens: int, steps: int, limit: int | None, experts: str = "none"
) -> dict[str, Any]:
    rows, out = scratch / "rows.jsonl", scratch / f"run-{time.monotonic_ns()}"
    write_rows(rows, tokens, steps + 1)
    file = scratch / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(model, rows, out, rank, tokens, steps, experts)))
    planned = subprocess.run(
        [sys.executable, "-m", "qvera", "plan", str(file), "--json"], stdout=subprocess.PIPE, check=True
    )
    result = measured([sys.executable, "-m", "qvera", "train", str(file)], limit, stdout=sys.stderr)
    found: dict[str, Any] = {"rank": rank, "tokens": tokens, "steps": steps, **result.to_dict()}
    found.pop("command")
    if result.returncode == 0:
        records = train_records(out)
        found["step_seconds"] = [r["step_seconds"] for r in records]
        found["losses"] = [r["loss"] for r in records]
        found["plan"] = plan_held(json.loads((out / "run.json").read_text())["plan"], result.peak_bytes)
        found["plan"]["predicted_step_seconds"] = json.loads(planned.stdout)["step_seconds"]
    print(json.dumps(found), file=sys.stderr)
    return found


def plan_held(plan: dict[str, Any], peak_bytes: int) -> dict[str, Any]:
    """What `qvera train` planned against its peak seen from outside plus the mapped pages of the weights (bytes)."""
    measured_bytes = peak_bytes + plan["measured"]["mapped_bytes"]
    return {
        "predicted_bytes": plan["memory"]["total_bytes"],
        "predicted_private_bytes": plan["memory"]["private_bytes"],
        "measured_bytes": measured_bytes,
        "relative_error": plan["memory"]["total_bytes"] / measured_bytes - 1,
    }


def frozen_steps(model: Path, tokens: int, steps: int) -> list[float]:
    """Seconds of forward + recompute + backward through the frozen base, gradients flowing to the input embeddings."""
    base = load_base(ModelSection(path=str(model)))
    enable_checkpointing(base.model)
    base.model.train()
    base.model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    ids = torch.randint(3, 200, (1, tokens), generator=torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        hidden = hidden_states(base.model, {"input_ids": ids})
        rows, targets = hidden[0, :-1], ids[0, 1:, None]
        loss, _ = target_loss(rows, targets, Head.of(base.model), TrainingSection().loss_chunk_tokens)
        loss.backward()
        seconds.append(time.perf_counter() - began)
        print(f"frozen base: {seconds[-1]:.1f} s", file=sys.stderr)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--model", type=Path, help="an NF4 checkpoint that is there already (kept)")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--ranks", type=int, nargs="+", default=[256])
    parser.add_argument("--limits", nargs="*", default=[], help="memory limits, such as 2.5GB; none: watched only")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--no-frozen", action="store_true")
    parser.add_argument("--experts", choices=["none", "shared", "each"], default="none", help="adapter.experts")
    parser.add_argument("--frozen-only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.frozen_only:
        print(json.dumps(frozen_steps(args.model, args.tokens, args.steps)))
        return
    document: dict[str, Any] = {
        **header(),
        "shape": args.shape,
        "tokens": args.tokens,
        "experts": args.experts,
        "cases": [],
    }
    scratch = Path(tempfile.mkdtemp(prefix="qvera-big-", dir=args.scratch))
    try:
        model = args.model or synthesise(args.shape, scratch / "nf4", nf4=True)
        document["base_bytes"] = sum(f.stat().st_size for f in model.glob("*.safetensors"))
        for rank in args.ranks:
            for limit in args.limits or [None]:
                case = train_under_limit(
                    model, scratch, rank, args.tokens, args.steps, None if limit is None else parse_bytes(limit),
                    args.experts,
                )  # fmt: skip
                document["cases"].append(case)
            if not args.no_frozen and rank == args.ranks[0]:
                command = [sys.executable, __file__, args.shape, "--frozen-only", "--model", str(model)]
                command += ["--tokens", str(args.tokens), "--steps", str(args.steps)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                document["frozen_step_seconds"] = json.loads(done.stdout.splitlines()[-1])
        if "frozen_step_seconds" in document:
            frozen = statistics.median(document["frozen_step_seconds"])
            for case in document["cases"]:
                if "step_seconds" in case:
                    case["over_frozen"] = statistics.median(case["step_seconds"]) / frozen
        print(write_result(f"big-{args.shape}", document))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
