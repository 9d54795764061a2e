"""The base that was trained on, as numbers: a 16-bit weight quantized and dequantized again, some rows at a time.

4-bit blocks are 64 consecutive elements of the flattened weight. With double quantization the blocks' absolute maxima are
quantized themselves, around their mean over the whole weight (QLoRA, arXiv 2305.14314, section 3.2): so the maxima of all
of it come first, then rows.
"""

from __future__ import annotations

import math

import torch

from qvera.config.schema import ModelSection
from qvera.models import quantization
from qvera.models.nf4 import BLOCK


def absolute_maxima(rows: torch.Tensor) -> torch.Tensor:
    """The largest absolute value of each block of 64 elements, fp32; the last block may be short."""
    flat = rows.reshape(-1)
    whole = flat.numel() // BLOCK * BLOCK
    found = flat[:whole].view(-1, BLOCK).abs().amax(dim=1).float()
    if whole < flat.numel():
        found = torch.cat([found, flat[whole:].abs().amax().float().view(1)])
    return found


def row_step(columns: int, section: ModelSection) -> int:
    """Rows have to be taken in multiples of this many, so that no block lies across two takings."""
    four_bit = section.quantization in ("nf4", "fp4")
    return BLOCK // math.gcd(BLOCK, columns) if four_bit else 1


class RoundTrip:
    """How one weight was quantized.

    Args:
        maxima: `absolute_maxima` of all its rows, in order; None where it is not 4-bit.
        compute: the dtype it is dequantized to.
    """

    def __init__(self, section: ModelSection, maxima: torch.Tensor | None, compute: torch.dtype) -> None:
        self.section, self.absmax, self.compute = section, maxima, compute
        if maxima is not None and section.double_quant:
            self.absmax = quantization.double_quantized_absmax(maxima)

    @property
    def takes_stored(self) -> bool:
        """Whether the weight was quantized from its stored numbers (a 4-bit copy is), or from them in the compute dtype."""
        return self.absmax is not None

    def rows(self, weight: torch.Tensor, first: int) -> torch.Tensor:
        """Rows [k, n] of the weight in the compute dtype, the first of them row ``first``, as the quantized base holds them."""
        if self.absmax is None:
            return quantization.quantize_dequantize(weight, self.section)
        at = first * weight.shape[1] // BLOCK
        return quantization.quantize_dequantize_blocks(
            weight, self.absmax[at : at + -(-weight.numel() // BLOCK)], self.section.quantization, self.compute
        )
