"""Part D: answers of many adapters at a time by the server's engine, stock PEFT's beside them, and answers beside a training.

The contenders are those of bench/serve_peers.py, on the base of this shape: requests that are all there at once, greedy,
each as long as the others. Adapters are VeRA r=256 with vectors of their own.
"""

from __future__ import annotations

import argparse
import functools
import threading
import time
from typing import Any

from bench.adapters import write_adapters
from bench.gpu.common import BASE_LAYERS, Lines, base_on_disk, do_piece, peak_bytes, recipe, write_rows
from bench.serve_peers import ours, stock_lora
from bench.serving import random_prompts
from qvera.config.schema import ModelSection
from qvera.utils import accelerator

DISTINCT = (1, 16, 256, 1000)
PEFT_DISTINCT = (1, 16)
ROUNDS = 3


def answers(args: argparse.Namespace, lines: Lines, who: str, rows: int) -> None:
    """Tokens a second of the base and of so many distinct adapters in turn."""
    tiny = args.shape == "tiny"
    base, new_tokens = base_on_disk(args), 8 if tiny else 64
    distinct = [min(count, 4) if tiny else count for count in (DISTINCT if who == "ours" else PEFT_DISTINCT)]
    root, source = args.scratch / f"adapters-{args.shape}", random_prompts(1)
    made = {path.name for path in root.glob("user-*")} if root.exists() else set()
    if who == "ours" and len(made) < max(distinct):
        made = set(write_adapters(root, ModelSection(path=base), max(distinct)))
    names = sorted(made) if who == "ours" else [f"user-{number}" for number in range(max(distinct))]
    prompts = [[3 + token % 250 for token in next(source)] for _ in range(rows)]
    contender: Any = ours if who == "ours" else stock_lora
    accelerator.reset_peak(accelerator.current_device())
    with contender(base, *([root] if who == "ours" else []), names, prompts, new_tokens) as answer:
        for count in dict.fromkeys([0, *distinct]):
            seconds, at = [], 0
            for turn in range(ROUNDS + 1):  # the first warms up
                asked = [None if not count else names[(at + row) % count] for row in range(rows)]
                at += rows
                began = time.perf_counter()
                tokens = answer(asked)
                accelerator.synchronize()
                seconds += [time.perf_counter() - began] * (turn > 0)
            lines.add(who=who, adapters=count, rows=rows, new_tokens=new_tokens, seconds=sorted(seconds)[ROUNDS // 2],
                      tokens_per_second=tokens / sorted(seconds)[ROUNDS // 2],
                      **peak_bytes(accelerator.current_device()))  # fmt: skip


def beside_training(args: argparse.Namespace, lines: Lines) -> None:
    """The engine's tokens a second while a `qvera train` runs on the same card, and without it."""
    from bench.gpu.common import qvera  # a process of its own, as a user would start it

    base, source = base_on_disk(args, BASE_LAYERS), random_prompts(2)
    prompts = [[3 + token % 250 for token in next(source)] for _ in range(32)]
    rows = write_rows(args.scratch / "beside.jsonl", 64, min(args.tokens))
    training = {"max_steps": 4 * args.steps, "save_steps": 10**6}
    path, _ = recipe(args, "beside", base, rows, data={"max_length": min(args.tokens)}, training=training)
    with ours(base, args.scratch, [], prompts, 8 if args.shape == "tiny" else 64) as answer:
        answer([None] * len(prompts))
        for beside in (False, True):
            trained = threading.Thread(target=qvera, args=("train", str(path)))
            if beside:
                trained.start()
            began, tokens = time.perf_counter(), 0
            while trained.is_alive() or not tokens:
                tokens += answer([None] * len(prompts))
            lines.add(beside_training=beside, tokens_per_second=tokens / (time.perf_counter() - began))


PIECES: dict[str, Any] = {"beside training": beside_training}
PIECES |= {
    f"{who} {rows}": functools.partial(answers, who=who, rows=rows) for who in ("ours", "PEFT") for rows in (32, 64)
}

if __name__ == "__main__":
    do_piece(__doc__, PIECES)
