"""A 16-bit checkpoint → bitsandbytes' own serialized 4-bit checkpoint, which stock transformers loads and qvera maps.

Every source file is read once, in the order of its bytes: hashed, quantized and written chunk by chunk by threads that wait
for each other (`prefetch`), so that memory is a few chunks and one weight's scales. Finished shards outlive a kill;
``config.json``, without which nothing takes a directory for a model, comes last.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qvera.config.schema import ModelSection
from qvera.models import nf4, quantization
from qvera.models.quantized_record import RECORD, content_identity, settings_of
from qvera.models.source_checkpoint import SourceCheckpoint
from qvera.utils import memory
from qvera.utils.atomic import OutputDirectory, disk_errors, flush, replace_text, require_space
from qvera.utils.errors import RunFailed
from qvera.utils.safetensors_io import TensorSpec, base_fingerprint, grouped_by_bytes, write_source_fingerprint
from qvera.utils.safetensors_stream import Chunk, prefetch, read_chunks, write_chunks, write_index

SHARD_BYTES = 1_000_000_000
"""A kill costs at most the work of one shard."""
_NOT_COPIED = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pkl",
    ".pickle",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".ckpt",
    ".index.json",
)
_DEPTH = 4

Progress = Callable[[int, int, str], None]
"""Called with (source bytes done, source bytes in all, tensor name)."""


def quantize_checkpoint(
    section: ModelSection,
    source: SourceCheckpoint,
    out: Path,
    *,
    known: Mapping[Path, str] | None = None,
    device: torch.device | None = None,
    progress: Progress | None = None,
    shard_bytes: int | None = None,
) -> dict[str, Any]:
    """Write the 4-bit checkpoint to ``out``, or go on with it; returns its record (also written there).

    Args:
        section: quantization, double_quant and quant_storage.
        known: source file → SHA-256, of files that need not be hashed again.
        device: where to quantize; CUDA uses bitsandbytes' own kernels.
        progress: called on the calling thread; may raise, to stop.

    Raises:
        InputError: ``out`` holds something else, or its disk has no room.
        RunFailed: a weight has NaN or Inf, the source changed meanwhile, or the disk is full; finished shards are kept.
    """
    began = time.perf_counter()
    device = device or torch.device("cpu")
    files = source.file_identity()
    # what the bytes are a function of; the device, because bitsandbytes' kernels may round its statistics otherwise
    identity = {
        "source": str(source.directory.resolve()),
        "files": files,
        "config": source.config_sha256,
        "settings": settings_of(section),
        "device": device.type,
        "shard_bytes": shard_bytes or SHARD_BYTES,
    }
    plan = _plan(source, section, shard_bytes or SHARD_BYTES)
    with (
        OutputDirectory.open(out, identity, "quantize") as work,
        disk_errors(f"{out}", "Finished shards are kept: run again."),
    ):
        have = {name for name, _ in plan if work.has(name)}
        require_space(
            out, sum(s.size_bytes for name, specs in plan if name not in have for s in specs), "the quantized copy"
        )
        hashes = dict(work.facts.get("source", {}))
        hashes |= {file.name: digest for file, digest in (known or {}).items() if file in source.files}
        done = _Position(source.size_bytes)
        needed = _needed(source, plan, have)
        with nf4.Packer(section.quantization) as packer:
            read = prefetch(_read(source, needed, hashes, done), _DEPTH)
            made = prefetch(_convert(read, source, section, device, packer), _DEPTH)
            try:
                for name, specs in plan:
                    if name in have:
                        continue
                    digest = write_chunks(out / name, specs, _watched(made, done, progress))
                    work.facts["source"] = dict(hashes)
                    work.finished(name, digest)
                for _ in made:  # what is left of the source to be hashed
                    raise RuntimeError("more tensors were made than planned")
            finally:
                made.close()
        if source.file_identity() != files:
            raise RunFailed(f"{source.directory}: its shards changed while they were read. Run again.")
        if progress is not None:
            progress(done.total, done.total, "")
        record = {
            "format": 1,
            "source": {
                "path": section.path,
                "revision": section.revision,
                "directory": str(source.directory.resolve()),
                "config_sha256": source.config_sha256,
                "files": {
                    file.name: {"sha256": hashes[file.name], "bytes": files[file.name][0]} for file in source.files
                },
            },
            "settings": settings_of(section),
            "identity": content_identity(
                source.config_sha256, {file.name: hashes[file.name] for file in source.files}, settings_of(section)
            ),
            "files": {name: {"sha256": work.shards[name], "bytes": (out / name).stat().st_size} for name, _ in plan},
            "seconds": time.perf_counter() - began,
            "versions": memory.versions(),
        }
        _finish(source, section, out, plan, record)
        work.complete()
    return record


def output_bytes(source: SourceCheckpoint, section: ModelSection) -> int:
    """Bytes of the tensors of the quantized copy."""
    return sum(spec.size_bytes for _, specs in _plan(source, section, SHARD_BYTES) for spec in specs)


def _plan(source: SourceCheckpoint, section: ModelSection, shard_bytes: int) -> list[tuple[str, list[TensorSpec]]]:
    """File name and tensors of each output shard, in the order of the source; a weight and its statistics stay together."""

    def units() -> Iterator[list[TensorSpec]]:
        for spec in source.tensors:
            if spec.name in source.quantized:
                yield [
                    TensorSpec(*item)
                    for item in quantization.serialized_layout(spec.name, spec.shape, spec.dtype, section)
                ]
            else:
                yield [spec]

    return grouped_by_bytes(units(), lambda spec: spec.size_bytes, shard_bytes)


class _Position:
    """SourceCheckpoint bytes read so far; written by the reading thread, read by the one that shows it."""

    def __init__(self, total: int) -> None:
        self.done, self.total = 0, total


def _needed(source: SourceCheckpoint, plan: list[tuple[str, list[TensorSpec]]], have: set[str]) -> set[str]:
    """Names of the source tensors that are not in a finished shard."""
    missing = {spec.name for name, specs in plan if name not in have for spec in specs}
    return {entry.name for entry in source.tensors if entry.name in missing}


def _read(source: SourceCheckpoint, needed: set[str], hashes: dict[str, str], position: _Position) -> Iterator[Chunk]:
    """All needed chunks of the source; a file whose hash is not known is read whole for it."""
    before = 0
    for file in source.files:
        digest = None if file.name in hashes else hashlib.sha256()
        for chunk in read_chunks(file, needed, digest):
            position.done = before + chunk.entry.start
            yield chunk
        if digest is not None:
            hashes[file.name] = digest.hexdigest()
        before += file.stat().st_size
        position.done = before


def _convert(
    read: Iterator[Chunk], source: SourceCheckpoint, section: ModelSection, device: torch.device, packer: nf4.Packer
) -> Iterator[tuple[str, Any]]:
    """Chunks of the source → chunks of the output, with the name of the output tensor they belong to."""
    absmax = np.empty(0, np.float32)
    blocks = 0
    gathered: list[torch.Tensor] = []
    try:
        for spec, data, last in read:
            if spec.name not in source.quantized:
                yield spec.name, data
                continue
            values = torch.from_numpy(data).view(spec.dtype)
            if device.type != "cpu":
                gathered.append(values.to(device, non_blocking=True))
                if last:
                    yield from _on_device(spec, torch.cat(gathered), section, source)
                    gathered.clear()
                continue
            if not blocks:
                absmax = np.empty(nf4.block_count(spec.numel), np.float32)
            packed = np.empty(nf4.packed_size(values.numel()), np.uint8)
            here = absmax[blocks : blocks + nf4.block_count(values.numel())]
            packer.pack(values, packed, here)
            if not np.isfinite(here).all():
                raise _not_finite(spec, source)
            blocks += len(here)
            yield spec.name, packed
            if last:
                blocks = 0
                statistics = quantization.serialized_statistics(
                    spec.name, torch.from_numpy(absmax), spec.shape, spec.dtype, section
                )
                yield from _in_order(spec, statistics, section)
    finally:
        read.close()  # type: ignore[attr-defined]


def _on_device(
    spec: TensorSpec, weight: torch.Tensor, section: ModelSection, source: SourceCheckpoint
) -> Iterator[tuple[str, Any]]:
    if not torch.isfinite(weight).all():
        raise _not_finite(spec, source)
    packed, statistics = quantization.quantized_on_device(spec.name, weight.view(spec.shape), section)
    yield spec.name, packed.reshape(-1).view(torch.uint8).numpy()
    yield from _in_order(spec, statistics, section)


def _in_order(
    spec: TensorSpec, statistics: dict[str, torch.Tensor], section: ModelSection
) -> Iterator[tuple[str, Any]]:
    for name, dtype, shape in quantization.serialized_layout(spec.name, spec.shape, spec.dtype, section)[1:]:
        tensor = statistics[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise RuntimeError(
                f"{name}: bitsandbytes made {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}"
            )
        yield name, tensor.contiguous().view(torch.uint8).numpy()


def _not_finite(spec: TensorSpec, source: SourceCheckpoint) -> RunFailed:
    return RunFailed(
        f"{source.file_of[spec.name]}: {spec.name} has NaN or Inf in it, so it can't be quantized. The checkpoint is damaged, or "
        "was saved in a dtype too narrow for it."
    )


def _watched(
    made: Iterator[tuple[str, Any]], position: _Position, progress: Progress | None
) -> Iterator[tuple[str, Any]]:
    for name, data in made:
        if progress is not None:
            progress(position.done, position.total, name)
        yield name, data


def _finish(
    source: SourceCheckpoint,
    section: ModelSection,
    out: Path,
    plan: list[tuple[str, list[TensorSpec]]],
    record: dict[str, Any],
) -> None:
    """Index, tokenizer and the like, record, and config.json last."""
    write_index(out, plan)
    for file in sorted(source.directory.iterdir()):
        if file.name in ("config.json", RECORD) or file.name.startswith(".") or not file.is_file():
            continue
        if not file.name.lower().endswith(_NOT_COPIED):
            shutil.copyfile(file, out / file.name)
            flush(out / file.name)
    replace_text(out / RECORD, json.dumps(record, indent=1))
    write_source_fingerprint(out, base_fingerprint(source.directory))
    dtypes = [entry.dtype for entry in source.tensors if entry.name in source.quantized]
    dtype = max(set(dtypes), key=dtypes.count) if dtypes else torch.bfloat16
    wanted = quantization.quantization_config(section, dtype)
    assert wanted is not None  # read_source was asked for 4 bits
    config = dict(source.config)
    config["quantization_config"] = json.loads(wanted.to_json_string(use_diff=False))
    if "dtype" not in config and "torch_dtype" not in config:
        config["dtype"] = str(dtype).removeprefix("torch.")
    replace_text(out / "config.json", json.dumps(config, indent=2) + "\n")
