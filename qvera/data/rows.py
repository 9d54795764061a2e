"""Tokenized rows in a memory-mapped Arrow table, and batches of them.

A data set may exceed RAM. A row becomes an `Example` when it is asked for, as views of the mapped pages. Only lengths,
counts and hashes of all rows are held, 24 bytes a row.

If B rows share a prefix of P tokens, a padded batch computes it B times. `collate_prefix_once` makes one sequence
instead: prefix + rest 1 + ... + rest B. Each rest sees only the prefix and itself, at its old positions. Losses and
gradients are those of the padded batch (tests/data/test_rows.py), with (B - 1) P fewer tokens and no padding.
``data.packing`` always makes such a sequence. `Joined` lists how attention tells the rows apart.

On a CPU each new shape of a 16-bit matrix product caches 0.6 MB of kernels in oneDNN and torch: SmolLM2 grew by 10 MB a
step. So lengths are rounded up to one of eight an octave, 4 % more tokens on average. Smaller caches do not help: their
variables are read when torch is loaded, and a size of 0 crashed it.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qvera.data.images import ImageProcessor, ImageTextProcessor, StoredImage
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""The label of a token that is not trained (torch's ``cross_entropy`` default)."""
_WORTH = 0.85
"""Join the prefix only if at most this share of the padded batch's tokens is left, because a mask has its price."""
KERNEL_CACHE_SIZE = 1024
"""Kernels that oneDNN (``ONEDNN_PRIMITIVE_CACHE_CAPACITY``) and torch (``LRU_CACHE_CAPACITY``) each cache."""
LENGTHS_PER_OCTAVE = 8
"""Lengths from each power of two to the next."""
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
        # a chunk of large images is more than 2 GiB
        ("images", pa.list_(pa.struct([("bytes", pa.large_binary()), ("path", pa.string())]))),
        ("rejected_ids", pa.list_(pa.int32())),
        ("desirable", pa.bool_()),
        ("about", pa.string()),
    ]
)
_BATCH_ROWS = 4096
_BATCH_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One tokenized row."""

    input_ids: np.ndarray  # int32 [T]; for a labelled image a 0 for each patch
    trained: np.ndarray  # bool [T]: the targets, predicted by the logits one place before; never the first token
    source: str  # for messages
    prompt_ids: np.ndarray  # int32 [P], BOS included: what the last turn is generated from; empty if that is no answer
    prompt_text: str  # the same as text, without the tokenizer's own BOS; of an image its path, if any
    reference: str | None  # that last turn's content; of a labelled row its label
    owner: str | None = None  # the row's adapter or part (`DataSection.owner_column`)
    pair_start: int | None = None  # first token of a labelled pair's second text, if the tokenizer marks it
    rejected_ids: np.ndarray | None = None  # int32 [R]: a pair's worse answer; the trained tokens are the better one
    desirable: bool | None = None  # whether a single judged answer is a good one
    images: tuple[StoredImage, ...] = ()  # of a labelled image the one, else those that stand among the text
    about: str | None = None  # of a row that is a prompt: [its last text, the raw row] as JSON

    @property
    def image(self) -> StoredImage | None:
        """The image of a labelled row."""
        return self.images[0] if self.images else None

    @property
    def is_labelled(self) -> bool:
        """Whether the row is a text or an image with a label. Its last token then stands for its one target."""
        return self.reference is not None and not len(self.prompt_ids)

    @property
    def trained_tokens(self) -> int:
        """The number of targets; a pair counts those of both answers."""
        return int(self.trained.sum()) + (0 if self.rejected_ids is None else len(self.rejected_ids))

    @property
    def row_tokens(self) -> list[int]:
        """The tokens that a forward pass computes: of the row, or of each of a pair's two rows."""
        own = len(self.input_ids)
        return [own] if self.rejected_ids is None else [own, self.answer_start + len(self.rejected_ids)]

    def shown(self) -> list[tuple[str, Example]]:
        """The row, or a pair's two rows, each with a word for its targets."""
        if self.rejected_ids is None:
            word = {None: "trained", True: "good answer", False: "bad answer"}[self.desirable]
            return [(word, self)]
        ids = np.append(self.input_ids[: self.answer_start], self.rejected_ids)
        chosen = dataclasses.replace(self, rejected_ids=None)
        rejected = dataclasses.replace(chosen, input_ids=ids, trained=np.arange(len(ids)) >= self.answer_start)
        return [("chosen", chosen), ("rejected", rejected)]

    def previewed(self) -> list[tuple[str, Example]]:
        """As `shown`; but of a row that is a prompt only that, without the placeholder of its answer."""
        if self.about is None or not len(self.prompt_ids):
            return self.shown()
        ids = self.prompt_ids
        return [("prompt", dataclasses.replace(self, input_ids=ids, trained=np.zeros(len(ids), dtype=bool)))]

    def stretches(self) -> list[tuple[list[int], bool]]:
        """The row's token ids, cut where trained ones begin or end, and whether they are trained."""
        edges = [0, *(np.flatnonzero(np.diff(self.trained)) + 1).tolist(), len(self.input_ids)]
        return [(self.input_ids[a:b].tolist(), bool(self.trained[a])) for a, b in itertools.pairwise(edges)]

    @property
    def answer_start(self) -> int:
        """The place of the first target. In a preference row it is the length of the prompt."""
        return int(np.argmax(self.trained))


