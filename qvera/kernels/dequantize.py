"""Dequantizes a 4-bit weight in one launch (bitsandbytes' NF4 and FP4, with or without double quantization).

    w = code[q] c                   q is 4 bits of each weight, c a number for each block of 64 weights or so
    c = outer code[p] C + offset    with double quantization: p is 8 bits of each block, C a number for each 256 blocks

Source: QLoRA (arXiv 2305.14314), sections 3.1 and 3.2. On a CPU bitsandbytes does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from qvera.kernels.choice import register, use_kernels

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState


def plain_dequantize_4bit(packed: torch.Tensor, state: QuantState) -> torch.Tensor:
    """`dequantize_4bit` in torch operations, for tests. bitsandbytes' own code differs between devices."""
    scale = state.absmax
    if state.nested:
        outer = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: scale.numel()]
        scale = state.state2.code[scale.int()] * outer + state.offset
    pairs = packed.view(torch.uint8).flatten().int()
    count = state.shape.numel()
    codes = state.code[torch.stack((pairs >> 4, pairs & 15), dim=1).flatten()[:count]]
    return (codes * scale.repeat_interleave(state.blocksize)[:count]).to(state.dtype).view(state.shape)


def _launch(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_code: torch.Tensor | None,
    offset: torch.Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    from qvera.kernels import triton_kernels

    weight, nested = packed.new_empty(shape, dtype=dtype), (nested_absmax, nested_code, offset)
    triton_kernels.launch_dequantize_4bit(packed, absmax, code, *nested, blocksize, nested_blocksize, weight)
    return weight


_dequantize_4bit = register(
    "dequantize_4bit", _launch, lambda packed, *rest: packed.new_empty(rest[-2], dtype=rest[-1])
)


def dequantize_4bit(packed: torch.Tensor, state: QuantState) -> torch.Tensor | None:
    """The weight [m, n] in its state's dtype; None if there is no kernel for it and bitsandbytes must do it."""
    # packed has two weights in each byte, the first in the upper half, in any dtype
    if not use_kernels(state.code):
        return None
    outer = state.state2 if state.nested else None
    return _dequantize_4bit(
        packed,
        state.absmax,
        state.code,
        None if outer is None else outer.absmax,
        None if outer is None else outer.code,
        None if outer is None else state.offset,
        state.blocksize,
        0 if outer is None else outer.blocksize,
        state.shape,
        state.dtype,
    )
