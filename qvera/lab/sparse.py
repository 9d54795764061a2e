"""The mathematics of a sparse ΔW: k values of a weight [m, n].

SpIEL (arXiv 2401.16405, section 3) adds a sparse δ to a frozen weight:

    y_ti = (W x_t)_i + Σ v_e x_t,j over the values e of row i         ∂v_e = Σ_t g_ti x_tj         ∂x_t = (W + ΔW)ᵀ g_t

Value e is in row i and column j. Its index is i n + j, int32, and the indices of a weight are sorted. Sums over the
values of a row are embedding bags over xᵀ, one bag a row, so no product is kept for each value and token. Tokens are
taken in blocks, in fp32 or wider: nothing is ever held that has the size of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qvera.adapters.products.functional import as_output
from qvera.utils.errors import InputError

Watch = Callable[[Tensor, Tensor], None]
"""Called in backward with the output's gradient [T, m] and the input [T, n] of a layer."""


def _block_elements(on_accelerator: bool) -> int:
    """Return the elements of a block. 8 MB in fp32 fit a CPU's cache; with 64 MB accelerators launch few kernels."""
    return 2**24 if on_accelerator else 2**21


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _token_blocks(*tensors: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, ...]]:
    """Yields the same block of tokens of each tensor [T, features], as [features, block]."""
    step = max(1, _block_elements(not tensors[0].is_cpu) // max(tensor.shape[1] for tensor in tensors))
    for blocks in zip(*(tensor.split(step) for tensor in tensors), strict=True):
        yield tuple(block.to(dtype).t().contiguous() for block in blocks)


def row_blocks(rows: Tensor, columns: int) -> tuple[Tensor, ...]:
    """Cut ``rows`` [m, ...] so that a block times ``columns`` numbers has `_block_elements` at most."""
    return rows.split(max(1, _block_elements(not rows.is_cpu) // columns))


def _add_rows(out: Tensor, x: Tensor, indices: Tensor, v: Tensor) -> None:
    """out[:, i] += Σ_e v_e x[:, j_e] over the values e of row i, at sorted ``indices`` [k]; out [T, m], x [T, n]."""
    (m, n), first = (out.shape[1], x.shape[1]), 0
    firsts = torch.arange(m + 1, device=indices.device, dtype=torch.int64) * n
    starts = torch.searchsorted(indices.long(), firsts, out_int32=True)
    columns = (indices % n).int()
    for (block,) in _token_blocks(x, dtype=_wide(x.dtype)):
        weights = v.to(block.dtype)
        sums = F.embedding_bag(columns, block, starts, mode="sum", per_sample_weights=weights, include_last_offset=True)
        out[first : first + block.shape[1]] += sums.t().to(out.dtype)
        first += block.shape[1]


def sampled_product(g: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """(gᵀ x) at ``indices`` [k] only: Σ_t g_t[i_e] x_t[j_e], [k] in fp32 or wider; g is [T, m] and x [T, n]."""
    n = x.shape[1]
    rows, columns = indices // n, indices % n
    # the operator asks for offsets and looks at their dtype alone
    offsets = rows.new_zeros(1)
    total = torch.zeros(len(indices), dtype=_wide(x.dtype), device=x.device)
    for of_g, of_x in _token_blocks(g, x, dtype=total.dtype):
        total += torch.ops.aten._embedding_bag_per_sample_weights_backward(of_g, of_x, columns, offsets, rows, 0)
    return total


def largest_places(blocks: Iterator[Tensor], count: int, skip: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Find the ``count`` largest |values| of a matrix that comes in ``blocks`` of rows [rows, n], one at a time.

    Returns sorted flat indices, int32, and the values there. ``skip`` are sorted flat indices that do not count.
    """
    best, values, first = torch.empty(0, dtype=torch.int32), torch.empty(0), 0
    for block in blocks:
        flat = block.reshape(-1)
        size = flat.abs()
        if skip is not None:
            inside = torch.searchsorted(skip.long(), torch.tensor([first, first + len(flat)], device=skip.device))
            size[skip[inside[0] : inside[1]].long() - first] = -1.0
        places = size.topk(min(count, len(flat)), sorted=False).indices
        places = places[size[places] >= 0]
        best, values = (
            torch.cat([best.to(places.device), (places + first).int()]),
            torch.cat([values.to(flat), flat[places]]),
        )
        # After each block only the best so far are kept, so memory does not grow with the matrix.
        kept = values.abs().topk(min(count, len(values)), sorted=False).indices
        best, values = best[kept], values[kept]
        first += len(flat)
    order = best.argsort()
    return best[order], values[order]


def largest_products(g: Tensor, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Find the ``count`` places where |gᵀ x| is largest, and gᵀ x there; see `largest_places`."""
    wide = x.to(_wide(x.dtype))  # products in 16 bits would often be equal
    return largest_places((rows.to(wide.dtype) @ wide for rows in row_blocks(g.t(), x.shape[1])), count)


def working_bytes(tokens: int, rows: int, columns: int, count: int, itemsize: int, on_accelerator: bool) -> int:
    """Estimate the most bytes that forward and backward of `add_sparse` hold at once, without the gradient of x.

    A block of tokens of x and y (the last block is still there while the next is made), or, while candidates are
    searched, a block of gᵀ x and its absolute values. 16-bit inputs need fp32 copies. Indices and values in another
    order come on top.
    """
    most = _block_elements(on_accelerator)
    block = max(1, min(tokens, most // max(rows, columns)))
    products = block * (rows + columns) * (2 if tokens > block else 1)
    searching = 2 * min(most, rows * columns)
    if itemsize < 4:
        products += block * max(rows, columns)
        searching += tokens * (columns + min(rows, max(1, most // columns)))
    return 4 * max(products, searching) + 36 * count


class SparseChange(NamedTuple):
    """A sparse ΔW, with the methods of `qvera.adapters.factors.Factors` that exports call."""

    values: Tensor  # [k]
    places: Tensor  # int32 [k], i columns + j, sorted
    rows: int
    columns: int

    @property
    def vectors(self) -> None:
        """None: there is no low-rank path."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    @property
    def rank(self) -> int:
        """The rank of a LoRA that trains as many numbers."""
        return len(self.values) // (self.rows + self.columns)

    def lora(self) -> tuple[Tensor, Tensor]:
        raise InputError(
            "this adapter's method is spiel: its ΔW has single elements all over the weight, so its rank is near the "
            "weight's own. No LoRA is the same, and --to lora, --reduce and sums of adapters need one. Export it "
            "with --to merged, which is exact."
        )

    def delta(self) -> Tensor:
        """Make ΔW a dense matrix, in fp32 or wider, without a graph."""
        values = self.values.detach().to(_wide(self.values.dtype))
        dense = values.new_zeros(self.rows * self.columns)
        dense[self.places.long()] = values
        return dense.view(self.rows, self.columns)

    def outputs(self, part: slice) -> SparseChange:
        """Cut consecutive rows out of ΔW."""
        start, stop, _ = part.indices(self.rows)
        low, high = (int(torch.searchsorted(self.places.long(), row * self.columns)) for row in (start, stop))
        places = self.places[low:high] - start * self.columns
        return SparseChange(self.values[low:high], places, stop - start, self.columns)

    def inputs(self, part: slice) -> SparseChange:
        """Cut consecutive columns out of ΔW."""
        start, stop, _ = part.indices(self.columns)
        i, j = self.places // self.columns, self.places % self.columns
        kept = (j >= start) & (j < stop)
        places = i[kept] * (stop - start) + j[kept] - start
        return SparseChange(self.values[kept], places, self.rows, stop - start)


class _AddSparse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, base: Tensor, x: Tensor, values: Tensor, indices: Tensor, overwrite: bool, watch: Watch | None
    ) -> Tensor:
        ctx.save_for_backward(x, values, indices)
        ctx.watch = watch
        return _add_sparse(base, x, values, indices, overwrite)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, values, indices = ctx.saved_tensors
        need_base, need_x, need_values = ctx.needs_input_grad[:3]
        rows, inputs = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        n, grad_x, grad_values = inputs.shape[1], None, None
        if need_values:
            grad_values = sampled_product(rows, inputs, indices).to(values.dtype)
        if need_x:
            by_column = (indices % n).long() * g.shape[-1] + indices // n  # their indices in ΔWᵀ [n, m]
            by_column, order = by_column.sort()
            grad_x = torch.zeros_like(inputs)
            _add_rows(grad_x, rows, by_column, values[order])
            grad_x = grad_x.view(x.shape)
        if ctx.watch is not None:
            ctx.watch(rows, inputs)
        return (g if need_base else None), grad_x, grad_values, None, None, None


def _add_sparse(base: Tensor, x: Tensor, values: Tensor, indices: Tensor, overwrite: bool) -> Tensor:
    y = base if overwrite and base.is_contiguous() else base.clone(memory_format=torch.contiguous_format)
    _add_rows(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), indices, values)
    return as_output(y, base.shape)


def add_sparse(
    base: Tensor, x: Tensor, values: Tensor, indices: Tensor, overwrite: bool = False, watch: Watch | None = None
) -> Tensor:
    """y = base + x ΔWᵀ [..., m], where ΔW [m, n] has ``values`` at ``indices`` and is zero elsewhere.

    Differentiable once in base [..., m], x [..., n] and values. y may be changed in place. ``values`` [k] are fp32 or
    wider; ``indices``, int32 [k], are i n + j of each, sorted and all different. ``overwrite``: y may take the memory
    of base; then nobody else may read base, in backward neither. ``watch`` is called in backward, after the gradients.
    """
    if not torch.is_grad_enabled():
        return _add_sparse(base, x, values, indices, overwrite)
    return _AddSparse.apply(base, x, values, indices, overwrite, watch)
