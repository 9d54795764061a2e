"""Dequantizes a 4-bit weight in one launch (bitsandbytes' NF4 and FP4, with or without double quantization).

    w = code[q] c                   q is 4 bits of each weight, c a number for each block of 64 weights or so
    c = outer code[p] C + offset    with double quantization: p is 8 bits of each block, C a number for each 256 blocks

Source: QLoRA (arXiv 2305.14314), sections 3.1 and 3.2. On a CPU bitsandbytes does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from qvera.kernels.choice import register_operator, use_kernels

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState


def _empty(
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
    return packed.new_empty(shape, dtype=dtype)


_dequantize_4bit = register_operator("dequantize_4bit", _empty)


def dequantize_4bit(packed: torch.Tensor, state: QuantState) -> torch.Tensor | None:
    """The weight [m, n] in its state's dtype; None if there is no kernel for it and bitsandbytes must do it."""
    # packed has two weights in each byte, the first in the upper half, in any dtype
    if not use_kernels(state.code):
        return None
    outer, offset = (state.state2, state.offset) if state.nested else (None, None)
    nested = (None, None, offset) if outer is None else (outer.absmax, outer.code, offset)
    blocks = state.blocksize, 0 if outer is None else outer.blocksize
    return _dequantize_4bit(packed, state.absmax, state.code, *nested, *blocks, state.shape, state.dtype)
