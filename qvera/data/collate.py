"""Rows → tensors: padded to the longest, or as one sequence that holds their common prefix once.

In instruction data each row starts with the same system prompt, instruction or schema. In a padded batch of B rows such
a prefix of P tokens is computed B times. `collate_prefix_once` makes one sequence, prefix + rest 1 + ... + rest B, in
which each rest sees the prefix and itself only, at the positions it had. Losses and gradients are those of the padded
batch (tests/data/test_collate.py), with (B - 1) P fewer tokens and no padding.

With ``data.packing`` every forward pass is such a sequence, as long as ``data.max_length`` allows, prefix or not.

Attention tells the rows of a sequence of T tokens apart in one of three ways (`Joined`). A dense mask [T, T] works
everywhere. It costs attention T² instead of the sum of the rows' squares, and on an accelerator the flash kernel too.
Where variable-length attention runs (`qvera.models.attention`), offsets say where rows begin and end. Behind a common
prefix, row i attends with its r_i own queries to P + r_i keys: each layer copies the prefix's keys and values, which it
computes once, to the front of each row's own. That makes as many keys as the padded batch has without its padding.

On a CPU each new shape of a 16-bit matrix product costs memory and time: oneDNN and torch each cache a part of a
compiled kernel, together 0.6 MB, so batches of ever new lengths made SmolLM2 grow by 10 MB a step. Lengths are
therefore rounded up to one of eight an octave: 4 % more tokens in the mean. Smaller caches are no way out: the
variables are read when torch is loaded, and a size of 0 crashed it.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qvera.data.rows import Example
from qvera.utils import accelerator

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""The label of a token that is not trained (torch's ``cross_entropy`` default)."""
_WORTH = 0.85
"""The prefix is joined where at most this share of the padded batch's tokens is left: a mask has its price."""
KERNEL_CACHE_SIZE = 1024
"""Kernels that oneDNN (``ONEDNN_PRIMITIVE_CACHE_CAPACITY``) and torch (``LRU_CACHE_CAPACITY``) each cache."""
LENGTHS_PER_OCTAVE = 8
"""Lengths from each power of two to the next."""


def collate(
    examples: Sequence[Example], pad_id: int, device: torch.device | str = "cpu", masked: bool = True
) -> dict[str, torch.Tensor]:
    """Rows of different lengths → one batch, padded on the right to the longest.

    Args:
        examples: B rows, at least one.
        pad_id: the token put where a row has ended; no token of the row sees it, and the loss leaves it out.
        masked: False: no mask, for a causal decoder (`qvera.models.attention.needs_padding_mask`).

    Returns:
        ``input_ids`` int64 [B, T]; ``attention_mask`` int64 [B, T], 1 on real tokens; ``labels`` int64 [B, T], the
        token itself where it is trained and `IGNORED` elsewhere. Aligned with ``input_ids``: the loss shifts.
        ``trained`` int64 [n], see `_tensors`.
    """
    length = max(len(example.input_ids) for example in examples)
    input_ids = np.full((len(examples), length), pad_id, dtype=np.int64)
    labels = np.full((len(examples), length), IGNORED, dtype=np.int64)
    for row, example in enumerate(examples):
        end = len(example.input_ids)
        input_ids[row, :end] = example.input_ids
        labels[row, :end] = _labels(example)
    arrays = {"input_ids": input_ids, "labels": labels}
    if masked:
        ends = np.array([len(example.input_ids) for example in examples])
        arrays["attention_mask"] = (np.arange(length) < ends[:, None]).astype(np.int64)
    return _tensors(arrays, device)


def _labels(example: Example) -> np.ndarray:
    return np.where(example.trained, example.input_ids, IGNORED)


def _tensors(arrays: dict[str, np.ndarray], device: torch.device | str) -> dict[str, torch.Tensor]:
    """The arrays of a batch on the device, with the places of its trained tokens, which the host knows without asking.

    ``trained`` int64 [n]: the places in the flattened batch [B T] whose hidden states predict a trained token.
    """
    labels = arrays["labels"].ravel()
    trained = np.flatnonzero(labels != IGNORED)
    trained = trained[trained % arrays["labels"].shape[1] > 0] - 1  # nothing stands before a row's first token
    return accelerator.tensors_on(device, {**arrays, "trained": trained.astype(np.int64)})


def common_prefix(examples: Sequence[Example]) -> int:
    """Tokens that all rows begin with. None of them is trained, and the one after them is not either.

    What stands before that one in the joined sequence is another row's end.
    """
    first = examples[0].input_ids
    length = min(int(np.argmax(e.trained)) - 1 for e in examples)
    for example in examples[1:]:
        length = min(length, len(example.input_ids))
        differs = np.flatnonzero(first[: max(length, 0)] != example.input_ids[: max(length, 0)])
        length = int(differs[0]) if len(differs) else length
    return max(length, 0)


class Joined(enum.Enum):
    """How attention tells rows apart that stand in one sequence."""

    MASK = "mask"
    """A dense mask; the common prefix stands in front once."""
    OFFSETS = "offsets"
    """Offsets of variable-length attention; the common prefix stands in front once, and its keys are copied."""
    ROWS = "rows"
    """Offsets of variable-length attention; each row is whole, its prefix included (flash-attn by transformers)."""


