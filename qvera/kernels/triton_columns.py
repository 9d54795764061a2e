"""Triton kernels that multiply the columns of a matrix with a vector, and take the gradients of that."""

from __future__ import annotations

import torch

from qvera.kernels.triton_import import jit, tl

BLOCK_COLUMNS = 1024
BACKWARD_ROWS, BACKWARD_BLOCK_ROWS, BACKWARD_BLOCK_COLUMNS = 64, 16, 128


@jit
def scaled_columns_kernel(
    x,
    vectors,
    base,
    out,
    index,
    scale,
    columns,
    x_stride,
    base_stride,
    vector_stride,
    rows_a_vector,
    ADD: tl.constexpr,
    INDEXED: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """out [T, k] contiguous = scale x vectors, or base + scale x vectors if ADD; strides in elements, row to row.

    Row t takes vector t // ``rows_a_vector``, or ``index`` [t] if INDEXED. One program has BLOCK_COLUMNS columns of one
    row.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = at < columns
    own = tl.load(index + row) if INDEXED else row // rows_a_vector
    vector = tl.load(vectors + own * vector_stride + at, mask=mask).to(tl.float32) * scale
    result = tl.load(x + row * x_stride + at, mask=mask).to(tl.float32) * vector
    if ADD:
        result += tl.load(base + row * base_stride + at, mask=mask).to(tl.float32)
    tl.store(out + row * columns + at, result.to(out.dtype.element_ty), mask=mask)


@jit
def scaled_columns_backward_kernel(
    g,
    x,
    vector,
    grad_x,
    grad_vector_parts,
    rows,
    columns,
    g_stride,
    x_stride,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """grad_x [T, k] = g ⊙ vector, and Σ_t g_t x_t of each ROWS rows in its own row of grad_vector_parts [-, k].

    One program goes through ROWS rows of BLOCK_COLUMNS columns, BLOCK_ROWS at a time.
    """
    at = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_column = at < columns
    own = tl.load(vector + at, mask=is_column, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    for start in range(0, ROWS, BLOCK_ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + start + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & is_column[None, :]
        g_tile = tl.load(g + row[:, None] * g_stride + at[None, :], mask=mask, other=0.0).to(tl.float32)
        x_tile = tl.load(x + row[:, None] * x_stride + at[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(g_tile * x_tile, 0)
        product = (g_tile * own[None, :]).to(grad_x.dtype.element_ty)
        tl.store(grad_x + row[:, None] * columns + at[None, :], product, mask=mask)
    tl.store(grad_vector_parts + tl.program_id(0).to(tl.int64) * columns + at, total, mask=is_column)


def launch_scaled_columns_backward(
    g: torch.Tensor, x: torch.Tensor, vector: torch.Tensor, grad_x: torch.Tensor
) -> torch.Tensor:
    """∂vector [k] in fp32 from g and x [T, k]; writes g ⊙ vector into grad_x. The second launch adds up parts."""
    rows, columns = x.shape
    grid = -(-rows // BACKWARD_ROWS), -(-columns // BACKWARD_BLOCK_COLUMNS)
    parts = torch.empty(grid[0], columns, dtype=torch.float32, device=x.device)
    scaled_columns_backward_kernel[grid](
        g,
        x,
        vector,
        grad_x,
        parts,
        rows,
        columns,
        g.stride(0),
        x.stride(0),
        ROWS=BACKWARD_ROWS,
        BLOCK_ROWS=BACKWARD_BLOCK_ROWS,
        BLOCK_COLUMNS=BACKWARD_BLOCK_COLUMNS,
    )
    return parts.sum(0)


def launch_scaled_columns(
    x: torch.Tensor,
    vectors: torch.Tensor,
    base: torch.Tensor | None,
    out: torch.Tensor,
    index: torch.Tensor | None,
    scale: float,
) -> None:
    """x, base and out [T, k] with dense rows, vectors [V, k]; V divides T where there is no index int64 [T]."""
    rows, columns = x.shape
    added = x if base is None else base
    scaled_columns_kernel[(rows, -(-columns // BLOCK_COLUMNS))](
        x,
        vectors,
        added,
        out,
        out if index is None else index,
        scale,
        columns,
        x.stride(0),
        added.stride(0),
        vectors.stride(0),
        1 if index is not None else rows // vectors.shape[0],
        ADD=base is not None,
        INDEXED=index is not None,
        BLOCK_COLUMNS=BLOCK_COLUMNS,
    )
