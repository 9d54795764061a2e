"""Batch lengths that recur: on a CPU each new shape of a 16-bit matrix product costs memory and time.

oneDNN compiles a kernel for every new shape, which takes milliseconds, and caches it; torch caches another part of it:
together 0.6 MB, whatever the shape's size, until each of the two holds 1024. A step has about twenty products, so
batches of ever new lengths made SmolLM2 grow by 10 MB a step. Lengths are therefore rounded up to one of eight an
octave: 4 % more tokens in the mean. Smaller caches (the two environment variables below) are no way out: they have to
be set before torch is loaded, 64 kernels each still held 51 MB of 145 after 100 new lengths, and a size of 0 crashed
torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvera.data.collate import IGNORED

if TYPE_CHECKING:
    import torch

KERNEL_CACHE_SIZE = 1024
"""Kernels that oneDNN (``ONEDNN_PRIMITIVE_CACHE_CAPACITY``) and torch (``LRU_CACHE_CAPACITY``) each cache by default.
"""

LENGTHS_PER_OCTAVE = 8
"""Lengths from each power of two to the next."""


def rounds_lengths(dtype: torch.dtype, device_type: str) -> bool:
    """Whether lengths are rounded up: for 16-bit products on a CPU.

    Others cache no kernel, or one of a tenth the size.
    """
    return device_type == "cpu" and dtype.itemsize == 2


def round_up_length(tokens: int) -> int:
    """The smallest of the lengths 1, 2, ..

    16, 18, .. 32, 36, .. 64, 72, .. that is not below ``tokens`` (at least 1).
    """
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
        if tensor.dim() == 2:
            padded[name] = F.pad(tensor, (0, more), value=values.get(name, 0))
        else:
            padded[name] = F.pad(tensor, (0, more, 0, more))
            padded[name][..., -more:, 0] = True  # a row of attention that sees nothing has no softmax
    return padded
