"""Tokenized rows as an Arrow table in a file that is mapped: as many as there are, in memory that does not grow with them.

A row becomes an `Example` when it is asked for, out of the pages it lies in. What every step needs of all rows (their lengths) is
held as numbers, 25 bytes a row. Small sets have the same table in memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from qvera.data.example import Example

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("trained", pa.list_(pa.uint8())),  # a byte each, so that a row's mask is a view too
        ("prompt_ids", pa.list_(pa.int32())),
        ("source", pa.string()),
        ("prompt_text", pa.string()),
        ("reference", pa.string()),
        ("trained_tokens", pa.int32()),
        ("ids_hash", pa.uint64()),
        ("mask_hash", pa.uint64()),
    ]
)
_BATCH_ROWS = 4096
_BATCH_BYTES = 16 * 2**20


def record_batch(examples: Sequence[Example]) -> pa.RecordBatch:
    """Rows as Arrow has them."""

    def lists(arrays: list[np.ndarray], kind: Any) -> pa.Array:
        offsets = np.zeros(len(arrays) + 1, dtype=np.int32)
        np.cumsum([len(array) for array in arrays], out=offsets[1:])
        values = np.concatenate(arrays) if arrays else np.zeros(0)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, type=kind))

    columns = [
        lists([e.input_ids for e in examples], pa.int32()),
        lists([e.trained.view(np.uint8) for e in examples], pa.uint8()),
        lists([e.prompt_ids for e in examples], pa.int32()),
        pa.array([e.source for e in examples], pa.string()),
        pa.array([e.prompt_text for e in examples], pa.string()),
        pa.array([e.reference for e in examples], pa.string()),
        pa.array([e.trained_tokens for e in examples], pa.int32()),
        pa.array([_hash(e.input_ids) for e in examples], pa.uint64()),
        pa.array([_hash(e.trained) for e in examples], pa.uint64()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _hash(array: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=8).digest(), "little")


class RowWriter:
    """Writes record batches one after the other, to a file or into memory; never holds more than one batch of 16 MB.

    Args:
        path: the file; None: memory.
    """

    def __init__(self, path: Path | None) -> None:
        self._sink: Any = pa.BufferOutputStream() if path is None else pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, SCHEMA)
        self._path, self._waiting = path, list[pa.RecordBatch]()
        self.rows = 0

    def add(self, batch: pa.RecordBatch) -> None:
        """Append rows; many small batches go into few large ones, which are cheaper to keep open."""
        if not batch.num_rows:
            return
        self.rows += batch.num_rows
        self._waiting.append(batch)
        count, size = sum(b.num_rows for b in self._waiting), sum(b.nbytes for b in self._waiting)
        if count >= _BATCH_ROWS or size >= _BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        for batch in pa.Table.from_batches(self._waiting, SCHEMA).combine_chunks().to_batches():
            self._writer.write_batch(batch)
        self._waiting = []

    def close(self) -> RowTable:
        """Finish, and open what was written."""
        self._flush()
        self._writer.close()
        table = self._sink.getvalue() if self._path is None else self._path
        self._sink.close()
        return RowTable(table)

    def abandon(self) -> None:
        """Let go of the file, which is not whole."""
        self._sink.close()


class RowTable:
    """All rows of one file (or buffer) that `RowWriter` wrote.

    Raises:
        pyarrow.ArrowException, OSError: it is not such a file.
    """

    def __init__(self, where: Path | pa.Buffer) -> None:
        source = pa.memory_map(str(where)) if isinstance(where, Path) else where
        reader = pa.ipc.open_file(source)
        if not reader.schema.equals(SCHEMA):
            raise pa.ArrowInvalid("it has other columns than rows have")
        self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        counts = [batch.num_rows for batch in self._batches]
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._views: list[list[tuple[np.ndarray, np.ndarray]] | None] = [None] * len(counts)
        self.lengths = self._numbers(lambda batch: batch.column(0).value_lengths(), np.int32)
        self.trained_tokens = self._numbers(lambda batch: batch.column(6), np.int32)
        self.ids_hash = self._numbers(lambda batch: batch.column(7), np.uint64)
        self.mask_hash = self._numbers(lambda batch: batch.column(8), np.uint64)

    def _numbers(self, column: Any, dtype: Any) -> np.ndarray:
        parts = [column(batch).to_numpy(zero_copy_only=False) for batch in self._batches]
        return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def example(self, row: int) -> Example:
        """Row ``row``; its arrays are views of the mapped pages."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        batch, at = self._batches[number], row - int(self._starts[number])
        views = self._views[number]
        if views is None:
            views = self._views[number] = [_offsets_and_values(batch.column(column)) for column in range(3)]
        ids, trained, prompt = (values[offsets[at] : offsets[at + 1]] for offsets, values in views)
        source, prompt_text, reference = (batch.column(column)[at].as_py() for column in (3, 4, 5))
        return Example(ids, trained.view(bool), source, prompt, prompt_text, reference)


