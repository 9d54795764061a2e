"""The tensors of a checkpoint directory, and writing one shard at a time from tensors or blocks of their rows (safetensors)."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from .errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_NUMBERED = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors$")
_SYNC_BYTES = 128 << 20
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
        wanted, files = {}, _unindexed(directory)
    entries: list[TensorEntry] = []
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: this shard is named in {index.name} but is missing.")
        try:
            with safe_open(file, framework="pt") as reader:
                entries += [TensorEntry(k, tuple(reader.get_slice(k).get_shape()), file) for k in reader.offset_keys()]
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{file}: not a readable safetensors file, or cut short ({error}). Fetch this file again."
            ) from None
    if wanted:
        missing = sorted(wanted.keys() - {e.name for e in entries})
        if missing:
            raise InputError(f"{index}: names {missing[0]} (and {len(missing) - 1} more), which no shard holds.")
    if not entries:
        raise InputError(f"{directory}: has no *.safetensors weights.")
    holders: dict[str, Path] = {}
    for entry in entries:
        if holders.setdefault(entry.name, entry.file) != entry.file:
            raise InputError(
                f"{directory}: both {holders[entry.name].name} and {entry.file.name} hold {entry.name}. Leave only the files of "
                "one checkpoint there, or an index."
            )
    return entries


def _unindexed(directory: Path) -> list[Path]:
    """Weight files where no index names them: the single file, else all, of which a numbered set must be whole."""
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    files = sorted(directory.glob("*.safetensors"))
    numbered = [m for f in files if (m := _NUMBERED.match(f.name))]
    there = {m[0] for m in numbered}
    for stem, total in {(m[1], m[3]) for m in numbered}:
        for number in range(1, int(total) + 1):
            name = f"{stem}-{number:0{len(total)}d}-of-{total}.safetensors"
            if name not in there:
                raise InputError(
                    f"{directory / name}: this shard of {int(total)} is missing, and there is no {INDEX}. Fetch it."
                )
    return files


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

    A tensor may come in pieces along its first dimension, one after the other. No more is taken than fits into ``entries``,
    so one iterator can serve several files.

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
    try:
        with open(partial, "wb") as handle, ThreadPoolExecutor(1) as disk:
            behind: Future[None] | None = None
            unsynced = 0
            for piece in (struct.pack("<Q", len(text)), text):
                handle.write(piece)
                digest.update(piece)
            for entry in entries:
                written, count = 0, _elements(entry.shape)
                while written < count:
                    tensor = next(tensors)
                    if tensor.dtype != dtype or tensor.shape[1:] != entry.shape[1:]:
                        raise RuntimeError(
                            f"{entry.name}: wrote {tensor.dtype} {tuple(tensor.shape)}, the header says otherwise"
                        )
                    data: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
                    handle.write(data)
                    digest.update(data)
                    written += tensor.numel()
                    unsynced += data.nbytes
                    if unsynced > _SYNC_BYTES and (behind is None or behind.done()):
                        # on its way to the disk while the next pieces are made; the fsync at the end then has little left
                        if behind is not None:
                            behind.result()  # a disk that filled up meanwhile speaks here
                        handle.flush()
                        behind, unsynced = disk.submit(os.fdatasync, handle.fileno()), 0
                if written != count:
                    raise RuntimeError(f"{entry.name}: wrote {written} elements, the header says {count}")
            if behind is not None:
                behind.result()
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
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