_FIELDS = [field.name for field in dataclasses.fields(Example)]


def record_batch(examples: Sequence[Example]) -> pa.RecordBatch:
    """Rows as an Arrow record batch of `SCHEMA`."""
    rows = []
    for example in examples:
        # a reward reads all of a prompt's row
        label = str(example.reference) if example.is_labelled else example.about or ""
        label = label if example.desirable is None else str(example.desirable)
        # Equal hashes say that two rows have the same input, images included.
        content = np.concatenate([row.input_ids for _, row in example.shown()]).tobytes()
        for image in example.images:
            content += image.read_bytes()
        about = {
            "trained": example.trained.view(np.uint8),
            "trained_tokens": example.trained_tokens,
            "images": [image.stored for image in example.images],
            "ids_hash": _hash(content),
            "mask_hash": _hash(example.trained.tobytes() + label.encode()),
        }
        rows.append({name: getattr(example, name) for name in _FIELDS} | about)
    return pa.RecordBatch.from_pylist(rows, schema=SCHEMA)


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def write_table(batches: Iterable[pa.RecordBatch], path: Path) -> Rows:
    """Write record batches to a file and map it. At most 16 MB are held.

    Small batches are joined into large ones, which are cheaper to keep open.
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


_OF_EACH_ROW = ("trained_tokens", "lengths", "all_tokens", "ids_hash", "mask_hash", "part_of", "chosen")


class Rows(Sequence[Example]):
    """A selection of a table's rows, in order; a row may come more than once.

    ``trained_tokens`` and ``all_tokens`` count both rows of a pair, also where rows are `cut`.

    Attributes:
        chosen: int64 [n], row numbers in the table; None: all rows.
        lengths, trained_tokens, all_tokens: int32 [n]; of a pair the longer row, its targets, and both rows.
        ids_hash, mask_hash: uint64 [n].
        part_of: int64 [n], the number of each row's part (`plugins.Schedule.divide`), or None.
        processor: makes the pixel values of images; None if there are none.
        answer_tokens: where rows are prompts, tokens that an answer may have. Rows count them as their own; see `ask`.
    """

    def __init__(self, table: pa.Table | None = None) -> None:
        self.table = SCHEMA.empty_table() if table is None else table
        self.chosen: np.ndarray | None = None
        self.part_of: np.ndarray | None = None
        self.processor: ImageProcessor | ImageTextProcessor | None = None
        self._max_tokens: int | None = None
        self.answer_tokens = 0
        self.trained_tokens, self.ids_hash, self.mask_hash = (
            self.table[name].to_numpy() for name in ("trained_tokens", "ids_hash", "mask_hash")
        )
        lengths = pc.list_value_length(self.table["input_ids"]).to_numpy()
        rejected = pc.fill_null(pc.list_value_length(self.table["rejected_ids"]), 0).to_numpy()
        # a pair's two rows have the prompt in common, which is all that is not trained
        others = np.where(rejected > 0, lengths - self.trained_tokens + 2 * rejected, 0)
        self.lengths, self.all_tokens = np.maximum(lengths, others), lengths + others

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
        if self.answer_tokens:
            ids = np.append(prompt_ids, np.zeros(self.answer_tokens, np.int32))
            trained = (np.arange(len(ids)) >= len(prompt_ids)).view(np.uint8)
        source, prompt_text, reference, owner, pair_start, desirable = (
            self.table[name][number].as_py()
            for name in ("source", "prompt_text", "reference", "owner", "pair_start", "desirable")
        )
        stored = self.table["images"][number].values or ()
        contents = [
            image["bytes"].as_buffer() if image["bytes"].is_valid else image["path"].as_py() for image in stored
        ]
        images = tuple(StoredImage(content, source, self.processor) for content in contents)
        rejected = self.table["rejected_ids"][number].values
        rejected_ids = None if rejected is None else rejected.to_numpy()
        # A row that is cut for a plan keeps at least one token of the rejected answer, or it would be no pair.
        if self._max_tokens is not None:
            prompt_ids, prompt_text, reference = prompt_ids[:0], "", None
            if rejected_ids is not None:
                start = int(np.argmax(trained)) if trained.any() else len(trained)
                rejected_ids = rejected_ids[: max(1, self._max_tokens - start)]
        of_row = prompt_text, reference, owner, pair_start
        about = self.table["about"][number].as_py()
        return Example(ids, trained.view(bool), source, prompt_ids, *of_row, rejected_ids, desirable, images, about)

    @property
    def has_images(self) -> bool:
        """Whether any row of the table holds an image."""
        return bool(pc.any(pc.greater(pc.list_value_length(self.table["images"]), 0)).as_py())

    @property
    def image_files(self) -> list[str]:
        """The paths of the table's images that are not stored in it."""
        chunks = (chunk.values.field("path").drop_null() for chunk in self.table["images"].chunks)
        return [path for paths in chunks for path in paths.to_pylist()]

    def ask(self, answer_tokens: int) -> None:
        """Count an answer of ``answer_tokens`` tokens to each row, a prompt. The tokens are 0 until it is generated.

        Raises InputError: a prompt is empty.
        """
        self.answer_tokens, prompts = answer_tokens, pc.list_value_length(self.table["prompt_ids"]).to_numpy()
        self.lengths = self.all_tokens = (prompts if self.chosen is None else prompts[self.chosen]) + answer_tokens
        self.trained_tokens = np.full_like(self.lengths, answer_tokens)
        for row in np.flatnonzero(self.lengths == answer_tokens)[:1].tolist():
            raise InputError(f"{self[row].source}: the prompt is empty. Fill it in, or leave the row out.")

    def take(self, rows: np.ndarray) -> Rows:
        """The rows of these numbers, in this order."""
        taken = copy.copy(self)  # without a look at the whole table
        for name in _OF_EACH_ROW:
            values = getattr(self, name)
            setattr(taken, name, None if values is None else values[rows])
        taken.chosen = rows if self.chosen is None else taken.chosen
        return taken

    def cut(self, max_tokens: int) -> Rows:
        """All rows cut to ``max_tokens`` tokens, without prompts, for a plan. Labelled images are never cut.

        Of rows that are prompts (see `ask`), the prompt is cut.
        """
        cut = copy.copy(self)
        if not isinstance(self.processor, ImageProcessor):
            cut._max_tokens, cut.lengths = max_tokens, np.minimum(self.lengths, max_tokens + self.answer_tokens)
        return cut

    def owners(self) -> tuple[list[str], np.ndarray]:
        """The table's tasks or adapters, each once, and each row's place in that list, int64 [n]."""
        encoded = pc.dictionary_encode(self.table["owner"]).unify_dictionaries().combine_chunks()
        places = encoded.indices.to_numpy().astype(np.int64)
        return encoded.dictionary.to_pylist(), places if self.chosen is None else places[self.chosen]


