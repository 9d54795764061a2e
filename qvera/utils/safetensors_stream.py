"""Safetensors files in pieces: read once in the order of the disk, hashed on the way; written with any mixture of dtypes.

Memory is a few pieces, whatever the size of a tensor. File format: 8 bytes little-endian header length, a JSON header, tensor
bytes back to back (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import struct
import threading
from collections.abc import Container, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from qvera.utils.atomic import replace_text
from qvera.utils.checkpoint_index import INDEX
from qvera.utils.errors import RunFailed
from qvera.utils.safetensors_io import DTYPE_NAMES, Spec, Stored, read_header

PIECE_BYTES = 1 << 22
"""A multiple of 64 weights of any size; small enough to stay in a cache between reading, hashing and quantizing."""
_SYNC_BYTES = 1 << 27
_ALIGNMENT = 64
T = TypeVar("T")


class Piece(NamedTuple):
    """Consecutive bytes of one tensor."""

    stored: Stored
    data: np.ndarray
    last: bool


def read_pieces(
    file: Path, wanted: Container[str], digest: Any = None, piece_bytes: int = PIECE_BYTES
) -> Iterator[Piece]:
    """The bytes of the tensors in ``wanted``, in the order of the file.

    Args:
        digest: a hashlib object to be fed with the *whole* file; without one only what is wanted is read.

    Raises:
        RunFailed: the file ended before its header's promise: it changed while it was read.
    """
    tensors = read_header(file)
    with open(file, "rb", buffering=0) as handle:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        if digest is not None:
            digest.update(handle.read(tensors[0].start if tensors else -1))
        for stored in tensors:
            use = stored.spec.name in wanted
            if not use and digest is None:
                continue
            handle.seek(stored.start)
            for start in range(stored.start, stored.stop, piece_bytes):
                stop = min(start + piece_bytes, stored.stop)
                data = np.empty(stop - start, np.uint8)
                view, filled = memoryview(data), 0  # type: ignore[arg-type]
                while filled < len(data):
                    got = handle.readinto(view[filled:])
                    if not got:
                        raise RunFailed(
                            f"{file}: ended within {stored.spec.name}: it changed while it was read. Run again."
                        )
                    filled += got
                if digest is not None:
                    digest.update(data)
                if use:
                    yield Piece(stored, data, stop == stored.stop)


def write_pieces(path: Path, specs: list[Spec], pieces: Iterator[tuple[str, Any]]) -> str:
    """Write one safetensors file, under a temporary name until it is whole and on the disk; returns its SHA-256.

    Args:
        specs: the tensors in the order of the file.
        pieces: (tensor name, buffer) in that order; no more are taken than ``specs`` need, so one iterator can serve
            several files.

    Raises:
        OSError: the disk is full or gone; nothing is left behind.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        stop = offset + spec.size_bytes
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb", buffering=0) as handle, ThreadPoolExecutor(1) as disk:
            sink = _Sink(handle, disk)
            sink.write(struct.pack("<Q", len(text)) + text)
            for spec in specs:
                written = 0
                while written < spec.size_bytes:
                    name, data = next(pieces)
                    written += sink.write(data)
                    if name != spec.name or written > spec.size_bytes:
                        raise RuntimeError(f"{path.name}: got bytes of {name}, the header has {spec}")
            sink.finish()
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return sink.digest.hexdigest()


def write_shard(path: Path, specs: list[Spec], tensors: Iterator[torch.Tensor]) -> str:
    """`write_pieces` of tensors; one may come in pieces along its first dimension, one after the other."""

    def pieces() -> Iterator[tuple[str, Any]]:
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

    return write_pieces(path, specs, pieces())


def write_index(directory: Path, shards: list[tuple[str, list[Spec]]]) -> None:
    """The index of a sharded checkpoint; a single file needs none."""
    if len(shards) > 1:
        total = sum(spec.size_bytes for _, group in shards for spec in group)
        weight_map = {spec.name: name for name, group in shards for spec in group}
        replace_text(
            directory / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        )


class _Sink:
    """Writes and hashes side by side, and keeps what waits for the disk small: a full disk speaks early, fsync is short."""

    def __init__(self, handle: Any, disk: ThreadPoolExecutor) -> None:
        self.digest = hashlib.sha256()
        self._handle, self._disk = handle, disk
        self._behind: Future[None] | None = None
        self._unsynced = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.digest.update(view)
        done = 0
        while done < len(view):
            done += self._handle.write(view[done:])
        self._unsynced += len(view)
        if self._unsynced > _SYNC_BYTES:
            self._wait()
            self._behind, self._unsynced = self._disk.submit(os.fdatasync, self._handle.fileno()), 0
        return len(view)

    def _wait(self) -> None:
        if self._behind is not None:
            self._behind.result()

    def finish(self) -> None:
        self._wait()
        os.fsync(self._handle.fileno())


def ahead(items: Iterable[T], depth: int) -> Generator[T, None, None]:
    """The same items, made by a thread that is up to ``depth`` of them ahead; its errors are raised here."""
    waiting: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stop = threading.Event()

    def put(kind: str, value: Any = None) -> None:
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
