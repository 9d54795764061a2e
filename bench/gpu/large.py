"""Part C: does it fit as the plan says? `qvera train` in its modes of memory, a 70B's layers streamed, and a profile of one step."""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from rich.console import Console

from bench.common import train_records
from bench.gpu.common import Lines, base_on_disk, do_piece, recipe, start_peak, write_rows
from bench.gpu.fast import kernels_of, session_of
from qvera.config.schema import load_recipe
from qvera.models.checkpointing import compile_layers
from qvera.training import session
from qvera.training.trainer import train
from qvera.utils import accelerator

MODES: dict[str, dict[str, dict[str, Any]]] = {
    "checkpointing": {},
    "no checkpointing": {"training": {"gradient_checkpointing": False}},
    "offloaded": {"training": {"gradient_checkpointing": "offload"}},
    "streamed": {"model": {"stream": True}},
    "packed": {"data": {"packing": True}},
    "float16": {"model": {"compute_dtype": "float16"}},
    "compiled": {"training": {"torch_compile": True}},
}
"""What each mode changes in the recipe."""
OFFLOADED_TOKENS, STREAMED_LAYERS, STREAMED_TOKENS = 32_768, 16, 2048
CAP_BYTES = 6 * 10**9
"""Device memory of the streamed 70B: its 16 layers alone are 7 GB."""
SHOWN_KERNELS = 30


def one_run(
    args: argparse.Namespace, lines: Lines, name: str, base: str, tokens: int, changes: dict[str, dict[str, Any]]
) -> None:
    """Train a few steps as `qvera train` does, and write the plan beside what was taken."""
    sections: dict[str, dict[str, Any]] = {"data": {"max_length": tokens}, "model": {}}
    rows = write_rows(args.scratch / f"rows-{tokens}.jsonl", 16, tokens)
    sections["training"] = {"global_batch_size": 2, "per_device_train_batch_size": 1, "gradient_checkpointing": True}
    for section, keys in changes.items():
        sections[section] |= keys
    path, run = recipe(args, name, base, rows, **sections)
    start_peak(accelerator.current_device())
    train(load_recipe(path), run, console=Console(quiet=True))
    document, records = json.loads((run / "run.json").read_text()), train_records(run)
    lines.add(mode=name, tokens=tokens, step_seconds=statistics.median(r["step_seconds"] for r in records[1:]),
              losses=[r["loss"] for r in records], peak_bytes=document["result"]["peak_bytes"],
              planned_step_seconds=document["plan"]["step_seconds"], plan=document["plan"]["measured"],
              tokens_per_second=document["result"]["tokens_per_second"])  # fmt: skip


def mode(args: argparse.Namespace, lines: Lines, name: str) -> None:
    """One of `MODES` at the middle length."""
    eager = functools.partial(compile_layers, backend="eager")  # without inductor's C++, which takes minutes
    changed = mock.patch.object(session, "compile_layers", eager) if args.device == "cpu" else nullcontext()
    with changed:
        one_run(args, lines, name, base_on_disk(args), sorted(args.tokens)[len(args.tokens) // 2], MODES[name])


def offloaded_long(args: argparse.Namespace, lines: Lines) -> None:
    """One row of 32k tokens, its checkpoints in RAM: what the plan says of it is half of what others publish."""
    tokens = 128 if args.shape == "tiny" else OFFLOADED_TOKENS
    few = {**MODES["offloaded"]["training"], "global_batch_size": 1, "max_steps": 3}  # a row takes some 6 s of an H100
    one_run(args, lines, "offloaded 32k", base_on_disk(args), tokens, {"training": few})


def streamed(args: argparse.Namespace, lines: Lines) -> None:
    """Some layers of a 70B streamed into capped memory, and the same layers on the card: are the copies hidden?"""
    shape, tokens = ("tiny", 64) if args.shape == "tiny" else ("70b", STREAMED_TOKENS)
    base, device = base_on_disk(args, STREAMED_LAYERS, shape=shape), accelerator.current_device()
    one_run(args, lines, "70b layers on the card", base, tokens, {"model": {"stream": False}})
    start_peak(device)
    if device.type == "cuda":
        total = accelerator.free_and_total_bytes(device)
        assert total is not None
        torch.cuda.set_per_process_memory_fraction(CAP_BYTES / total[1])
    one_run(args, lines, "70b layers streamed", base, tokens, {"model": {"stream": True}})


def kernels(args: argparse.Namespace, lines: Lines) -> None:
    """Where the time of one step goes, kernel by kernel: torch.profiler's table of ours at r=256."""
    tokens = sorted(args.tokens)[len(args.tokens) // 2]
    ours = session_of(args, "ours r=256", tokens)

    def step() -> None:
        ours.task.loss(ours.model, [ours.datasets.train[0]])[0].backward()

    step()
    rows = kernels_of(step, ours.device)
    total, launches = sum(row[2] for row in rows), sum(row[1] for row in rows)
    for name, count, time in [("all of them", launches, total), *rows[:SHOWN_KERNELS]]:
        lines.add(tokens=tokens, kernel=name, launches=count, microseconds=time, share=time / total)


PIECES: dict[str, Any] = {"offloaded 32k": offloaded_long, "streamed 70b": streamed, "profile": kernels}
PIECES |= {name: functools.partial(mode, name=name) for name in MODES}

if __name__ == "__main__":
    do_piece(__doc__, PIECES)
