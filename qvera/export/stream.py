"""The base's shards, read once from start to end: every byte goes into its file's SHA-256 on the way to the merge."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from qvera.config.schema import ModelSection
from qvera.export.pipeline import empty_bytes
from qvera.export.roundtrip import RoundTrip, absolute_maxima, row_step
from qvera.utils.errors import InputError, RunFailed
from qvera.utils.files import file_stamp, read_at
from qvera.utils.safetensors_io import TensorEntry

BLOCK_ELEMENTS = 1 << 20
"""Elements of a block of rows: its fp32 temporaries stay in the processor's cache."""


@dataclasses.dataclass
class Block:
    """Rows [first, first + k) of a tensor, in the dtype in which they are stored."""

    entry: TensorEntry
    first: int
    rows: torch.Tensor
    last: bool
    """Whether the tensor ends here."""
    trip: RoundTrip | None
    """How the trained base had quantized it; None where the stored numbers themselves are wanted."""
    transposed: bool = False
    """A Conv1D's [in, out], which is quantized as [out, in]; it comes whole where it has a ``trip``."""


class Source:
    """Reads the tensors of a checkpoint in order.

    Args:
        entries: all of them, in the order they lie on disk.
        known: file name → SHA-256, where an earlier run read all of it.
        trip: how the base was quantized, and in which compute dtype; None to take the weights as they are.
        quantized: names of the weights that were; transposed: those of Conv1D, quantized as [out, in].
    """

    def __init__(
        self,
        entries: list[TensorEntry],
        known: dict[str, str],
        trip: tuple[ModelSection, torch.dtype] | None = None,
        quantized: Collection[str] = (),
        transposed: Collection[str] = (),
    ) -> None:
        self.files = list(dict.fromkeys(e.file for e in entries))
        self.entries, self.sha256 = entries, dict(known)
        self.trip, self.quantized, self.transposed = trip, quantized, transposed
        for entry in entries:
            if not entry.dtype.is_floating_point:
                raise InputError(f"{entry.file}: {entry.name} is {entry.dtype}, expected a floating-point weight.")

    def blocks(self, skip: Collection[str]) -> Iterator[Block]:
        """Every tensor in blocks of rows; those named in ``skip`` are only hashed, and not even that where it is known.

        Raises:
            RunFailed: a file changed or ended while it was read.
        """
        for file in self.files:
            wanted = [e for e in self.entries if e.file == file]
            known = file.name in self.sha256
            if known and all(e.name in skip for e in wanted):
                continue
            with open(file, "rb") as handle:
                before = file_stamp(os.fstat(handle.fileno()))
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                digest = None if known else hashlib.sha256(handle.read(wanted[0].start))
                for entry in wanted:
                    if known and entry.name in skip:
                        continue
                    for block in self._rows(handle.fileno(), entry, entry.name in skip):
                        if digest is not None:
                            data: Any = block.rows.view(-1).view(torch.uint8).numpy()
                            digest.update(data)
                        if entry.name not in skip:
                            yield block
                if file_stamp(os.fstat(handle.fileno())) != before:
                    raise RunFailed(
                        f"{file}: was changed while it was read. Run the same command again when it is at rest."
                    )
            if digest is not None:
                self.sha256[file.name] = digest.hexdigest()

    def _rows(self, descriptor: int, entry: TensorEntry, hash_only: bool) -> Iterator[Block]:
        if entry.start == entry.stop:
            return
        count = entry.shape[0] if entry.shape else 1
        row_bytes = (entry.stop - entry.start) // count
        columns = row_bytes // entry.dtype.itemsize
        step = max(1, BLOCK_ELEMENTS // columns)
        trip = None
        if self.trip is not None and not hash_only:
            section, compute = self.trip
            if entry.name in self.transposed:
                step = count
            unit = row_step(columns, section)
            step = max(unit, step // unit * unit)
            if entry.name in self.quantized and section.quantization in ("nf4", "fp4"):
                found = []
                for first in range(0, count, step):
                    rows = self._read(descriptor, entry, first, min(step, count - first), row_bytes)
                    if entry.name in self.transposed:  # quantized while loading, from weights in the compute dtype
                        rows = rows.to(compute).t().contiguous()
                    found.append(absolute_maxima(rows))
                trip = RoundTrip(section, torch.cat(found), compute)
            elif entry.name in self.quantized:
                trip = RoundTrip(section, None, compute)
        for first in range(0, count, step):
            rows = self._read(descriptor, entry, first, min(step, count - first), row_bytes)
            yield Block(entry, first, rows, first + step >= count, trip, entry.name in self.transposed)

    def _read(self, descriptor: int, entry: TensorEntry, first: int, count: int, row_bytes: int) -> torch.Tensor:
        data, buffer = empty_bytes(count * row_bytes)
        if not read_at(descriptor, buffer, entry.start + first * row_bytes):
            raise RunFailed(
                f"{entry.file}: ended within {entry.name} while it was read. Run the same command again when it is whole."
            )
        return data.view(entry.dtype).view(count, *entry.shape[1:]) if entry.shape else data.view(entry.dtype).view(())


def stamps(entries: list[TensorEntry]) -> dict[str, list[int]]:
    """File → `file_stamp` of a checkpoint's files."""
    files: dict[str, Path] = {str(e.file.resolve()): e.file for e in entries}
    return {name: file_stamp(file.stat()) for name, file in sorted(files.items())}
