"""Quantizing on a CPU: weights a second beside bitsandbytes' own, and a whole checkpoint through `qvera quantize` under a limit.

python bench/quantize.py                                    the packing alone
python bench/quantize.py --shape 7b --scratch /big/disk     and a 13.5 GB checkpoint, made there and removed again
python bench/quantize.py --checkpoint DIR --scratch DIR     and a checkpoint that is there already (--keep: the copy stays)
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.common import header, interleaved, write_result
from bench.limits import measured, parse_bytes
from bench.synthesise import SHAPES, synthesise
from qvera.models import quantization
from qvera.models.safetensors_stream import rows_per_block

WEIGHT = (11008, 4096)
ROUNDS = 5


def packing(dtype: torch.dtype, quant_type: str) -> dict[str, Any]:
    """One MLP weight of a 7B, interleaved; the results are compared as well."""
    weight = (torch.randn(WEIGHT, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    kernel = torch.ops.bitsandbytes.quantize_4bit.default
    ours, theirs = quantization.pack_four_bit(weight, quant_type), kernel(weight, 64, quant_type, torch.uint8)
    parts = weight.split(rows_per_block(WEIGHT[1]))
    pool = ThreadPoolExecutor(torch.get_num_threads())
    equal = torch.equal(ours[0], theirs[0].flatten()) and torch.equal(ours[1], theirs[1])
    cases = {
        "qvera": lambda: list(pool.map(lambda part: quantization.pack_four_bit(part, quant_type), parts)),
        "qvera, one thread": lambda: quantization.pack_four_bit(weight, quant_type),
        "bitsandbytes": lambda: kernel(weight, 64, quant_type, torch.uint8),
    }
    times = interleaved(cases, ROUNDS)
    rates = {name: weight.numel() / value["median"] / 1e6 for name, value in times.items()}
    return {"equal": equal, "seconds": times, "million_weights_per_second": rates}


def whole(checkpoint: Path, out: Path, limit_bytes: int) -> dict[str, Any]:
    """The command as a user gives it, in a cgroup of that size; nothing of the source in memory, and its hashes not known."""
    for file in checkpoint.glob("*.safetensors"):
        with open(file, "rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    environment = {**os.environ, "QVERA_CACHE": str(out.with_name("cache"))}
    command = [sys.executable, "-m", "qvera", "quantize", str(checkpoint), str(out)]
    result = measured(command, limit_bytes, env=environment)
    document = result.to_dict()
    document["source_bytes"] = sum(f.stat().st_size for f in checkpoint.glob("*.safetensors"))
    document["output_bytes"] = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    return document


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--checkpoint", type=Path, metavar="DIR")
    parser.add_argument("--scratch", type=Path, metavar="DIR")
    parser.add_argument("--limit", type=parse_bytes, default=1_500_000_000, metavar="BYTES", help="default: 1.5GB")
    parser.add_argument("--keep", action="store_true", help="leave the quantized copy in the scratch directory")
    parser.add_argument("--result", default="quantize", help="the name of the file in bench/results")
    args = parser.parse_args()
    if (args.shape or args.checkpoint) and not args.scratch:
        parser.error("--scratch says where the files go")
    document: dict[str, Any] = header()
    document["packing"] = {
        f"{quant_type}, {str(dtype).removeprefix('torch.')}": packing(dtype, quant_type)
        for dtype, quant_type in (
            (torch.bfloat16, "nf4"),
            (torch.float16, "nf4"),
            (torch.float32, "nf4"),
            (torch.bfloat16, "fp4"),
        )
    }
    for name, case in document["packing"].items():
        rates = ", ".join(f"{n} {r:.0f}" for n, r in case["million_weights_per_second"].items())
        print(f"{name}: {rates} M weights/s; equal: {case['equal']}")
    if args.scratch:
        args.scratch.mkdir(parents=True, exist_ok=True)
        checkpoint, out = args.checkpoint or args.scratch / args.shape, args.scratch / "quantized"
        try:
            if args.checkpoint is None:
                synthesise(args.shape, checkpoint)
            document["checkpoint"] = whole(checkpoint, out, args.limit)
        finally:
            for directory in (*(() if args.keep else (out,)), out.with_name("cache")):
                shutil.rmtree(directory, ignore_errors=True)
            if args.checkpoint is None:
                shutil.rmtree(checkpoint, ignore_errors=True)
        found = document["checkpoint"]
        print(
            f"{found['source_bytes'] / 1e9:.1f} GB → {found['output_bytes'] / 1e9:.1f} GB: exit {found['returncode']}, "
            f"{found['seconds']:.0f} s, peak {found['peak_bytes'] / 1e9:.2f} GB under a limit of "
            f"{args.limit / 1e9:.1f} GB"
        )
    print(write_result(args.result, document))
