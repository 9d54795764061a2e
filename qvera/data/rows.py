"""Tokenized rows: what one is, and many of them in an Arrow table that is memory-mapped.

A data set may exceed RAM: a row becomes an `Example` when it is asked for, as views of the mapped pages. Only the
lengths, counts and hashes of all rows are held, 24 bytes a row.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qvera.data.image_processor import ImageProcessor, StoredImage

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
        ("owner", pa.string()),
        ("pair_start", pa.int32()),
        ("image", pa.large_binary()),  # a chunk of large images is more than 2 GiB
        ("rejected_ids", pa.list_(pa.int32())),
        ("desirable", pa.bool_()),
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
        reference: the content of that last assistant turn, or None. Of a labelled row its label.
        owner: the task or adapter that the row belongs to (its value of ``data.task_column`` or
            ``data.adapter_column``), or None.
        pair_start: of a labelled pair of texts the first token of the second, where the model is told so.
        rejected_ids: of a preference pair, int32 [R]: the tokens of the worse answer. They follow the same prompt as
            the better one's, which are the trained ones of ``input_ids``. None for any other row.
        desirable: of a row whose one answer was judged, whether it is a good one; None for any other row.
        image: of a labelled image. ``input_ids`` then has a 0 for each patch, and ``prompt_text`` the path of its file,
            if it has one.
    """

    input_ids: np.ndarray
    trained: np.ndarray
    source: str
    prompt_ids: np.ndarray
    prompt_text: str
    reference: str | None
    owner: str | None = None
    pair_start: int | None = None
    rejected_ids: np.ndarray | None = None
    desirable: bool | None = None
    image: StoredImage | None = None

    @property
    def is_labelled(self) -> bool:
        """Whether the row is a text or an image with a label: its last token stands for its one target."""
        return self.reference is not None and not len(self.prompt_ids)

    @property
    def trained_tokens(self) -> int:
        """How many tokens are targets; of a pair, those of both answers."""
        return int(self.trained.sum()) + (0 if self.rejected_ids is None else len(self.rejected_ids))

    @property
    def row_tokens(self) -> list[int]:
        """How many tokens the row has that a forward pass computes; of a pair, each of its two rows."""
        own = len(self.input_ids)
        return [own] if self.rejected_ids is None else [own, self.answer_start + len(self.rejected_ids)]

    def shown(self) -> list[tuple[str, Example]]:
        """The row as a person should see it, with a word for its targets; of a pair, each of its two rows."""
        if self.rejected_ids is None:
            word = {None: "trained", True: "good answer", False: "bad answer"}[self.desirable]
            return [(word, self)]
        ids = np.append(self.input_ids[: self.answer_start], self.rejected_ids)
        chosen = dataclasses.replace(self, rejected_ids=None)
        rejected = dataclasses.replace(chosen, input_ids=ids, trained=np.arange(len(ids)) >= self.answer_start)
        return [("chosen", chosen), ("rejected", rejected)]

    @property
    def answer_start(self) -> int:
        """The place of the first target: of a preference row the length of its prompt."""
        return int(np.argmax(self.trained))


_FIELDS = [field.name for field in dataclasses.fields(Example)]


def record_batch(examples: Sequence[Example]) -> pa.RecordBatch:
    """Rows as an Arrow record batch of `SCHEMA`."""
    rows = [
        {
            **{name: getattr(example, name) for name in _FIELDS},
            "trained": example.trained.view(np.uint8),
            "trained_tokens": example.trained_tokens,
            "image": None if example.image is None else example.image.stored_bytes,
            "ids_hash": _hash(_content(example)),
            "mask_hash": _hash(example.trained.tobytes(), _label(example)),
        }
        for example in examples
    ]
    return pa.RecordBatch.from_pylist(rows, schema=SCHEMA)


def _content(example: Example) -> bytes:
    if example.image is not None:
        return example.image.read_bytes()
    return np.concatenate([row.input_ids for _, row in example.shown()]).tobytes()


def _label(example: Example) -> str | None:
    if example.desirable is not None:
        return str(example.desirable)
    return example.reference if example.is_labelled else None


def _hash(content: bytes, label: str | None = None) -> int:
    content += (label or "").encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def write_table(batches: Iterable[pa.RecordBatch], path: Path) -> Rows:
    """Write record batches to a file and map it; at most one batch of 16 MB is held.

    Many small batches go into few large ones, which are cheaper to keep open.
    """
    waiting: list[pa.RecordBatch] = []
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for batch in batches:
            waiting.append(batch)
            if sum(b.num_rows for b in waiting) >= _BATCH_ROWS or sum(b.nbytes for b in waiting) >= _BATCH_BYTES:
                writer.write_table(pa.Table.from_batches(waiting, SCHEMA).combine_chunks())
                waiting = []
        writer.write_table(pa.Table.from_batches(waiting, SCHEMA).combine_chunks())
    return Rows.open(path)


