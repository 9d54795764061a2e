"""A Triton kernel that dequantizes a 4-bit weight in one launch, double quantization included.

bitsandbytes takes three: the blocks' absolute maxima from their 8 bits, the offset added to them, then the weight. Each
goes through Python, and the maxima are written and read once more.
"""

from __future__ import annotations

import torch

from qvera.kernels.triton_import import jit, tl

PROGRAM_WEIGHTS = 4096
"""Weights that a program dequantizes: 32 for each of its 128 threads."""


@jit
def dequantize_4bit_kernel(
    packed,
    absmax,
    code,
    nested_absmax,
    nested_code,
    offset,
    weight,
    count,
    bytes,
    blocks,
    NESTED_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Dequantize ``BLOCKS`` blocks of ``2 * HALF`` consecutive weights; ``NESTED_BLOCK`` 0 is one level only."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    present = block < blocks
    scale = tl.load(absmax + block, mask=present, other=0)
    if NESTED_BLOCK:
        outer = tl.load(nested_absmax + block // NESTED_BLOCK, mask=present, other=0.0)
        scale = tl.load(nested_code + scale.to(tl.int32)) * outer + tl.load(offset)
    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    pair = tl.load(packed + byte, mask=byte < bytes, other=0).to(tl.int32)
    first = tl.load(code + (pair >> 4)) * scale[:, None]
    second = tl.load(code + (pair & 15)) * scale[:, None]
    at = block[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(weight + at, tl.interleave(first, second), mask=at < count)


def launch_dequantize_4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_code: torch.Tensor | None,
    offset: torch.Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    weight: torch.Tensor,
) -> None:
    """Write the weight; the other arguments are those of bitsandbytes' quantization state."""
    count, blocks, each = weight.numel(), absmax.numel(), max(1, PROGRAM_WEIGHTS // blocksize)
    if nested_absmax is None:  # the kernel doesn't read them
        nested_absmax = nested_code = offset = code
        nested_blocksize = 0
    if count:
        dequantize_4bit_kernel[(-(-blocks // each),)](
            packed.view(torch.uint8), absmax, code, nested_absmax, nested_code, offset, weight,
            count, (count + 1) // 2, blocks, NESTED_BLOCK=nested_blocksize, HALF=blocksize // 2, BLOCKS=each,
            enable_fp_fusion=False,  # rounded where bitsandbytes rounds
        )  # fmt: skip
