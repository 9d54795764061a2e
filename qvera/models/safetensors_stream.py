"""Checkpoints larger than memory: read in blocks of rows, computed in order by several threads, written in blocks.

Each file is read or written once, in the order of its bytes, and hashed on the way. Memory is a few blocks.
"""

import collections
import hashlib
import itertools
import json
import math
import os
import struct
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import torch

from qvera.utils.errors import RunFailed
from qvera.utils.files import file_stamp, read_at, replace_text
from qvera.utils.safetensors_io import INDEX, TensorEntry, TensorSpec, torch_dtypes

FILE_BLOCK_ELEMENTS = 1 << 20
"""Elements of a block of rows: its fp32 temporaries stay in the processor's cache."""
_SYNC_BYTES = 1 << 27
_ALIGNMENT = 64
In = TypeVar("In")
Out = TypeVar("Out")


class Block(NamedTuple):
    """Rows [first, first + k) of a tensor, in the dtype of the file."""

    entry: TensorEntry
    first: int
    rows: torch.Tensor
    last: bool
    absmax: torch.Tensor | None = None
    """Quantization scales of the whole tensor, from a reader that computes them first."""


def rows_per_block(columns: int, blocksize: int = 64) -> int:
    """Rows of ``columns`` elements in a block: whole quantization blocks of ``blocksize`` elements."""
    unit = blocksize // math.gcd(blocksize, columns)
    return max(1, FILE_BLOCK_ELEMENTS // columns // unit) * unit


class CheckpointReader:
    """Reads the tensors of a checkpoint in order: ``entries`` are all of them, as they lie on disk.

    ``stamps`` is file name → `file_stamp`. ``sha256`` has the ``known`` hashes, and those of files that were read
    whole.
    """

    def __init__(self, entries: list[TensorEntry], stamps: dict[str, list[int]], known: dict[str, str]) -> None:
        self.entries, self.stamps, self.sha256 = entries, stamps, dict(known)

    def blocks(self, skip: Collection[str]) -> Iterator[Block]:
        """Every tensor in blocks of rows; those in ``skip`` are only hashed. Raises RunFailed if a file changes."""
        for file, group in itertools.groupby(self.entries, key=lambda entry: entry.file):
            entries, known = list(group), file.name in self.sha256
            if known and all(entry.name in skip for entry in entries):
                continue
            with open(file, "rb", buffering=0) as handle:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                # a file is hashed as its tensors come by, in the order of its bytes, header first
                digest = None if known else hashlib.sha256(handle.read(entries[0].start))
                for entry in entries:
                    if entry.name not in skip:
                        blocks = self.blocks_of(handle.fileno(), entry)
                    elif digest is not None:
                        blocks = self.read(handle.fileno(), entry)
                    else:
                        continue
                    for block in blocks:
                        if digest is not None:
                            digest.update(_bytes_of(block.rows))
                        if entry.name not in skip:
                            yield block
                require_unchanged(handle, self.stamps)
            if digest is not None:
                self.sha256[file.name] = digest.hexdigest()

    def blocks_of(self, descriptor: int, entry: TensorEntry) -> Iterator[Block]:
        """The blocks of a tensor that is not skipped. A subclass may read it in another way."""
        return self.read(descriptor, entry)

    def read(self, descriptor: int, entry: TensorEntry, whole: bool = False) -> Iterator[Block]:
        """The rows of a tensor, ``whole`` in one block or in several."""
        if not entry.numel:
            return
        count = entry.shape[0] if entry.shape else 1
        step = count if whole else rows_per_block(entry.numel // count)
        row_bytes = entry.size_bytes // count
        for first in range(0, count, step):
            size = min(step, count - first)
            data = read_bytes(descriptor, entry, first * row_bytes, size * row_bytes)
            rows = data.view(entry.dtype).view((size, *entry.shape[1:]) if entry.shape else ())
            yield Block(entry, first, rows, first + size == count)


def read_bytes(descriptor: int, entry: TensorEntry, first: int, count: int) -> torch.Tensor:
    """Bytes [first, first + count) of a tensor in a file, uint8. Raises RunFailed if the file ends before."""
    data = torch.empty(count, dtype=torch.uint8)
    if not read_at(descriptor, data.numpy().data, entry.start + first):
        raise RunFailed(f"{entry.file}: {entry.name} ended while it was read. Run again when it is whole.")
    return data


def read_tensor(entry: TensorEntry, stamps: Mapping[str, list[int]], number: int | None = None) -> torch.Tensor:
    """A tensor, or element ``number`` of its first dimension. RunFailed: its file has changed or ended."""
    shape = entry.shape if number is None else entry.shape[1:]
    count = math.prod(shape) * entry.dtype.itemsize
    with open(entry.file, "rb", buffering=0) as handle:
        require_unchanged(handle, stamps)
        data = read_bytes(handle.fileno(), entry, (number or 0) * count, count)
    return data.view(entry.dtype).view(shape)


def require_unchanged(handle: FileIO, stamps: Mapping[str, list[int]]) -> None:
    """Raise RunFailed if a file is not as it was when ``stamps`` were taken: file name → `file_stamp`."""
    if file_stamp(os.fstat(handle.fileno())) != stamps[os.path.basename(handle.name)]:
        raise RunFailed(f"{handle.name}: changed while it was read. Run again when it is at rest.")


def in_order(
    items: Iterator[In], compute: Callable[[In], Out], workers: int, waiting: int
) -> Generator[Out, None, None]:
    """``compute`` of each item, in order, by ``workers`` threads, while another thread draws the items.

    An error is raised where its result would come. Closing the iterator stops the threads. At most ``waiting`` items
    are drawn and not yet consumed, which bounds memory.
    """
    with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(workers, "compute") as pool:

        def draw() -> Future[Out] | None:
            item = next(items, None)
            return None if item is None else pool.submit(compute, item)

        drawn = collections.deque(reader.submit(draw) for _ in range(waiting))
        try:
            while (future := drawn.popleft().result()) is not None:
                yield future.result()
                drawn.append(reader.submit(draw))
        finally:
            reader.shutdown(cancel_futures=True)
            pool.shutdown(cancel_futures=True)


def packed_header(specs: Sequence[TensorSpec], metadata: Mapping[str, str] = MappingProxyType({})) -> bytes:
    """Return the first bytes of a safetensors file: the length of its header, and the header."""
    names = {dtype: name for name, dtype in torch_dtypes().items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for spec in specs:
        offsets = [offset, offset + spec.size_bytes]
        header[spec.name] = {"dtype": names[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        offset = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def write_shard(
    path: Path,
    specs: list[TensorSpec],
    tensors: Iterator[torch.Tensor],
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Write one safetensors file, under a temporary name until it is whole and on the disk; returns its SHA-256.

    ``tensors`` are the values of ``specs`` in their order; one may come in parts along its first dimension. No more are
    taken than ``specs`` need, so one iterator can serve several files. An OSError leaves nothing behind.
    """
    partial = path.with_name(f".{path.name}.partial")
    digest = hashlib.sha256()
    try:
        with open(partial, "wb", buffering=0) as handle, ThreadPoolExecutor(1) as disk:
            syncing, unsynced_bytes = disk.submit(os.fdatasync, handle.fileno()), 0
            for data in itertools.chain([memoryview(packed_header(specs, metadata))], _values(specs, tensors)):
                digest.update(data)
                done = 0
                while done < len(data):
                    done += handle.write(data[done:])
                unsynced_bytes += len(data)
                if unsynced_bytes > _SYNC_BYTES:  # so a full disk is noticed early, and the end is quick
                    syncing.result()
                    syncing, unsynced_bytes = disk.submit(os.fdatasync, handle.fileno()), 0
            syncing.result()
            os.fsync(handle.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def _values(specs: list[TensorSpec], tensors: Iterator[torch.Tensor]) -> Iterator[memoryview]:
    for spec in specs:
        written = 0
        while written < spec.numel:
            tensor = next(tensors)
            written += tensor.numel()
            if tensor.dtype != spec.dtype or tensor.shape[1:] != spec.shape[1:] or written > spec.numel:
                raise RuntimeError(f"{spec.name}: got {tensor.dtype} {tuple(tensor.shape)}, the header has {spec}")
            yield _bytes_of(tensor)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def write_index(directory: Path, shards: list[tuple[str, list[TensorSpec]]]) -> None:
    """The index of a sharded checkpoint; a single file needs none."""
    if len(shards) > 1:
        total = sum(spec.size_bytes for _, group in shards for spec in group)
        weight_map = {spec.name: name for name, group in shards for spec in group}
        document = {"metadata": {"total_size": total}, "weight_map": weight_map}
        replace_text(directory / INDEX, json.dumps(document, indent=2))