class Rows(Sequence[Example]):
    """A selection of a table's rows, in order; a row may come more than once.

    Args:
        table: of `SCHEMA`.
        chosen: int64 [n]; the numbers of the rows that are taken. None: all of them.
        max_tokens: give each row as it would be with at most so many tokens and without a prompt.
        task_of: int64 [n]; the number of each row's task, where the run has tasks (`qvera.data.sampling_by_task`).
        processor: of images; it makes their pixel values.

    Attributes:
        lengths: int32 [n]; tokens of each row; of a pair, of the longer of its two rows.
        trained_tokens: int32 [n]; targets of each row, whatever ``max_tokens`` is; of a pair, those of both answers.
        all_tokens: int32 [n]; tokens of each row, whatever ``max_tokens`` is; of a pair, those of both rows.
        ids_hash, mask_hash: uint64 [n]; of each row's tokens and of its mask.
    """

    def __init__(
        self,
        table: pa.Table | None = None,
        chosen: np.ndarray | None = None,
        max_tokens: int | None = None,
        task_of: np.ndarray | None = None,
        processor: ImageProcessor | None = None,
    ) -> None:
        self.table = SCHEMA.empty_table() if table is None else table
        self.chosen, self._max_tokens, self.task_of, self.processor = chosen, max_tokens, task_of, processor
        self.trained_tokens = self._column(self.table["trained_tokens"])
        lengths = self._column(pc.list_value_length(self.table["input_ids"]))
        rejected = self._column(pc.fill_null(pc.list_value_length(self.table["rejected_ids"]), 0))
        # a pair's two rows have the prompt in common, which is all that is not trained
        others = np.where(rejected > 0, lengths - self.trained_tokens + 2 * rejected, 0)
        self.lengths = np.minimum(np.maximum(lengths, others), max_tokens or 2**31 - 1)
        self.all_tokens = lengths + others
        self.ids_hash = self._column(self.table["ids_hash"])
        self.mask_hash = self._column(self.table["mask_hash"])

    def _column(self, values: pa.ChunkedArray) -> np.ndarray:
        return values.to_numpy() if self.chosen is None else values.to_numpy()[self.chosen]

    @classmethod
    def open(cls, path: Path) -> Rows:
        """Map the file that `write_table` wrote."""
        return cls(pa.ipc.open_file(pa.memory_map(str(path))).read_all())

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> Example | Rows:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        number = range(len(self))[index]  # counts from the end too, or raises IndexError
        if self.chosen is not None:
            number = int(self.chosen[number])
        ids, trained, prompt_ids = (
            self.table[name][number].values.to_numpy()[: self._max_tokens]
            for name in ("input_ids", "trained", "prompt_ids")
        )
        source, prompt_text, reference, owner, pair_start, desirable = (
            self.table[name][number].as_py()
            for name in ("source", "prompt_text", "reference", "owner", "pair_start", "desirable")
        )
        if self.processor is not None:
            stored = self.table["image"][number]
            image = StoredImage(stored.as_buffer() if stored.is_valid else prompt_text, source, self.processor)
            return Example(ids, trained.view(bool), source, prompt_ids, prompt_text, reference, owner, image=image)
        rejected = self.table["rejected_ids"][number].values
        rejected_ids = None if rejected is None else rejected.to_numpy()
        if self._max_tokens is not None:
            prompt_ids, prompt_text, reference = prompt_ids[:0], "", None
            if rejected_ids is not None:
                start = int(np.argmax(trained)) if trained.any() else len(trained)
                rejected_ids = rejected_ids[: max(1, self._max_tokens - start)]
        about = prompt_text, reference, owner, pair_start
        return Example(ids, trained.view(bool), source, prompt_ids, *about, rejected_ids, desirable)

    def take(self, rows: np.ndarray) -> Rows:
        """The rows of these numbers, in this order."""
        taken = copy.copy(self)  # without a look at the whole table
        taken.chosen = rows if self.chosen is None else self.chosen[rows]
        taken.task_of = None if self.task_of is None else self.task_of[rows]
        taken.lengths, taken.trained_tokens = self.lengths[rows], self.trained_tokens[rows]
        taken.all_tokens = self.all_tokens[rows]
        taken.ids_hash, taken.mask_hash = self.ids_hash[rows], self.mask_hash[rows]
        return taken

    def cut(self, max_tokens: int) -> Rows:
        """All rows as they would be with at most ``max_tokens`` tokens and without prompts, for a plan.

        Images are never cut.
        """
        return self if self.processor is not None else Rows(self.table, self.chosen, max_tokens, self.task_of)

    def owners(self) -> list[str]:
        """The task or adapter of each row."""
        values = self.table["owner"].to_pylist()
        return values if self.chosen is None else [values[number] for number in self.chosen.tolist()]

    def distinct_owners(self) -> tuple[list[str], np.ndarray]:
        """The tasks or adapters of the table, each once, and the place of each row's in that list, int64 [n]."""
        encoded = pc.dictionary_encode(self.table["owner"]).unify_dictionaries().combine_chunks()
        places = encoded.indices.to_numpy().astype(np.int64)
        return encoded.dictionary.to_pylist(), places if self.chosen is None else places[self.chosen]


def concatenated(parts: Sequence[Rows]) -> Rows:
    """The rows of several selections, one selection after the other."""
    table = pa.concat_tables([part.table for part in parts])
    numbers = [part.task_of for part in parts if part.task_of is not None]
    task_of = np.concatenate(numbers) if numbers else None
    if all(part.chosen is None for part in parts):
        return Rows(table, task_of=task_of)
    starts = np.cumsum([0, *(part.table.num_rows for part in parts)])
    chosen = [np.arange(len(part)) if part.chosen is None else part.chosen for part in parts]
    chosen = [start + rows for start, rows in zip(starts[:-1], chosen, strict=True)]
    return Rows(table, np.concatenate(chosen), task_of=task_of)


def lengths_of(rows: Sequence[Example]) -> np.ndarray:
    """Tokens of each row, int [n]; known without reading the rows where they are `Rows`."""
    lengths = getattr(rows, "lengths", None)
    return np.array([len(row.input_ids) for row in rows], dtype=np.int32) if lengths is None else lengths
