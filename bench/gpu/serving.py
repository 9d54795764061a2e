"""Part D: answers of many adapters at a time by the server's engine, stock PEFT's beside them, and answers beside a training;
attention over blocks.

The contenders are those of bench/serve_peers.py, on the base of this shape: requests that are all there at once, greedy,
each as long as the others. Adapters are VeRA r=256 with vectors of their own.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch
from transformers.masking_utils import causal_mask_function

from bench.adapters import write_adapters
from bench.common import train_records
from bench.gpu.common import (
    BASE_LAYERS,
    Lines,
    base_on_disk,
    do_piece,
    made_once,
    peak_bytes,
    recipe,
    start_peak,
    write_rows,
)
from bench.gpu.right import relative_error, seconds_of
from bench.serve_peers import Answer, ours, stock_lora
from bench.serving import random_prompts
from bench.synthesise import SHAPES
from qvera.config.sections import ModelSection
from qvera.serve.batches import GatheringStep, KernelStep
from qvera.serve.blocks import BLOCK_TOKENS
from qvera.serve.paged import BlockTables, LayerShape, arrays_of, attend_in_blocks, choose_kernel
from qvera.utils import accelerator

DISTINCT = (1, 16, 256, 1000)
PEFT_DISTINCT = (1, 16)
ROUNDS, NEW_TOKENS = 3, 32


def answers(args: argparse.Namespace, lines: Lines, who: str, rows: int) -> None:
    """Tokens a second of the base and of so many distinct adapters in turn."""
    base, tiny = base_on_disk(args), args.shape == "tiny"
    rows, rounds, new_tokens = (min(rows, 4), 1, 4) if tiny else (rows, ROUNDS, NEW_TOKENS)
    distinct = [min(count, 3) if tiny else count for count in (DISTINCT if who == "ours" else PEFT_DISTINCT)]
    names = [f"user-{number:04d}" for number in range(max(distinct))]
    prompts, contender = prompts_of(rows), functools.partial[Any](stock_lora, base, names)
    if who == "ours":
        make = functools.partial(write_adapters, section=ModelSection(path=base), count=len(names))
        root = made_once(args.scratch / f"adapters-{args.shape}-{len(names)}", make)
        contender = functools.partial[Any](ours, base, root, names)
    start_peak(accelerator.current_device())
    with contender(prompts, new_tokens) as answer:
        for count in dict.fromkeys([0, *distinct]):
            seconds, at = [], 0
            for turn in range(rounds + 1):  # the first warms up
                asked = [None if not count else names[(at + row) % count] for row in range(rows)]
                at += rows
                took, tokens = timed(answer, asked)
                seconds += [took] * (turn > 0)
            lines.add(who=who, adapters=count, rows=rows, new_tokens=new_tokens, seconds=statistics.median(seconds),
                      tokens_per_second=tokens / statistics.median(seconds),
                      **peak_bytes(accelerator.current_device()))  # fmt: skip


def prompts_of(rows: int) -> list[list[int]]:
    """Random prompts in the vocabulary of every shape."""
    source = random_prompts(1)
    return [[3 + token % 250 for token in next(source)] for _ in range(rows)]


def timed(answer: Answer, asked: list[str | None]) -> tuple[float, int]:
    """Seconds of answers to all prompts, and their tokens."""
    began = time.perf_counter()
    tokens = answer(asked)
    accelerator.synchronize()
    return time.perf_counter() - began, tokens


def beside_training(args: argparse.Namespace, lines: Lines) -> None:
    """The engine's tokens a second without and beside the steps of a `qvera train` on the same card, and steps a second."""
    base, prompts = base_on_disk(args, BASE_LAYERS), prompts_of(4 if args.shape == "tiny" else 32)
    rows = write_rows(args.scratch / "beside.jsonl", 64, min(args.tokens))
    training = {"max_steps": 10**4, "save_steps": 10**4}  # it is ended; the order of rows of a million takes 25 s
    path, run = recipe(args, "beside", base, rows, data={"max_length": min(args.tokens)}, training=training)
    metrics = run / "metrics.jsonl"
    with ours(base, args.scratch, [], prompts, 8 if args.shape == "tiny" else NEW_TOKENS) as answer:
        timed(answer, [None] * len(prompts))
        for beside in (False, True):
            process = None
            if beside:
                process = subprocess.Popen([sys.executable, "-m", "qvera", "train", str(path)])
                while process.poll() is None and not (metrics.exists() and len(train_records(run)) > 1):
                    time.sleep(0.1)
            before, began = len(train_records(run)) if beside else 0, time.perf_counter()
            found = [timed(answer, [None] * len(prompts)) for _ in range(ROUNDS)]
            passed, steps = time.perf_counter() - began, len(train_records(run)) - before if beside else 0
            if process is not None:
                if process.poll() is not None:
                    raise RuntimeError(f"qvera train ended before the answers, with exit code {process.returncode}")
                process.kill()
                process.wait()
            lines.add(beside_training=beside, training_steps_per_second=steps / passed,
                      tokens_per_second=sum(tokens for _, tokens in found) / sum(took for took, _ in found))  # fmt: skip