def _offsets_and_values(lists: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Without a copy: where each list starts, and what is in all of them."""
    return lists.offsets.to_numpy(), lists.values.to_numpy()


class Rows(Sequence[Example]):
    """A selection of rows out of tables, in order; a row may come more than once.

    Attributes:
        lengths: int32 [n]; tokens of each row.
        trained_tokens: int32 [n]; of these, the targets.
        ids_hash, mask_hash: uint64 [n]; of each row's tokens and of its mask.
    """

    def __init__(self, parts: Sequence[tuple[RowTable, np.ndarray | None]]) -> None:
        """Args: parts: tables, each with the numbers of the rows that are taken from it (None: all of them)."""
        self._parts = [(table, chosen) for table, chosen in parts if (len(table) if chosen is None else len(chosen))]
        counts = [len(table) if chosen is None else len(chosen) for table, chosen in self._parts]
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.lengths, self.trained_tokens = (
            self._numbers("lengths", np.int32),
            self._numbers("trained_tokens", np.int32),
        )
        self.ids_hash, self.mask_hash = self._numbers("ids_hash", np.uint64), self._numbers("mask_hash", np.uint64)

    def _numbers(self, name: str, dtype: Any) -> np.ndarray:
        parts = [
            getattr(table, name) if chosen is None else getattr(table, name)[chosen] for table, chosen in self._parts
        ]
        if len(parts) == 1:
            return parts[0]  # the table's own: no second copy of the commonest case
        return np.concatenate(parts) if parts else np.zeros(0, dtype)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> Example | Rows:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        row = int(index) + (len(self) if index < 0 else 0)
        if not 0 <= row < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        table, chosen = self._parts[part]
        at = row - int(self._starts[part])
        return table.example(at if chosen is None else int(chosen[at]))

    def take(self, rows: np.ndarray) -> Rows:
        """The rows of these numbers, in this order."""
        parts: list[tuple[RowTable, np.ndarray | None]] = []
        owner = np.searchsorted(self._starts, rows, side="right") - 1
        for low, high in _runs(owner):
            table, chosen = self._parts[int(owner[low])]
            own = rows[low:high] - self._starts[int(owner[low])]
            parts.append((table, own if chosen is None else chosen[own]))
        return Rows(parts)


def _runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """[low, high) of each run of equal values."""
    edges = np.flatnonzero(np.diff(values)) + 1
    bounds = [0, *edges.tolist(), len(values)] if len(values) else [0]
    yield from zip(bounds, bounds[1:], strict=False)


def joined(parts: Iterable[Rows]) -> Rows:
    """The rows of several selections, one after the other."""
    return Rows([part for rows in parts for part in rows._parts])


def rows_of(examples: Sequence[Example]) -> Rows:
    """Examples at hand as `Rows`, in memory."""
    writer = RowWriter(None)
    writer.add(record_batch(examples))
    return Rows([(writer.close(), None)])


def lengths_of(rows: Sequence[Example]) -> np.ndarray:
    """Tokens of each row, int [n]; known without a look at the rows where they are `Rows`."""
    lengths = getattr(rows, "lengths", None)
    return np.array([len(row.input_ids) for row in rows], dtype=np.int32) if lengths is None else lengths


class CutRows(Sequence[Example]):
    """Rows as they would be with fewer tokens, for a plan; without prompts."""

    def __init__(self, rows: Sequence[Example], tokens: int) -> None:
        self._rows, self._tokens = rows, tokens
        self.lengths = np.minimum(lengths_of(rows), tokens)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        row, cut = self._rows[index], self._tokens
        return dataclasses.replace(
            row, input_ids=row.input_ids[:cut], trained=row.trained[:cut], prompt_ids=np.zeros(0, np.int32), prompt_text="",
            reference=None,
        )  # fmt: skip
