"""Quantize a 16-bit checkpoint to bitsandbytes' serialized 4-bit format, which stock transformers loads and qvera maps.

Each source file is read once, in the order of its bytes. Two threads run ahead of the writer (`prefetch`): one reads
and hashes, one quantizes. So memory is a few chunks and one weight's scales. Finished shards survive a kill.
``config.json`` is written last: without it nothing takes a directory for a model.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping
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
from qvera.utils.safetensors_io import (
    TensorEntry,
    TensorSpec,
    base_fingerprint,
    grouped_by_bytes,
    write_source_fingerprint,
)
from qvera.utils.safetensors_stream import Chunk, prefetch, read_chunks, write_chunks, write_index

SHARD_BYTES = 1_000_000_000
"""A kill costs at most the work of one shard."""
_NOT_COPIED = (
    ".safetensors", ".bin", ".pt", ".pkl", ".pickle", ".pth",
    ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt", ".index.json",
)  # fmt: skip
_PREFETCHED_CHUNKS = 4

Shards = list[tuple[str, list[TensorSpec]]]
"""File name and tensors of each shard."""
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
        source: the 16-bit checkpoint.
        out: a directory that is new, empty, or was left by the same call when it was killed.
        known: source file → SHA-256, of files that need not be hashed again.
        device: where to quantize; CUDA uses bitsandbytes' own kernels.
        progress: called on the calling thread; may raise, to stop.
        shard_bytes: most bytes of a shard (default `SHARD_BYTES`).

    Raises:
        InputError: ``out`` holds something else, or its disk has no room.
        RunFailed: a weight has NaN or Inf, the source changed meanwhile, or the disk is full; finished shards stay.
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
    shards = _shards(source, section, shard_bytes or SHARD_BYTES)
    with (
        OutputDirectory.open(out, identity, "quantize") as work,
        disk_errors(f"{out}", "Finished shards are kept: run again."),
    ):
        missing = [(name, specs) for name, specs in shards if not work.has(name)]
        require_space(out, sum(s.size_bytes for _, specs in missing for s in specs), "the quantized copy")
        hashes = dict(work.facts.get("source", {}))
        hashes |= {file.name: digest for file, digest in (known or {}).items() if file in source.files}
        with nf4.Packer(section.quantization) as packer:
            quantizer = _Quantizer(section, source, device, packer, hashes)
            chunks = quantizer.chunks({spec.name for _, specs in missing for spec in specs})
            try:
                for name, specs in missing:
                    digest = write_chunks(out / name, specs, quantizer.watched(chunks, progress))
                    work.facts["source"] = dict(hashes)
                    work.finished(name, digest)
                for _ in chunks:  # the rest of the source is hashed
                    raise RuntimeError("more tensors were made than planned")
            finally:
                chunks.close()
        if source.file_identity() != files:
            raise RunFailed(f"{source.directory}: its shards changed while they were read. Run again.")
        if progress is not None:
            progress(source.size_bytes, source.size_bytes, "")
        sha256_of = {file.name: hashes[file.name] for file in source.files}
        record = {
            "format": 1,
            "source": {
                "path": section.path,
                "revision": section.revision,
                "directory": str(source.directory.resolve()),
                "config_sha256": source.config_sha256,
                "files": {name: {"sha256": sha256, "bytes": files[name][0]} for name, sha256 in sha256_of.items()},
            },
            "settings": settings_of(section),
            "identity": content_identity(source.config_sha256, sha256_of, settings_of(section)),
            "files": {name: {"sha256": work.shards[name], "bytes": (out / name).stat().st_size} for name, _ in shards},
            "seconds": time.perf_counter() - began,
            "versions": memory.versions(),
        }
        _write_small_files(source, section, out, shards, record)
        work.complete()
    return record


def output_bytes(source: SourceCheckpoint, section: ModelSection) -> int:
    """Bytes of the tensors of the quantized copy."""
    return sum(spec.size_bytes for _, specs in _shards(source, section, SHARD_BYTES) for spec in specs)


def _shards(source: SourceCheckpoint, section: ModelSection, shard_bytes: int) -> Shards:
    """The shards of the output, in the order of the source; a weight and its statistics stay together."""

    def units() -> Iterator[list[TensorSpec]]:
        for entry in source.tensors:
            yield _layout(entry, section) if entry.name in source.quantized else [entry]

    return grouped_by_bytes(units(), lambda spec: spec.size_bytes, shard_bytes)


def _layout(entry: TensorEntry, section: ModelSection) -> list[TensorSpec]:
    """The tensors that a quantized weight becomes: the packed weight first, then its statistics."""
    return [TensorSpec(*item) for item in quantization.serialized_layout(entry.name, entry.shape, entry.dtype, section)]


class _Quantizer:
    """Reads, hashes and quantizes a source.

    Args:
        hashes: source file name → SHA-256; files that are not in it are read whole, and added.
    """

    def __init__(
        self,
        section: ModelSection,
        source: SourceCheckpoint,
        device: torch.device,
        packer: nf4.Packer,
        hashes: dict[str, str],
    ) -> None:
        self.section, self.source, self.device, self.packer, self.hashes = section, source, device, packer, hashes
        self.bytes_read = 0
        """Written by the reading thread, read by the one that shows it."""

    def chunks(self, missing: set[str]) -> Generator[tuple[str, np.ndarray], None, None]:
        """(name, bytes) of the output's tensors, in its order.

        Args:
            missing: names of tensors of the output that are in no finished shard.
        """
        needed = {entry.name for entry in self.source.tensors if entry.name in missing}
        read = prefetch(self._read(needed), _PREFETCHED_CHUNKS)
        return prefetch(self._quantize(read), _PREFETCHED_CHUNKS)

    def watched(
        self, chunks: Iterator[tuple[str, np.ndarray]], progress: Progress | None
    ) -> Iterator[tuple[str, np.ndarray]]:
        """The same chunks, with progress."""
        total = self.source.size_bytes
        for name, data in chunks:
            if progress is not None:
                progress(self.bytes_read, total, name)
            yield name, data

    def _read(self, needed: set[str]) -> Iterator[Chunk]:
        before = 0
        for file in self.source.files:
            digest = None if file.name in self.hashes else hashlib.sha256()
            for chunk in read_chunks(file, needed, digest):
                self.bytes_read = before + chunk.entry.start
                yield chunk
            if digest is not None:
                self.hashes[file.name] = digest.hexdigest()
            before += file.stat().st_size
            self.bytes_read = before

    def _quantize(self, read: Iterator[Chunk]) -> Iterator[tuple[str, np.ndarray]]:
        absmax = np.empty(0, np.float32)
        blocks = 0
        gathered: list[torch.Tensor] = []
        try:
            for entry, data, last in read:
                if entry.name not in self.source.quantized:
                    yield entry.name, data
                    continue
                values = torch.from_numpy(data).view(entry.dtype)
                if self.device.type != "cpu":
                    gathered.append(values.to(self.device, non_blocking=True))
                    if last:
                        yield from self._on_device(entry, torch.cat(gathered))
                        gathered.clear()
                    continue
                if not blocks:
                    absmax = np.empty(nf4.block_count(entry.numel), np.float32)
                packed = np.empty(nf4.packed_size(values.numel()), np.uint8)
                here = absmax[blocks : blocks + nf4.block_count(values.numel())]
                self.packer.pack(values, packed, here)
                _require_finite(entry, bool(np.isfinite(here).all()))
                blocks += len(here)
                yield entry.name, packed
                if last:
                    blocks = 0
                    yield from self._statistics(
                        entry,
                        quantization.serialized_statistics(
                            entry.name, torch.from_numpy(absmax), entry.shape, entry.dtype, self.section
                        ),
                    )
        finally:
            read.close()  # type: ignore[attr-defined]

    def _on_device(self, entry: TensorEntry, weight: torch.Tensor) -> Iterator[tuple[str, np.ndarray]]:
        _require_finite(entry, bool(torch.isfinite(weight).all()))
        packed, statistics = quantization.quantized_on_device(entry.name, weight.view(entry.shape), self.section)
        yield entry.name, packed.reshape(-1).view(torch.uint8).numpy()
        yield from self._statistics(entry, statistics)

    def _statistics(self, entry: TensorEntry, statistics: dict[str, torch.Tensor]) -> Iterator[tuple[str, np.ndarray]]:
        for spec in _layout(entry, self.section)[1:]:
            tensor = statistics[spec.name]
            if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
                raise RuntimeError(f"bitsandbytes made {tensor.dtype} {list(tensor.shape)}, expected {spec}")
            yield spec.name, tensor.contiguous().view(torch.uint8).numpy()


def _require_finite(entry: TensorEntry, finite: bool) -> None:
    if not finite:
        raise RunFailed(
            f"{entry.file}: {entry.name} has NaN or Inf in it, so it can't be quantized. The checkpoint is damaged, "
            "or was saved in a dtype too narrow for it."
        )


def _write_small_files(
    source: SourceCheckpoint, section: ModelSection, out: Path, shards: Shards, record: dict[str, Any]
) -> None:
    """Index, tokenizer and other files of the source, record, and config.json last."""
    write_index(out, shards)
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
