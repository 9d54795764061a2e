"""A Triton kernel that multiplies the columns of a matrix with a vector."""

from __future__ import annotations

import torch

from qvera.kernels.triton_import import jit, tl

BLOCK_COLUMNS = 1024


@jit
def scaled_columns_kernel(
    x,
    vectors,
    base,
    out,
    scale,
    columns,
    x_stride,
    base_stride,
    vector_stride,
    rows_a_vector,
    ADD: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """out [T, k] contiguous = scale x vectors, or base + scale x vectors if ADD; strides in elements, row to row.

    Row t takes vector t // ``rows_a_vector``. One program has BLOCK_COLUMNS columns of one row.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = at < columns
    vector = tl.load(vectors + row // rows_a_vector * vector_stride + at, mask=mask).to(tl.float32) * scale
    result = tl.load(x + row * x_stride + at, mask=mask).to(tl.float32) * vector
    if ADD:
        result += tl.load(base + row * base_stride + at, mask=mask).to(tl.float32)
    tl.store(out + row * columns + at, result.to(out.dtype.element_ty), mask=mask)


def launch_scaled_columns(
    x: torch.Tensor, vectors: torch.Tensor, base: torch.Tensor | None, out: torch.Tensor, scale: float
) -> None:
    """x, base and out [T, k] with dense rows, vectors [V, k], where V divides T."""
    rows, columns = x.shape
    added = x if base is None else base
    scaled_columns_kernel[(rows, -(-columns // BLOCK_COLUMNS))](
        x,
        vectors,
        added,
        out,
        scale,
        columns,
        x.stride(0),
        added.stride(0),
        vectors.stride(0),
        rows // vectors.shape[0],
        ADD=base is not None,
        BLOCK_COLUMNS=BLOCK_COLUMNS,
    )
