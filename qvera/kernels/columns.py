"""The columns of a matrix [..., k] times a vector. The kernel is one launch, plain code three or four."""

import torch

from qvera.kernels.choice import register, use_kernels
from qvera.kernels.low_rank import row_blocks


def scaled_columns(
    x: torch.Tensor,
    vector: torch.Tensor,
    scale: float = 1.0,
    base: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
    overwrite: bool = False,
) -> torch.Tensor:
    """scale x ⊙ vector, or base + scale x ⊙ vector, in x's dtype, or in base's if given; x and base are [..., k].

    ``vector`` is [k], or one for each first index of x: [x.shape[0], 1, ..., 1, k]. With ``index``, int64 [T], it is
    [V, k], and row t of x takes vector index[t]. ``overwrite``: plain code may take x's memory for the result.
    """
    tensors = (x, vector) if base is None else (x, vector, base)
    if use_kernels(*tensors):
        found = _scaled_columns(_rows(x), _rows(vector), None if base is None else _rows(base), index, scale)
        return found.view(x.shape)
    # in x's dtype: torch takes several times as long for a product of two dtypes on a CPU
    factor = (vector if scale == 1.0 else vector * scale).to(x.dtype)
    if index is not None:
        factor = factor.index_select(0, index).view(x.shape)
    if base is not None and base.dtype == x.dtype:
        return torch.addcmul(base, x, factor, out=x if overwrite else None)
    product = torch.mul(x, factor, out=x if overwrite else None)
    return product if base is None else base + product.to(base.dtype)


def scaled_columns_backward(
    g: torch.Tensor, x: torch.Tensor, vector: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """∂x = g ⊙ vector [..., k], and ∂vector = Σ g ⊙ x [k] over all but the last dimension, in the vector's dtype."""
    if use_kernels(g, x, vector):
        grad_x, grad_vector = _backward(_rows(g), _rows(x), vector.contiguous())
        return grad_x.view(g.shape), grad_vector.to(vector.dtype)
    total = torch.zeros_like(vector)
    rows, other = _rows(g), _rows(x)
    for part in row_blocks(rows):
        total += (rows[part] * other[part]).sum(0, dtype=vector.dtype)
    return scaled_columns(g, vector), total


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """[..., k] as a matrix with dense rows."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _empty(
    x: torch.Tensor, vectors: torch.Tensor, base: torch.Tensor | None, index: torch.Tensor | None, scale: float
) -> torch.Tensor:
    return torch.empty(x.shape, dtype=(x if base is None else base).dtype, device=x.device)


def _empty_backward(g: torch.Tensor, x: torch.Tensor, vector: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(g.shape, dtype=g.dtype, device=g.device), vector.new_empty(vector.shape, dtype=torch.float32)


_scaled_columns = register("scaled_columns", _empty)
_backward = register("scaled_columns_backward", _empty_backward, launches=2)
