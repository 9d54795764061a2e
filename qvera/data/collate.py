"""Rows → tensors: padded to the longest, or as one sequence that holds their common prefix once.

In instruction data each row starts with the same system prompt, instruction or schema. In a padded batch of B rows such
a prefix of P tokens is computed B times. `collate_prefix_once` makes one sequence, prefix + rest 1 + ... + rest B, in
which each rest sees the prefix and itself only, at the positions it had. Losses and gradients are those of the padded
batch (tests/data/test_collate.py), with (B - 1) P fewer tokens and no padding.

With ``data.packing`` every forward pass is such a sequence, as long as ``data.max_length`` allows, prefix or not.

On a CPU each new shape of a 16-bit matrix product costs memory and time: oneDNN and torch each cache a part of a
compiled kernel, together 0.6 MB, so batches of ever new lengths made SmolLM2 grow by 10 MB a step. Lengths are
therefore rounded up to one of eight an octave: 4 % more tokens in the mean. Smaller caches are no way out: the
variables are read when torch is loaded, and a size of 0 crashed it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

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


def collate_prefix_once(
    examples: Sequence[Example], device: torch.device | str = "cpu", packing: bool = False, masked: bool = True
) -> dict[str, torch.Tensor] | None:
    """The rows as one sequence of T = P + Σ (length - P) tokens, or None where that is not worth it.

    Args:
        packing: worth it whenever there are two rows or more.
        masked: False: no mask, for flash attention, which tells rows apart by positions that start again; then P is 0.

    Returns:
        ``input_ids``, ``position_ids``, ``labels`` int64 [1, T]; ``attention_mask`` bool [1, 1, T, T], True where the
        token of the row may look at that of the column.
    """
    prefix = common_prefix(examples) if masked else 0
    lengths = [len(e.input_ids) for e in examples]
    total = prefix + sum(length - prefix for length in lengths)
    padded = len(examples) * max(lengths)
    if len(examples) < 2:
        return None
    # one long row of attention must not cost more than the many short ones did, beyond what the linears save
    if not packing and (total > _WORTH * padded or total * total > 4 * padded * max(lengths)):
        return None
    ids = [examples[0].input_ids[:prefix], *(e.input_ids[prefix:] for e in examples)]
    labels = [np.full(prefix, IGNORED), *(_labels(e)[prefix:] for e in examples)]
    positions = [np.arange(prefix), *(np.arange(prefix, length) for length in lengths)]
    parts = {"input_ids": ids, "position_ids": positions, "labels": labels}
    arrays = {name: np.concatenate(part)[None].astype(np.int64) for name, part in parts.items()}
    if masked:
        row = np.repeat(np.arange(len(ids)), [len(part) for part in ids])  # of each token; the prefix is row 0
        arrays["attention_mask"] = (((row[:, None] == row) | (row == 0)) & np.tri(total, dtype=bool))[None, None]
    return _tensors(arrays, device)


def rounds_lengths(dtype: torch.dtype, device_type: str) -> bool:
    """Whether lengths are rounded up: for 16-bit products on a CPU. Others cache no kernel, or one of a tenth."""
    return device_type == "cpu" and dtype.itemsize == 2


def round_up_length(tokens: int) -> int:
    """The smallest of 1, 2, .. 16, 18, .. 32, 36, .. 64, 72, .. that is not below ``tokens`` (at least 1)."""
    step = max(1, (1 << (tokens.bit_length() - 1)) // LENGTHS_PER_OCTAVE)
    return -(-tokens // step) * step


def pad_batch(batch: dict[str, torch.Tensor], tokens: int, pad_id: int) -> dict[str, torch.Tensor]:
    """Pad a batch on the right to ``tokens`` tokens a row; the padding is not trained, and no token before it sees it.

    Args:
        batch: from `qvera.data.collate`, [B, T]; ``attention_mask`` [B, T], or bool [1, 1, T, T] of a joined sequence.

    Returns:
        The same tensors where T is ``tokens`` already. A mask [B, T] goes on with ones: the causal order hides the new
        columns from every row's own tokens, and rows that were all equally long still need no mask.
    """
    import torch.nn.functional as F

    more = tokens - batch["input_ids"].shape[1]
    if more == 0:
        return batch
    values = {"input_ids": pad_id, "labels": IGNORED, "attention_mask": 1}
    padded = {}
    for name, tensor in batch.items():
        if name == "trained":
            padded[name] = tensor + tensor // (tokens - more) * more
        elif tensor.dim() == 2:
            padded[name] = F.pad(tensor, (0, more), value=values.get(name, 0))
        else:
            padded[name] = F.pad(tensor, (0, more, 0, more))
            padded[name][..., -more:, 0] = True  # a row of attention that sees nothing has no softmax
    return padded
