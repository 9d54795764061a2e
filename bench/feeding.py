"""Tokenizing by one process and by several, finding the rows again, and the memory that a set takes mapped and as Python objects.

    python bench/feeding.py [--rows 300000] [--processes 2]

Short rows (a prompt of some words, a short answer), SmolLM2's tokenizer and chat template. Each case is a process of
its own with a cache of its own or, where rows are to be found, that of the case before. Memory is the peak of its
private bytes (`qvera.utils.memory.PeakWatch`), less what it had after its imports. An epoch is all global batches of 16
rows in their shuffled order, collated, with every row counted; "as objects" is the same with `list(rows)`, which is
what runs held before rows were mapped.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common import header, smollm2, write_result

WORDS = (
    "red green blue order three small boxes deliver tomorrow street garden quickly window paper answer number".split()
)


def write_rows(path: Path, count: int) -> None:
    chooser = random.Random(0)
    with open(path, "w", encoding="utf-8") as handle:
        for number in range(count):
            asked = " ".join(chooser.choices(WORDS, k=chooser.randint(4, 24)))
            row = {"prompt": f"{number}: {asked}", "completion": " ".join(chooser.choices(WORDS, k=6))}
            handle.write(json.dumps(row) + "\n")


def case(args: argparse.Namespace) -> None:
    """One measurement, in a process of its own; prints JSON."""
    from qvera.config.schema import parse_recipe
    from qvera.data import batches_of, build_datasets, collate
    from qvera.models.tokenizer import load_tokenizer
    from qvera.utils.memory import PeakWatch, private_bytes

    recipe = parse_recipe(
        {
            "model": smollm2(),
            "data": {"path": str(args.data), "max_length": 256, "tokenize_processes": args.processes},
            "training": {"global_batch_size": 16, "per_device_train_batch_size": 8},
        },
        "bench",
    )
    tokenizer = load_tokenizer(recipe.model)
    before, began = private_bytes(), time.perf_counter()
    with PeakWatch(torch.device("cpu")) as watch:
        data = build_datasets(recipe.data, tokenizer)
        result: dict[str, Any] = {
            "seconds": time.perf_counter() - began,
            "rows": len(data.train),
            "tokens": data.stats.tokens,
            "found": bool(data.stats.cache_entries),
        }
        if args.epoch:
            rows: Any = list(data.train) if args.epoch == "objects" else data.train
            batches = batches_of(recipe, rows)
            seen = np.zeros(len(rows), dtype=np.int64)
            began = time.perf_counter()
            for step in range(batches.per_epoch):
                for part in batches.passes(batches.rows(step)):
                    collate([rows[i] for i in part], data.pad_id)
                    seen[part] += 1
            assert (seen == 1).all()
            result["epoch_seconds"] = time.perf_counter() - began
        result["anonymous_bytes"] = watch.peak_bytes - before
    print(json.dumps(result))


def run_case(data: Path, cache: Path, processes: int, epoch: str = "") -> dict[str, Any]:
    command = [sys.executable, __file__, "--case", str(data), "--processes", str(processes), "--epoch", epoch]
    done = subprocess.run(
        command, env={**os.environ, "QVERA_CACHE": str(cache)}, stdout=subprocess.PIPE, text=True, check=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--case", dest="data", type=Path)
    parser.add_argument("--epoch", default="")
    args = parser.parse_args()
    if args.data is not None:
        return case(args)
    document: dict[str, Any] = {**header(), "sets": []}
    base = Path(os.environ.get("QVERA_CACHE", Path.home() / ".cache" / "qvera"))
    with tempfile.TemporaryDirectory() as directory:
        for count in (args.rows // 3, args.rows):
            data = Path(directory) / f"{count}.jsonl"
            write_rows(data, count)
            found: dict[str, Any] = {"rows": count, "source_bytes": data.stat().st_size}
            for name, processes in (("one process", 1), (f"{args.processes} processes", args.processes)):
                cache = Path(directory) / f"{count}-{processes}"
                cache.mkdir()
                (cache / "quickstart").symlink_to(base / "quickstart")
                found[name] = run_case(data, cache, processes)
                print(name, found[name], file=sys.stderr)
            found["kept_bytes"] = sum(f.stat().st_size for f in (cache / "rows").rglob("*.arrow"))
            for epoch in ("mapped", "objects"):
                found[f"epoch, {epoch}"] = run_case(data, cache, 1, epoch)
                print(epoch, found[f"epoch, {epoch}"], file=sys.stderr)
            document["sets"].append(found)
    print(write_result("feeding", document))


if __name__ == "__main__":
    main()
