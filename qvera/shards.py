"""Read a checkpoint tensor by tensor and write one the same way (safetensors), never holding more than one tensor."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from .errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


class TensorEntry(NamedTuple):
    """One tensor of a checkpoint: its name, shape, and the file that holds it."""

    name: str
    shape: tuple[int, ...]
    file: Path


def checkpoint_tensors(directory: Path) -> list[TensorEntry]:
    """All tensors of a checkpoint directory in the order they lie on disk; an index is used where there is one.

    Raises:
        InputError: a shard is missing, cut short or not safetensors, or the index names a tensor that is not there.
    """
    index = directory / INDEX
    if index.is_file():
        try:
            wanted: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise InputError(f"{index}: not a safetensors index ({type(error).__name__}: {error}).") from None
        files = [directory / name for name in sorted(set(wanted.values()))]
    else:
        wanted, files = {}, sorted(directory.glob("*.safetensors"))
    entries: list[TensorEntry] = []
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: this shard is named in {index.name} but is missing.")
        try:
            with safe_open(file, framework="pt") as reader:
                entries += [TensorEntry(k, tuple(reader.get_slice(k).get_shape()), file) for k in reader.offset_keys()]
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: not a readable safetensors file, or cut short ({error}).") from None
    if wanted:
        missing = sorted(wanted.keys() - {e.name for e in entries})
        if missing:
            raise InputError(f"{index}: names {missing[0]} (and {len(missing) - 1} more), which no shard holds.")
    if not entries:
        raise InputError(f"{directory}: has no *.safetensors weights.")
    return entries


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """The tensor's values; the file is mapped, so only its own pages are read."""
    with safe_open(entry.file, framework="pt") as reader:
        return reader.get_tensor(entry.name)


def plan_shards(entries: list[TensorEntry], dtype: torch.dtype, max_bytes: int) -> list[tuple[str, list[TensorEntry]]]:
    """File name and tensors of each output shard, none above ``max_bytes`` unless one tensor alone is."""
    groups: list[list[TensorEntry]] = [[]]
    filled = 0
    for entry in entries:
        size = _elements(entry.shape) * dtype.itemsize
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += size
    if len(groups) == 1:
        return [(SINGLE, groups[0])]
    return [(f"model-{i:05d}-of-{len(groups):05d}.safetensors", g) for i, g in enumerate(groups, start=1)]


def write_shard(path: Path, entries: list[TensorEntry], dtype: torch.dtype, tensors: Iterator[torch.Tensor]) -> str:
    """Write one safetensors file as ``tensors`` yields them, under a temporary name until it is whole; returns its SHA-256.

    File format: 8 bytes little-endian header length, JSON header, tensor bytes back to back
    (https://github.com/huggingface/safetensors#format).
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        size = _elements(entry.shape) * dtype.itemsize
        header[entry.name] = {
            "dtype": _NAMES[dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    digest = hashlib.sha256()
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as handle:
        for piece in (struct.pack("<Q", len(text)), text):
            handle.write(piece)
            digest.update(piece)
        for entry, tensor in zip(entries, tensors, strict=True):
            if tuple(tensor.shape) != entry.shape or tensor.dtype != dtype:
                raise RuntimeError(
                    f"{entry.name}: wrote {tensor.dtype} {tuple(tensor.shape)}, the header says otherwise"
                )
            data: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
            handle.write(data)
            digest.update(data)
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(path)
    return digest.hexdigest()


def write_index(directory: Path, shards: list[tuple[str, list[TensorEntry]]], dtype: torch.dtype) -> None:
    """The index of a sharded checkpoint; a single file needs none."""
    if len(shards) == 1:
        return
    total = sum(_elements(e.shape) * dtype.itemsize for _, group in shards for e in group)
    document = {
        "metadata": {"total_size": total},
        "weight_map": {e.name: name for name, group in shards for e in group},
    }
    (directory / INDEX).write_text(json.dumps(document, indent=2), encoding="utf-8")


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count
