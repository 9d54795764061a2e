"""A merged export beside what it can't be faster than: copying the same files, and the ΔW products plus hashing.

Four times on one machine, one after the other: (a) `cp` of the base's files and an fsync; (b) the ΔW GEMMs of all
adapted weights, whole and with all threads; (c) SHA-256 of all bytes in and out; and `qvera export` itself under a
memory limit, its peak sampled from outside. All files in the page cache as far as it goes.

    python bench/synthesise.py 7b /tmp/7b
    python bench/export.py /tmp/7b --limit 3GB
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.common import header, write_result
from bench.limits import measured, parse_bytes
from qvera.adapters.save_load import attach, named_vectors, save_adapter
from qvera.config.sections import AdapterSection, ModelSection
from qvera.exporting.deltas import read_deltas
from qvera.models.model_class import empty_model
from qvera.utils.files import file_sha256
from qvera.utils.safetensors_io import base_fingerprint, checkpoint_tensors


def make_adapter(base: Path, out: Path, rank: int) -> None:
    """Random non-zero vectors on every linear of the base's shape; no weight is read."""
    model = attach(
        empty_model(ModelSection(path=str(base))), AdapterSection(rank=rank), str(base), base_fingerprint(base)
    )
    generator = torch.Generator().manual_seed(0)
    for name, vector in named_vectors(model).items():
        drawn = torch.randn(vector.shape, generator=generator) * (0.1 if name.endswith("_d") else 0.01)
        owner = model.get_submodule(name.rpartition(".")[0])
        getattr(owner, name.rpartition(".")[2])["default"] = torch.nn.Parameter(drawn)
    save_adapter(model, out)


def copy_seconds(files: list[Path], out: Path) -> float:
    """`cp` and an fsync of each file."""
    out.mkdir()
    began = time.perf_counter()
    subprocess.run(["cp", *map(str, files), str(out)], check=True)
    for file in out.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    seconds = time.perf_counter() - began
    shutil.rmtree(out)
    return seconds


def gemm_seconds(base: Path, adapter: Path) -> tuple[float, int]:
    """ΔW of every adapted weight as a whole, with torch's own threads; and how many weights that are."""
    deltas = read_deltas(adapter, empty_model(ModelSection(path=str(base))))
    began, weights = time.perf_counter(), 0
    for number, delta in enumerate(deltas.layers.values()):
        weights += delta.rows().numel()
        print(f"GEMMs: {number + 1} of {len(deltas.layers)}", end="\r", file=sys.stderr)
    return time.perf_counter() - began, weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--limit", type=parse_bytes, default=3_000_000_000)
    parser.add_argument("--name", help="key in the result file (default: the base directory's name)")
    args = parser.parse_args()
    scratch = args.base.parent / f".{args.base.name}-export-bench"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    document: dict[str, Any] = header()
    adapter, out = scratch / "adapter", scratch / "out"
    make_adapter(args.base, adapter, args.rank)
    files = sorted({e.file for e in checkpoint_tensors(args.base)})
    in_bytes = sum(f.stat().st_size for f in files)

    times = {"copy": copy_seconds(files, scratch / "copy")}
    print(f"copy: {times['copy']:.1f} s", file=sys.stderr)
    times["gemms"], weights = gemm_seconds(args.base, adapter)
    print(f"GEMMs: {times['gemms']:.1f} s    ", file=sys.stderr)
    command = [sys.executable, "-m", "qvera", "export", str(adapter), str(out), "--no-compare"]
    found = measured(command, args.limit)
    if found.returncode != 0:
        raise SystemExit(f"export failed: exit code {found.returncode}, out of memory: {found.killed_for_memory}")
    times["export"] = found.seconds
    print(f"export: {found.seconds:.1f} s, peak {found.peak_bytes / 1e9:.2f} GB", file=sys.stderr)
    written = sorted(out.glob("*.safetensors"))
    began = time.perf_counter()
    read, made = ({f.name: file_sha256(f) for f in group} for group in (files, written))
    times["hashing"] = time.perf_counter() - began
    certificate = json.loads((out / "qvera_export.json").read_text())
    if (certificate["base"]["sha256"], certificate["files"]) != (read, made):
        raise SystemExit("the certificate's hashes are not those of the files")

    bound = max(times["copy"], times["gemms"] + times["hashing"])
    document.update(
        rank=args.rank,
        in_bytes=in_bytes,
        out_bytes=sum(f.stat().st_size for f in written),
        adapted_weights=weights,
        seconds=times,
        export_over_bound=times["export"] / bound,
        peak_bytes=found.peak_bytes,
        peak_mapped_bytes=found.peak_mapped_bytes,
        limit_bytes=found.limit_bytes,
        killed_for_memory=found.killed_for_memory,
        longest_gap_seconds=found.longest_gap_seconds,
    )
    shutil.rmtree(scratch)
    for name, seconds in times.items():
        print(f"{name:<10}{seconds:8.1f} s")
    print(f"export / max(copy, GEMMs + hashing) = {times['export'] / bound:.2f}; peak {found.peak_bytes / 1e9:.2f} GB")
    path = Path(__file__).resolve().parent / "results" / "export.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    results[args.name or args.base.name] = document
    write_result("export", results)


if __name__ == "__main__":
    main()