def concatenated(parts: Sequence[Rows]) -> Rows:
    """The rows of several selections, one selection after the other."""
    rows = Rows(pa.concat_tables([part.table for part in parts]))
    if any(part.chosen is not None for part in parts):
        starts = np.cumsum([0, *(part.table.num_rows for part in parts)])
        chosen = [np.arange(len(part)) if part.chosen is None else part.chosen for part in parts]
        rows = rows.take(np.concatenate([start + each for start, each in zip(starts[:-1], chosen, strict=True)]))
    numbers = [part.part_of for part in parts if part.part_of is not None]
    rows.part_of = np.concatenate(numbers) if numbers else None
    return rows


def lengths_of(rows: Sequence[Example]) -> np.ndarray:
    """Tokens of each row, int [n]. `Rows` know them without being read."""
    lengths = getattr(rows, "lengths", None)
    return np.array([len(row.input_ids) for row in rows], dtype=np.int32) if lengths is None else lengths


def collate(
    examples: Sequence[Example], pad_id: int, device: torch.device | str = "cpu", masked: bool = True
) -> dict[str, torch.Tensor]:
    """Pad rows on the right to one batch of the longest length.

    Args:
        masked: False: no mask, for a causal decoder (`qvera.models.attention.needs_padding_mask`).

    Returns:
        ``input_ids``, ``attention_mask`` (1 on real tokens) and ``labels``, int64 [B, T]; ``trained``, see `_tensors`.
        Labels are the tokens themselves, or `IGNORED`. They are not shifted: the loss does that.
    """
    length = max(len(example.input_ids) for example in examples)
    arrays = padded_arrays(examples, length, pad_id, masked)
    arrays["labels"] = np.full((len(examples), length), IGNORED, dtype=np.int64)
    for row, example in enumerate(examples):
        arrays["labels"][row, : len(example.input_ids)] = _labels(example)
    return _tensors(arrays, device)


