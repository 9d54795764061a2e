"""Safetensors files in chunks: read once in the order of the disk and hashed on the way.

Written with any mixture of dtypes.

Memory is a few chunks, whatever the size of a tensor. File format: 8 bytes little-endian header length, a JSON header,
tensor bytes back to back (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import queue
import struct
import threading
from collections.abc import Container, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from qvera.utils.atomic import replace_text
from qvera.utils.errors import RunFailed
from qvera.utils.files import read_at
from qvera.utils.safetensors_io import INDEX, TensorEntry, TensorSpec, read_header, torch_dtypes

if TYPE_CHECKING:
    import torch

CHUNK_BYTES = 1 << 22
"""A multiple of 64 weights of any size; small enough to stay in a cache between reading, hashing and quantizing."""
_SYNC_BYTES = 1 << 27
_ALIGNMENT = 64
T = TypeVar("T")


class Chunk(NamedTuple):
    """Consecutive bytes (uint8) of one tensor."""

    entry: TensorEntry
    data: np.ndarray
    last: bool
    """Whether the tensor ends here."""


def read_chunks(
    file: Path, wanted: Container[str], digest: hashlib._Hash | None = None, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[Chunk]:
    """The bytes of the tensors in ``wanted``, in the order of the file.

    Args:
        file: a safetensors file.
        wanted: names of tensors.
        digest: a hashlib object to be fed with the *whole* file; without one only what is wanted is read.
        chunk_bytes: most bytes of a chunk.

    Raises:
        RunFailed: the file is shorter than its header says: it changed while it was read.
    """
    entries = read_header(file)
    with open(file, "rb", buffering=0) as handle:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        if digest is not None:
            digest.update(handle.read(entries[0].start if entries else -1))
        for entry in entries:
            use = entry.name in wanted
            if not use and digest is None:
                continue
            for start in range(entry.start, entry.stop, chunk_bytes):
                stop = min(start + chunk_bytes, entry.stop)
                data = np.empty(stop - start, np.uint8)
                if not read_at(handle.fileno(), memoryview(data), start):  # type: ignore[arg-type]  # numpy's stubs
                    raise RunFailed(f"{file}: ended within {entry.name}: it changed while it was read. Run again.")
                if digest is not None:
                    digest.update(memoryview(data))  # type: ignore[arg-type]
                if use:
                    yield Chunk(entry, data, stop == entry.stop)


def write_chunks(path: Path, specs: list[TensorSpec], chunks: Iterator[tuple[str, np.ndarray]]) -> str:
    """Write one safetensors file, under a temporary name until it is whole and on the disk; returns its SHA-256.

    Args:
        path: the file.
        specs: the tensors in the order of the file.
        chunks: (tensor name, its next bytes) in that order; no more are taken than ``specs`` need, so one iterator can
            serve several files.

    Raises:
        OSError: the disk is full or gone; nothing is left behind.
    """
    names = {dtype: name for name, dtype in torch_dtypes().items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        offsets = [offset, offset + spec.size_bytes]
        header[spec.name] = {"dtype": names[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        offset = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb", buffering=0) as handle, ThreadPoolExecutor(1) as disk:
            writer = _HashingWriter(handle, disk)
            writer.write(struct.pack("<Q", len(text)) + text)
            for spec in specs:
                written = 0
                while written < spec.size_bytes:
                    name, data = next(chunks)
                    written += writer.write(data)
                    if name != spec.name or written > spec.size_bytes:
                        raise RuntimeError(f"{path.name}: got bytes of {name}, the header has {spec}")
            writer.finish()
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return writer.digest.hexdigest()


def write_shard(path: Path, specs: list[TensorSpec], tensors: Iterator[torch.Tensor]) -> str:
    """`write_chunks` of tensors; one may come in parts along its first dimension, one after the other."""
    import torch

    def chunks() -> Iterator[tuple[str, np.ndarray]]:
        for spec in specs:
            written = 0
            while written < spec.numel:
                tensor = next(tensors)
                if tensor.dtype != spec.dtype or tensor.shape[1:] != spec.shape[1:]:
                    raise RuntimeError(
                        f"{spec.name}: wrote {tensor.dtype} {tuple(tensor.shape)}, the header says otherwise"
                    )
                written += tensor.numel()
                yield spec.name, tensor.contiguous().view(-1).view(torch.uint8).numpy()

    return write_chunks(path, specs, chunks())


def write_index(directory: Path, shards: list[tuple[str, list[TensorSpec]]]) -> None:
    """The index of a sharded checkpoint; a single file needs none."""
    if len(shards) > 1:
        total = sum(spec.size_bytes for _, group in shards for spec in group)
        weight_map = {spec.name: name for name, group in shards for spec in group}
        replace_text(
            directory / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        )


class _HashingWriter:
    """Writes and hashes side by side.

    It syncs every `_SYNC_BYTES`, so that a full disk is noticed early and the end is quick.
    """

    def __init__(self, handle: io.FileIO, disk: ThreadPoolExecutor) -> None:
        self.digest = hashlib.sha256()
        self._handle, self._disk = handle, disk
        self._syncing: Future[None] | None = None
        self._unsynced_bytes = 0

    def write(self, data: bytes | np.ndarray) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]  # numpy's stubs hide that an array is a buffer
        self.digest.update(view)
        done = 0
        while done < len(view):
            done += self._handle.write(view[done:])
        self._unsynced_bytes += len(view)
        if self._unsynced_bytes > _SYNC_BYTES:
            self._wait()
            self._syncing, self._unsynced_bytes = self._disk.submit(os.fdatasync, self._handle.fileno()), 0
        return len(view)

    def _wait(self) -> None:
        if self._syncing is not None:
            self._syncing.result()

    def finish(self) -> None:
        self._wait()
        os.fsync(self._handle.fileno())


def prefetch(items: Iterable[T], depth: int) -> Generator[T, None, None]:
    """The same items, made by a thread that is up to ``depth`` of them ahead; its errors are raised here."""
    waiting: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stop = threading.Event()

    def put(kind: str, value: object = None) -> None:
        while not stop.is_set():
            try:
                return waiting.put((kind, value), timeout=0.1)
            except queue.Full:
                continue

    def make() -> None:
        try:
            for item in items:
                put("item", item)
                if stop.is_set():
                    return
            put("end")
        except BaseException as error:  # handed to the reader, whatever it is
            put("error", error)
        finally:
            if isinstance(items, Generator):
                items.close()

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while True:
            kind, value = waiting.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        stop.set()
        thread.join()
