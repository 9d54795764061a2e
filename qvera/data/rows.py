"""Tokenized rows: what one is, and many of them in an Arrow table that is memory-mapped.

A data set may exceed RAM: a row becomes an `Example` when it is asked for, as views of the mapped pages. Only the
lengths, counts and hashes of all rows are held, 24 bytes a row. Small sets have the same table in memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

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


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One tokenized row.

    Attributes:
        input_ids: int32 [T].
        trained: bool [T]; ``trained[i]``: token i is a target (the logits at i - 1 are trained to give it). The first
            token has nothing before it, so it never is one.
        source: where the row came from, for messages.
        prompt_ids: int32 [P]; what the last assistant turn is generated from, BOS included. Empty for plain text and
            for rows that do not end with an assistant turn.
        prompt_text: the same as text (without a BOS that the tokenizer itself would add).
        reference: the content of that last assistant turn, or None.
    """

    input_ids: np.ndarray
    trained: np.ndarray
    source: str
    prompt_ids: np.ndarray
    prompt_text: str
    reference: str | None

    @property
    def trained_tokens(self) -> int:
        """How many tokens are targets."""
        return int(self.trained.sum())


def record_batch(examples: Sequence[Example]) -> pa.RecordBatch:
    """Rows as an Arrow record batch of `SCHEMA`."""

    def lists(arrays: list[np.ndarray], kind: pa.DataType) -> pa.Array:
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


class RowTable:
    """All rows of some record batches of `SCHEMA`, by number.

    Attributes:
        lengths: int32 [n]; tokens of each row.
        trained_tokens: int32 [n]; of these, the targets.
        ids_hash, mask_hash: uint64 [n]; of each row's tokens and of its mask.

    Raises:
        pyarrow.ArrowException: the batches have other columns.
    """

    def __init__(self, batches: Iterable[pa.RecordBatch] = ()) -> None:
        self.batches = list(batches)
        table = pa.Table.from_batches(self.batches, SCHEMA)
        self.lengths: np.ndarray = pc.list_value_length(table["input_ids"]).to_numpy()
        self.trained_tokens: np.ndarray = table["trained_tokens"].to_numpy()
        self.ids_hash: np.ndarray = table["ids_hash"].to_numpy()
        self.mask_hash: np.ndarray = table["mask_hash"].to_numpy()
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self.batches)])
        self._views: list[list[tuple[np.ndarray, np.ndarray]] | None] = [None] * len(self.batches)

    @classmethod
    def open(cls, where: Path | pa.Buffer) -> RowTable:
        """Map the file that `write_table` wrote (or read such a buffer).

        Raises:
            pyarrow.ArrowException, OSError: it is not such a file.
        """
        reader = pa.ipc.open_file(pa.memory_map(str(where)) if isinstance(where, Path) else where)
        return cls(reader.get_batch(number) for number in range(reader.num_record_batches))

    def __len__(self) -> int:
        return len(self.lengths)

    def example(self, row: int) -> Example:
        """Row ``row``; its arrays are views of the mapped pages."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        batch, at = self.batches[number], row - int(self._starts[number])
        views = self._views[number]
        if views is None:
            lists = (batch.column(name) for name in ("input_ids", "trained", "prompt_ids"))
            views = self._views[number] = [(column.offsets.to_numpy(), column.values.to_numpy()) for column in lists]
        ids, trained, prompt = (values[offsets[at] : offsets[at + 1]] for offsets, values in views)
        source, prompt_text, reference = (batch[name][at].as_py() for name in ("source", "prompt_text", "reference"))
        return Example(ids, trained.view(bool), source, prompt, prompt_text, reference)


def write_table(batches: Iterable[pa.RecordBatch], path: Path | None) -> RowTable:
    """Write record batches to a file (None: into memory) and open it; at most one batch of 16 MB is held.

    Many small batches go into few large ones, which are cheaper to keep open.
    """
    waiting: list[pa.RecordBatch] = []
    with pa.BufferOutputStream() if path is None else pa.OSFile(str(path), "wb") as sink:
        with pa.ipc.new_file(sink, SCHEMA) as writer:
            for batch in batches:
                waiting += [batch] if batch.num_rows else []
                if sum(b.num_rows for b in waiting) >= _BATCH_ROWS or sum(b.nbytes for b in waiting) >= _BATCH_BYTES:
                    writer.write_table(pa.Table.from_batches(waiting, SCHEMA).combine_chunks())
                    waiting = []
            if waiting:
                writer.write_table(pa.Table.from_batches(waiting, SCHEMA).combine_chunks())
        return RowTable.open(sink.getvalue() if path is None else path)


class Rows(Sequence[Example]):
    """A selection of a table's rows, in order; a row may come more than once.

    Args:
        table: the rows.
        chosen: int64 [n]; the numbers of the rows that are taken. None: all of them.

    Attributes:
        lengths, trained_tokens, ids_hash, mask_hash: as `RowTable` has them, of the chosen rows.
    """

    def __init__(self, table: RowTable, chosen: np.ndarray | None = None) -> None:
        self._table, self._chosen = table, chosen
        self.lengths, self.trained_tokens, self.ids_hash, self.mask_hash = (
            column if chosen is None else column[chosen]
            for column in (table.lengths, table.trained_tokens, table.ids_hash, table.mask_hash)
        )

    def __len__(self) -> int:
        return len(self.lengths)

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
        return self._table.example(row if self._chosen is None else int(self._chosen[row]))

    def take(self, rows: np.ndarray) -> Rows:
        """The rows of these numbers, in this order."""
        return Rows(self._table, rows if self._chosen is None else self._chosen[rows])


def concatenated(tables: Sequence[RowTable], chosen: Sequence[np.ndarray | None]) -> Rows:
    """The chosen rows of several tables (None: all of a table), one table after the other."""
    if len(tables) == 1:
        return Rows(tables[0], chosen[0])
    whole = RowTable(batch for table in tables for batch in table.batches)
    if all(rows is None for rows in chosen):
        return Rows(whole)
    starts = np.cumsum([0, *map(len, tables)])
    parts = [np.arange(len(t)) if rows is None else rows for t, rows in zip(tables, chosen, strict=True)]
    return Rows(whole, np.concatenate([start + rows for start, rows in zip(starts[:-1], parts, strict=True)]))


def lengths_of(rows: Sequence[Example]) -> np.ndarray:
    """Tokens of each row, int [n]; known without reading the rows where they are `Rows`."""
    lengths = getattr(rows, "lengths", None)
    return np.array([len(row.input_ids) for row in rows], dtype=np.int32) if lengths is None else lengths


class CutRows(Sequence[Example]):
    """Rows as they would be with fewer tokens and without prompts, for a plan."""

    def __init__(self, rows: Sequence[Example], tokens: int) -> None:
        self._rows, self._tokens = rows, tokens
        self.lengths = np.minimum(lengths_of(rows), tokens)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> CutRows: ...
    def __getitem__(self, index: int | slice) -> Example | CutRows:
        if isinstance(index, slice):
            return CutRows(self._rows[index], self._tokens)
        row, cut = self._rows[index], self._tokens
        ids, trained = row.input_ids[:cut], row.trained[:cut]
        return dataclasses.replace(
            row, input_ids=ids, trained=trained, prompt_ids=np.zeros(0, np.int32), prompt_text="", reference=None
        )