def collate_prefix_once(
    examples: Sequence[Example],
    device: torch.device | str = "cpu",
    packing: bool = False,
    joined: Joined = Joined.MASK,
) -> dict[str, Any] | None:
    """The rows as one sequence of T = P + Σ (length - P) tokens, or None where that is not worth it.

    A dense mask is worth it where it saves tokens and its one long row of attention costs no more than the many short
    ones did, beyond what the linears save. Offsets make attention no dearer than the padded batch's: they are worth it
    where they save tokens. On a 7B a token costs each layer 404 MFLOP in the frozen linears; copying the prefix's keys
    and values costs it 33 kB of traffic in place of that.

    Args:
        packing: worth it whenever there are two rows or more.
        joined: how rows are told apart. With `Joined.ROWS` P is 0.

    Returns:
        ``input_ids``, ``position_ids``, ``labels`` int64 [1, T], and what tells rows apart: ``attention_mask`` bool
        [1, 1, T, T], True where the token of the row may look at that of the column; or what `_offsets` gives.
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
    return {**_tensors({**arrays, **offsets}, device), **numbers}


def _offsets(prefix: int, own: np.ndarray) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """Where the queries and keys of N rows begin and end, for variable-length attention; the prefix is a row too.

    Made here, from numbers that the host knows, so that no layer has to wait for the device to tell them. The names are
    those that transformers' flash attention takes.

    Args:
        prefix: P, tokens of the common prefix; 0 for none.
        own: int [B], how many tokens each row has beyond it.

    Returns:
        Numbers: ``max_length_q``, ``max_length_k``, the most queries and keys of a row. Arrays: ``cu_seq_lens_q``,
        ``cu_seq_lens_k`` int32 [N + 1]. With a prefix of P tokens: ``prefix_length`` P; ``key_index`` int64 [K], the
        token that each key of each row comes from; ``key_order`` int64 [K], which of these keys are copies of the
        prefix (row by row), then those that are the tokens P, P + 1, ... themselves.
    """
    queries = np.append(prefix, own) if prefix else own
    keys = np.append(prefix, prefix + own) if prefix else own
    ends_q, ends_k = (np.append(0, np.cumsum(lengths)).astype(np.int32) for lengths in (queries, keys))
    numbers = {"max_length_q": int(queries.max()), "max_length_k": int(keys.max())}
    arrays = {"cu_seq_lens_q": ends_q, "cu_seq_lens_k": ends_k}
    if prefix:
        at = np.arange(ends_k[-1]) - np.repeat(ends_k[:-1], keys)  # of each key within its row
        first_own = np.repeat(ends_q[:-1], keys) - prefix  # the key at P is the row's first own token
        copied = at < prefix
        arrays["key_index"] = np.where(copied, at, first_own + at).astype(np.int64)
        arrays["key_order"] = np.append(np.flatnonzero(copied), np.flatnonzero(~copied)).astype(np.int64)
        numbers["prefix_length"] = prefix
    return numbers, arrays


def rounds_lengths(dtype: torch.dtype, device_type: str) -> bool:
    """Whether lengths are rounded up: for 16-bit products on a CPU. Others cache no kernel, or one of a tenth."""
    return device_type == "cpu" and dtype.itemsize == 2


def round_up_length(tokens: int, per_octave: int = LENGTHS_PER_OCTAVE) -> int:
    """The smallest of 1, 2, .. 16, 18, .. 32, 36, .. 64, 72, .. that is not below ``tokens`` (at least 1).

    ``per_octave``: how many there are from each power of two to the next.
    """
    step = max(1, (1 << (tokens.bit_length() - 1)) // per_octave)
    return -(-tokens // step) * step


def pad_batch(batch: dict[str, Any], tokens: int, pad_id: int) -> dict[str, Any]:
    """Pad a batch on the right to ``tokens`` tokens a row; the padding is not trained, and no token before it sees it.

    Args:
        batch: from `qvera.data.collate`, [B, T]; ``attention_mask`` [B, T], or bool [1, 1, T, T] of a joined sequence.
            Joined rows that have offsets have no common prefix.

    Returns:
        The same tensors where T is ``tokens`` already. A mask [B, T] goes on with ones: the causal order hides the new
        columns from every row's own tokens, and rows that were all equally long still need no mask. Behind joined rows
        that have offsets the padding is a row of its own.
    """
    import torch.nn.functional as F

    more = tokens - batch["input_ids"].shape[1]
    if more == 0:
        return batch
    values = {"input_ids": pad_id, "labels": IGNORED, "attention_mask": 1}
    padded: dict[str, Any] = {}
    for name, tensor in batch.items():
        if name.startswith("max_length"):
            padded[name] = max(tensor, more)
        elif name.startswith("cu_seq_lens"):
            padded[name] = F.pad(tensor, (0, 1), value=tokens)
        elif name == "trained":
            padded[name] = tensor + tensor // (tokens - more) * more
        elif tensor.dim() == 2:
            padded[name] = F.pad(tensor, (0, more), value=values.get(name, 0))
        else:
            padded[name] = F.pad(tensor, (0, more, 0, more))
            padded[name][..., -more:, 0] = True  # a row of attention that sees nothing has no softmax
    return padded
