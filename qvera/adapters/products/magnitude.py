"""Rows of the weight with trained norms (DoRA, arXiv 2402.09353, equation 5): W' = diag(m / ‖W + ΔW‖) (W + ΔW).

The norms are those of the rows, and constants for the gradient (section 4.3). With a frozen A and ΔW = C A,
C = diag(b) B diag(s d), they need no weight:

    ‖w_i + δ_i‖² = ‖w_i‖² + 2 (W Aᵀ)_i · C_i + C_i (A Aᵀ) C_iᵀ

`RowNorms` has ‖w_i‖² and W Aᵀ [m, r], made once from the weight that the layer computes with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qvera.adapters.factors import Factors, no_zeros
from qvera.adapters.products.functional import at_least_fp32
from qvera.distributed.zero_params import gathered
from qvera.kernels.low_rank import row_blocks, times_b
from qvera.models.linear import BLOCK_WEIGHTS, WeightBlocks


class RowNorms(nn.Module):
    """‖w_i‖² [m] in fp32 or wider and W Aᵀ [m, r] in the compute dtype, as non-persistent buffers."""

    squares: torch.Tensor
    products: torch.Tensor

    def __init__(self, base_layer: nn.Module, A: torch.Tensor, out_features: int) -> None:
        super().__init__()
        wide = at_least_fp32(A)
        squares = torch.empty(out_features, device=A.device, dtype=wide.dtype)
        products = A.new_empty(out_features, A.shape[0])
        weight = base_layer.weight
        assert isinstance(weight, nn.Parameter)
        if not weight.is_meta:
            with torch.no_grad(), gathered([weight]):
                for rows, block in _weight_blocks(base_layer, A.dtype):
                    block = block.to(wide.dtype)
                    squares[rows] = block.square().sum(1)
                    products[rows] = (block @ wide.t()).to(products.dtype)
        self.register_buffer("squares", squares, persistent=False)
        self.register_buffer("products", products, persistent=False)
        self._latest: tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    def of_weight(self) -> torch.Tensor:
        """‖w_i‖ [m], the start of m."""
        return self.squares.sqrt()

    def of_sum(self, factors: Factors, gram: torch.Tensor) -> torch.Tensor:
        """‖w_i + δ_i‖ [m] in fp32 or wider, without a graph, with 1 for 0 (a pruned row); ``gram`` is A Aᵀ."""
        # cached until d or b changes in value, but only on a CPU: elsewhere the comparison waits for the device
        assert factors.vectors is not None
        d, b = (vector.detach() for vector in factors.vectors)
        holds = self.squares.device.type == "cpu" and not torch.compiler.is_compiling()
        if holds and self._latest is not None:
            (last_d, last_b), norms = self._latest
            if torch.equal(last_d, d) and torch.equal(last_b, b):
                return norms
        with torch.no_grad():
            norms = self._of_sum(factors.B, d, b, factors.scale, gram)
        if holds:
            self._latest = (d.clone(), b.clone()), norms
        return norms

    def _of_sum(
        self, B: torch.Tensor, d: torch.Tensor, b: torch.Tensor, scale: float, gram: torch.Tensor
    ) -> torch.Tensor:
        total, middle, rank = torch.empty_like(self.squares), d.to(self.squares) * scale, d.shape[0]
        for rows in row_blocks(B):
            C = times_b(B[rows].to(total), b[..., rows].to(total)) * middle
            crossed = (self.products[rows, :rank].to(total) * C).sum(1)
            total[rows] = self.squares[rows] + 2 * crossed + ((C @ gram) * C).sum(1)
        return no_zeros(total.clamp_min_(0).sqrt_())

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> RowNorms:
        self._latest = None

        def moved(tensor: torch.Tensor) -> torch.Tensor:  # a cast would round what the cast of a weight does not change
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        return super()._apply(moved, recurse)


def _weight_blocks(base_layer: nn.Module, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield the weight [m, n] that the layer computes with, some rows at a time."""
    if isinstance(base_layer, Conv1D):
        weight = base_layer.weight.t()
        return ((rows, weight[rows].to(dtype)) for rows in row_blocks(weight))
    assert isinstance(base_layer, nn.Linear)
    return iter(WeightBlocks(base_layer, dtype, BLOCK_WEIGHTS))


def held_bytes(rank: int, sizes: Sequence[tuple[int, int]], itemsize: int) -> int:
    """Bytes of `RowNorms` and A Aᵀ for linears of these (in_features, out_features)."""
    rows, inputs = sum(m for _, m in sizes), {n for n, _ in sizes}
    return rows * (rank * itemsize + 4) + 4 * rank**2 * len(inputs)
