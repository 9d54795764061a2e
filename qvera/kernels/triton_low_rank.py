"""Triton kernels over B [m, r]: C = diag(b) B diag(scale d), and the vectors' gradients from M = gᵀ z.

One program has BLOCK_ROWS rows of one group of columns (`low_rank` has the groups) and goes through the group's
columns, BLOCK_COLUMNS at a time. It computes in fp32 and rounds once, when it stores.
"""

from __future__ import annotations

import torch

from qvera.kernels.triton_import import jit, tl

BLOCK_ROWS, BLOCK_COLUMNS = 16, 128
"""2,048 elements at a time: 16 for each of a program's 128 threads."""


@jit
def combined_kernel(
    B,
    d,
    b,
    C,
    scale,
    out_features,
    width,
    row_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """C [m, r] contiguous; B has ``row_stride`` elements from row to row; b [G, m]; ``width`` is r / G."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    group, rank = tl.program_id(1), tl.num_programs(1) * width
    is_row = rows < out_features
    b_rows = tl.load(b + group * out_features + rows, mask=is_row, other=0.0).to(tl.float32) * scale
    at = rows.to(tl.int64)[:, None]
    for start in range(0, width, BLOCK_COLUMNS):
        inside = start + tl.arange(0, BLOCK_COLUMNS)
        columns, is_column = group * width + inside, inside < width
        mask = is_row[:, None] & is_column[None, :]
        d_columns = tl.load(d + columns, mask=is_column, other=0.0).to(tl.float32)
        tile = tl.load(B + at * row_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        product = tile * d_columns[None, :] * b_rows[:, None]
        tl.store(C + at * rank + columns[None, :], product.to(C.dtype.element_ty), mask=mask)


@jit
def vector_gradients_kernel(
    M,
    B,
    d,
    b,
    grad_b,
    grad_d_parts,
    C,
    scale,
    c_scale,
    out_features,
    width,
    row_stride,
    WRITE_C: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """∂b [G, m] whole, ∂d in parts [programs, r], one for each block of rows, and C if WRITE_C; M [m, r] contiguous."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    group, rank = tl.program_id(1), tl.num_programs(1) * width
    is_row = rows < out_features
    b_rows = tl.load(b + group * out_features + rows, mask=is_row, other=0.0).to(tl.float32)
    b_sum = tl.zeros((BLOCK_ROWS,), tl.float32)
    at = rows.to(tl.int64)[:, None]
    for start in range(0, width, BLOCK_COLUMNS):
        inside = start + tl.arange(0, BLOCK_COLUMNS)
        columns, is_column = group * width + inside, inside < width
        mask = is_row[:, None] & is_column[None, :]
        d_columns = tl.load(d + columns, mask=is_column, other=0.0).to(tl.float32)
        tile = tl.load(B + at * row_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        weighted = tl.load(M + at * rank + columns[None, :], mask=mask, other=0.0).to(tl.float32) * tile
        b_sum += tl.sum(weighted * d_columns[None, :], 1)
        d_part = tl.sum(weighted * b_rows[:, None], 0) * scale
        tl.store(grad_d_parts + tl.program_id(0) * rank + columns, d_part, mask=is_column)
        if WRITE_C:
            product = tile * d_columns[None, :] * (b_rows * c_scale)[:, None]
            tl.store(C + at * rank + columns[None, :], product.to(C.dtype.element_ty), mask=mask)
    tl.store(grad_b + group * out_features + rows, b_sum * scale, mask=is_row)


def launch_combined(B: torch.Tensor, d: torch.Tensor, b: torch.Tensor, C: torch.Tensor, scale: float) -> None:
    """Write diag(b) B diag(scale d) into C [m, r]; b [G, m]."""
    combined_kernel[_grid(B, b)](B, d, b, C, scale, *_sizes(B, b), BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLUMNS=BLOCK_COLUMNS)


def launch_gradients(
    M: torch.Tensor,
    B: torch.Tensor,
    d: torch.Tensor,
    b: torch.Tensor,
    grad_b: torch.Tensor,
    scale: float,
    c_scale: float,
    C: torch.Tensor,
) -> torch.Tensor:
    """∂d [r]; writes ∂b [G, m], and diag(b) B diag(c_scale d) into C [m, r] unless it is empty.

    Two launches: ∂d comes in one part for each block of rows, and the second adds them up, always in the same order.
    """
    grid = _grid(B, b)
    parts = torch.empty(grid[0], B.shape[1], dtype=torch.float32, device=B.device)
    sizes, blocks = _sizes(B, b), {"BLOCK_ROWS": BLOCK_ROWS, "BLOCK_COLUMNS": BLOCK_COLUMNS}
    vector_gradients_kernel[grid](M, B, d, b, grad_b, parts, C, scale, c_scale, *sizes, WRITE_C=C.numel() > 0, **blocks)
    return parts.sum(0)


def _grid(B: torch.Tensor, b: torch.Tensor) -> tuple[int, int]:
    return -(-B.shape[0] // BLOCK_ROWS), b.shape[0]


def _sizes(B: torch.Tensor, b: torch.Tensor) -> tuple[int, int, int]:
    return B.shape[0], B.shape[1] // b.shape[0], B.stride(0)