def padded_arrays(examples: Sequence[Example], tokens: int, pad_id: int, masked: bool) -> dict[str, np.ndarray]:
    """``input_ids``, padded on the right to ``tokens``, and if ``masked`` ``attention_mask``: int64 [B, T]."""
    ids = np.full((len(examples), tokens), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, example in enumerate(examples):
        end = len(example.input_ids)
        ids[row, :end] = example.input_ids
        mask[row, :end] = 1
    return {"input_ids": ids, "attention_mask": mask} if masked else {"input_ids": ids}


def _labels(example: Example) -> np.ndarray:
    return np.where(example.trained, example.input_ids, IGNORED)


def _tensors(arrays: dict[str, np.ndarray], device: torch.device | str) -> dict[str, torch.Tensor]:
    """The batch on the device, with ``trained`` int64 [n]: places in [B T] whose hidden states predict a trained token.

    The host knows these places, so nothing has to wait for the device.
    """
    from qvera.utils import accelerator  # which imports torch

    labels = arrays["labels"].ravel()
    trained = np.flatnonzero(labels != IGNORED)
    trained = trained[trained % arrays["labels"].shape[1] > 0] - 1  # nothing stands before a row's first token
    return accelerator.tensors_on(device, {**arrays, "trained": trained.astype(np.int64)})


def common_prefix(examples: Sequence[Example]) -> int:
    """Number of tokens that all rows begin with.

    Neither they nor the token after them may be trained: in the joined sequence another row's end stands before it.
    """
    first = examples[0].input_ids
    length = min(int(np.argmax(e.trained)) - 1 for e in examples)
    for example in examples[1:]:
        length = min(length, len(example.input_ids))
        differs = np.flatnonzero(first[: max(length, 0)] != example.input_ids[: max(length, 0)])
        length = int(differs[0]) if len(differs) else length
    return max(length, 0)


class Joined(enum.Enum):
    """The ways in which attention tells rows apart that stand in one sequence."""

    MASK = "mask"
    """A dense mask; the common prefix stands in front once."""
    OFFSETS = "offsets"
    """Variable-length attention; the common prefix stands in front once, and its keys are copied."""
    ROWS = "rows"
    """Variable-length attention; each row is whole, its prefix included (flash-attn by transformers)."""


def collate_prefix_once(
    examples: Sequence[Example], device: torch.device | str = "cpu", packing: bool = False, joined: Joined = Joined.MASK
) -> dict[str, Any] | None:
    """The rows as one sequence of T = P + Σ (length - P) tokens, or None if that is not worth it.

    The sequence has to save tokens. With a dense mask, its one long row of attention must also not cost more extra than
    the linears save. Offsets have no such price: on a 7B, each token saved spares a layer 404 MFLOP in the frozen
    linears, for 33 kB of copied keys and values.

    Args:
        packing: join whenever there are two rows or more.
        joined: how rows are told apart. With `Joined.ROWS` P is 0.

    Returns:
        ``input_ids``, ``position_ids``, ``labels`` int64 [1, T]; and either ``attention_mask`` bool [1, 1, T, T], True
        where the row's token may look at the column's, or the result of `_offsets`.
    """
    prefix = 0 if joined is Joined.ROWS else common_prefix(examples)
    lengths = [len(e.input_ids) for e in examples]
    total = prefix + sum(length - prefix for length in lengths)
    padded = len(examples) * max(lengths)
    if len(examples) < 2 and joined is not Joined.ROWS:
        return None
    dear = joined is Joined.MASK and total * total > 4 * padded * max(lengths)
    if not packing and (total > _WORTH * padded or dear):
        return None
    ids = [examples[0].input_ids[:prefix], *(e.input_ids[prefix:] for e in examples)]
    labels = [np.full(prefix, IGNORED), *(_labels(e)[prefix:] for e in examples)]
    for part in labels[1:]:
        part[0] = IGNORED  # before it stands another row's end, which does not predict it
    positions = [np.arange(prefix), *(np.arange(prefix, length) for length in lengths)]
    parts = {"input_ids": ids, "position_ids": positions, "labels": labels}
    arrays = {name: np.concatenate(part)[None].astype(np.int64) for name, part in parts.items()}
    if joined is Joined.MASK:
        row = np.repeat(np.arange(len(ids)), [len(part) for part in ids])  # of each token; the prefix is row 0
        arrays["attention_mask"] = (((row[:, None] == row) | (row == 0)) & np.tri(total, dtype=bool))[None, None]
        return _tensors(arrays, device)
    numbers, offsets = _offsets(prefix, np.array([length - prefix for length in lengths]))
    batch = {**_tensors({**arrays, **offsets}, device), **numbers}
    # one tensor: Hopper's kernel asks whether both are the same
    batch.setdefault("cu_seq_lens_k", batch["cu_seq_lens_q"])
    return batch


def _offsets(prefix: int, own: np.ndarray) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """Compute where the queries and keys of each row begin and end, for variable-length attention.

    The prefix counts as a row too. The host computes all of it, so that no layer waits for the device. Names are those
    of transformers' flash attention. ``own``, int [B], has each row's tokens beyond the prefix.

    Returns:
        Numbers ``max_length_q``, ``max_length_k`` and the array ``cu_seq_lens_q``, int32 [N + 1]. With a prefix also
        ``cu_seq_lens_k``, which is the same without one; ``prefix_length``; ``key_index`` int64 [K], the token that
        each key comes from; and ``key_order`` int64 [K], the keys that are copies of the prefix (row by row), then
        those of the tokens P, P + 1, ...
    """
    queries = np.append(prefix, own) if prefix else own
    keys = np.append(prefix, prefix + own) if prefix else own
    ends_q, ends_k = (np.append(0, np.cumsum(lengths)).astype(np.int32) for lengths in (queries, keys))
    numbers = {"max_length_q": int(queries.max()), "max_length_k": int(keys.max())}
    arrays = {"cu_seq_lens_q": ends_q}
    if prefix:
        arrays["cu_seq_lens_k"] = ends_k
        # Keys stand row by row: first the prefix, which is copied for each row, then the row's own tokens.
        at = np.arange(ends_k[-1]) - np.repeat(ends_k[:-1], keys)  # of each key within its row
        first_own = np.repeat(ends_q[:-1], keys) - prefix  # the key at P is the row's first own token
        copied = at < prefix
        arrays["key_index"] = np.where(copied, at, first_own + at).astype(np.int64)
        arrays["key_order"] = np.append(np.flatnonzero(copied), np.flatnonzero(~copied)).astype(np.int64)
        numbers["prefix_length"] = prefix
    return numbers, arrays


def rounds_lengths(dtype: torch.dtype, device_type: str) -> bool:
    """Whether lengths are rounded up: for 16-bit products on a CPU. Others cache no kernel, or a tenth of one."""
    return device_type == "cpu" and dtype.itemsize == 2


def round_up_length(tokens: int, per_octave: int = LENGTHS_PER_OCTAVE) -> int:
    """The smallest of 1, 2, .. 16, 18, .. 32, 36, .. 64, 72, .. that is not below ``tokens`` (at least 1)."""
    step = max(1, (1 << (tokens.bit_length() - 1)) // per_octave)
    return -(-tokens // step) * step


def pad_batch(batch: dict[str, Any], tokens: int, pad_id: int) -> dict[str, Any]:
    """Pad a batch [B, T] on the right to ``tokens`` tokens a row. Padding is not trained, and no earlier token sees it.

    The padding of joined rows with offsets becomes a row of its own. A mask [B, T] goes on with ones: the causal order
    hides the padding, and rows of equal length still need no mask.
    """
    import torch
    import torch.nn.functional as F

    more = tokens - batch["input_ids"].shape[1]
    if more == 0:
        return batch
    values = {"input_ids": pad_id, "labels": IGNORED, "attention_mask": 1}
    padded: dict[str, Any] = {}
    for name, tensor in batch.items():
        if name.startswith("max_length"):
            padded[name] = max(tensor, more)
        elif name == "cu_seq_lens_k" and tensor is batch["cu_seq_lens_q"]:
            padded[name] = padded["cu_seq_lens_q"]
        elif name.startswith("cu_seq_lens"):
            padded[name] = F.pad(tensor, (0, 1), value=int(tensor[-1]) + more)
        elif name == "key_index":  # the padding's keys are its own tokens
            padded[name] = torch.cat([tensor, torch.arange(tokens - more, tokens, device=tensor.device)])
        elif name == "key_order":
            filling = torch.arange(len(tensor), len(tensor) + more, device=tensor.device)
            padded[name] = torch.cat([tensor, filling])
        elif name == "prefix_length":
            padded[name] = tensor
        elif name == "trained":
            padded[name] = tensor + tensor // (tokens - more) * more
        elif tensor.dim() == 2:
            padded[name] = F.pad(tensor, (0, more), value=values.get(name, 0))
        else:
            padded[name] = F.pad(tensor, (0, more, 0, more))
            padded[name][..., -more:, 0] = True  # a row of attention that sees nothing has no softmax
    return padded