def blocks(args: argparse.Namespace, lines: Lines) -> None:
    """Attention of one layer in a step of answers: over blocks of keys and values as they are, and by copying these."""
    rows, keys = (4, 512) if args.shape == "tiny" else (64, 1024)
    device, config = accelerator.current_device(), SHAPES[args.shape]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    own = torch.Size([kv_heads, config["hidden_size"] // heads])
    dtype = torch.bfloat16 if accelerator.is_accelerator(device) else torch.float32
    kernel = choose_kernel(device, [LayerShape(heads, own, own, dtype, None)])
    size = BLOCK_TOKENS if kernel is None else kernel.block_tokens
    count = rows * keys // size

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, *own[1:], device=device, dtype=dtype)

    q, k, v = draw(rows, heads), draw(rows, kv_heads), draw(rows, kv_heads)
    layers = {0: (draw(count + 1, size, kv_heads), draw(count + 1, size, kv_heads))}
    tables = np.random.default_rng(0).permutation(count).reshape(rows, -1)
    arrays = arrays_of(tables.tolist(), [keys] * rows, [1] * rows, size, count)
    sent = accelerator.tensors_on(device, arrays)
    more = {"write": tables[:, -1] * size + size - 1, "tables": tables, "places": np.full((rows, 1), keys - 1)}
    held = accelerator.tensors_on(device, more)
    ways: dict[str, Any] = {"copied": GatheringStep(layers, held["write"], [(held["tables"], held["places"])])}
    if kernel is not None:
        ways["blocks"] = KernelStep(layers, held["write"], kernel, BlockTables(**sent, longest=1))
    wanted = None
    for name, step in ways.items():
        attend = functools.partial(step.attend, 0, q, k, v, causal_mask_function, None, None, None)
        found = attend()
        if wanted is None:  # of the same numbers, now that k and v of this step are written
            plain, cached = (
                BlockTables(**accelerator.tensors_on("cpu", arrays), longest=1),
                [x.cpu().float() for x in layers[0]],
            )
            wanted = attend_in_blocks(q.cpu().float(), cached[0], cached[1], plain, own[1] ** -0.5)
        error = relative_error(found, wanted)
        lines.add(attention=name, block_tokens=size, kernel=kernel and str(kernel), rows=rows, keys=keys, error=error,
                  seconds=seconds_of(attend, 10))  # fmt: skip


PIECES: dict[str, Any] = {"beside training": beside_training, "blocks 64": blocks}
PIECES |= {
    f"{who} {rows}": functools.partial(answers, who=who, rows=rows) for who in ("ours", "PEFT") for rows in (32, 64)
}

if __name__ == "__main__":
    do_piece(__doc__, PIECES)
