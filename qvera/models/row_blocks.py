"""Products with a stored weight [m, n], made into the compute dtype some rows at a time on a CPU.

A whole dequantized weight is 90 MB in a 7B and 470 MB in a 70B. Memory of that size comes fresh from the system at every product,
and having its pages cleared takes six times as long as dequantizing does (bench/log.md); a block of 8 MB is used again and again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from qvera.models import quantization

BLOCK_WEIGHTS = 2**22
"""Weights made at a time: 8 MB in 16 bits. glibc gives anything above 32 MB back to the system when it is freed."""

_SUMMED_NUMBERS = 3 * 2**20
"""g W by blocks adds up [T, n] once a block. With more numbers than this it costs more than a whole weight's fresh pages."""


class RowBlocks:
    """The weight [m, n] of a linear layer in ``dtype``, in blocks of rows made when asked for.

    Args:
        elements: weights in a block, at most.
        kept: blocks are asked for more than once, so a quantized weight is one block, dequantized once.

    A weight that is held in that dtype already is one block, and so is a quantized one on anything but a CPU.
    """

    def __init__(self, module: Any, dtype: torch.dtype, elements: int, kept: bool = False) -> None:
        self.rows: int = module.out_features
        self._module, self._dtype = module, dtype
        self._whole: torch.Tensor | None = None
        self._step = max(1, elements // module.in_features)
        four_bit = isinstance(module, quantization.Linear4bit)
        blocked = four_bit and not kept and module.weight.device.type == "cpu" and quantization.ends_with_rows(module)
        self._stored = not four_bit and not isinstance(module, quantization.Linear8bit)
        if not (blocked or (self._stored and module.weight.dtype != dtype)):
            self._step = self.rows
            self._whole = quantization.dequantized_weight(module, dtype)

    def __len__(self) -> int:
        return -(-self.rows // self._step)

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor]]:
        if self._whole is not None or self._step >= self.rows:
            if self._whole is None:  # made once, held as long as this object
                self._whole = quantization.dequantized_weight(self._module, self._dtype)
            yield slice(0, self.rows), self._whole
        elif self._stored:
            for start in range(0, self.rows, self._step):
                rows = slice(start, min(start + self._step, self.rows))
                yield rows, self._module.weight[rows].to(self._dtype)
        else:
            yield from quantization.dequantized_rows(self._module, self._dtype, self._step)


def product(x: torch.Tensor, blocks: RowBlocks, bias: torch.Tensor | None) -> torch.Tensor:
    """X Wᵀ + bias: x [..., n] gives [..., m] in x's dtype."""
    if len(blocks) == 1:
        return F.linear(x, next(iter(blocks))[1], bias)
    flat = x.reshape(-1, x.shape[-1])
    y = x.new_empty(flat.shape[0], blocks.rows)
    for rows, weight in blocks:
        torch.mm(flat, weight.t(), out=y[:, rows])
    return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], -1)


def product_back(g: torch.Tensor, blocks: RowBlocks, out: torch.Tensor) -> None:
    """G W: g [T, m] gives [T, n] in ``out``, added up in fp32 at least."""
    if len(blocks) == 1:
        torch.mm(g.to(out.dtype), next(iter(blocks))[1], out=out)
        return
    if out.dtype.itemsize >= 4:
        out.zero_()
        for rows, weight in blocks:
            out.addmm_(g[:, rows].to(out.dtype), weight)
        return
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for rows, weight in blocks:
        total += g[:, rows].to(out.dtype) @ weight
    out.copy_(total)


def pays_backward(tokens: int, in_features: int) -> bool:
    """Whether g W is made by blocks."""
    return tokens * in_features <= _SUMMED_NUMBERS
