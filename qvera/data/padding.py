"""Lengths that come back: on a CPU each new shape of a 16-bit matrix product costs memory and time that stay.

oneDNN compiles a kernel for every shape it has not seen, which takes milliseconds, and keeps it, and torch keeps another part of
it: together 0.6 MB, whatever the shape's size, until each of the two holds 1024. A step has about twenty products, so batches of
ever new lengths made SmolLM2 grow by 10 MB a step. Lengths are therefore rounded up to one of eight an octave: 4 % more tokens in
the mean.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qvera.data import IGNORED

KERNELS = 1024
"""What oneDNN (``ONEDNN_PRIMITIVE_CACHE_CAPACITY``) and torch (``LRU_CACHE_CAPACITY``) each keep unless they are told otherwise."""

AN_OCTAVE = 8
"""Lengths from each power of two to the next."""


def repeats(dtype: torch.dtype, device_type: str) -> bool:
    """Whether lengths are rounded up: 16-bit products on a CPU. Others keep no kernel, or one of a tenth the size."""
    return device_type == "cpu" and dtype.itemsize == 2


def next_length(tokens: int) -> int:
    """The smallest of the lengths 1, 2, .. 16, 18, .. 32, 36, .. 64, 72, .. that is not below ``tokens`` (at least 1)."""
    step = max(1, (1 << (tokens.bit_length() - 1)) // AN_OCTAVE)
    return -(-tokens // step) * step


def lengthened(batch: dict[str, torch.Tensor], tokens: int, pad_id: int) -> dict[str, torch.Tensor]:
    """A batch with ``tokens`` tokens a row: what is added on the right is not trained, and no token before it sees it.

    Args:
        batch: from `qvera.data`, [B, T]; ``attention_mask`` [B, T], or bool [1, 1, T, T] of a joined sequence.

    Returns:
        The same tensors where T is ``tokens`` already. A mask [B, T] goes on with ones: the causal order hides the new columns from
        every row's own tokens, and rows that were all equally long still need no mask.
    """
    more = tokens - batch["input_ids"].shape[1]
    if more == 0:
        return batch
    values = {"input_ids": pad_id, "labels": IGNORED, "attention_mask": 1}
    found = {name: F.pad(one, (0, more), value=values.get(name, 0)) for name, one in batch.items() if one.dim() == 2}
    for name, sees in ((name, one) for name, one in batch.items() if one.dim() == 4):
        found[name] = F.pad(sees, (0, more, 0, more))
        found[name][..., -more:, 0] = True  # a row of attention that sees nothing has no softmax
    return {name: found[name] for name in batch}
