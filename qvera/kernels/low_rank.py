"""Products of VeRA: passes over B [m, r], C = diag(b) B diag(d), ∂b and ∂d from M = gᵀ z; and columns times a vector.

A kernel reads B once and writes C: 4 bytes an element in 16 bits, where fp32 temporaries of plain code take 20.
"""

import functools

import torch

from qvera.kernels.choice import register_operator, use_kernels

B_BLOCK_ELEMENTS = 2**19
"""Elements of [m, r] in one pass on a CPU: 2 MB in fp32, which stay in its cache."""
# at 11008 x 1024 that takes a tenth of the time: temporaries of 45 MB need fresh pages each time


def row_blocks(B: torch.Tensor) -> list[slice]:
    """Blocks of rows of B [m, r]: `B_BLOCK_ELEMENTS` each on a CPU, one elsewhere."""
    out_features, rank = B.shape
    step = max(1, B_BLOCK_ELEMENTS // rank) if B.device.type == "cpu" else out_features
    return [slice(start, min(start + step, out_features)) for start in range(0, out_features, step)]


def as_groups(b: torch.Tensor) -> torch.Tensor:
    """b as [G, m], also if it is [m]."""
    return b.unsqueeze(0) if b.dim() == 1 else b


def times_b(B: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """diag(b) B [m, r], each group of B's columns with its own b."""
    b = as_groups(b)
    return (b.t().unsqueeze(2) * B.unflatten(1, (len(b), -1))).flatten(1)


def combined(B: torch.Tensor, d: torch.Tensor, b: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """C = diag(b) B diag(scale d) [m, r], computed in the vectors' dtype and rounded once to ``dtype``."""
    if use_kernels(B, d, b) and dtype.itemsize < 8:
        return _combined(_rows(B), d.contiguous(), b.contiguous(), scale, dtype)
    scaled = d * scale
    blocks = row_blocks(B)
    if len(blocks) == 1:
        return (times_b(B, b) * scaled).to(dtype)
    C = B.new_empty(B.shape, dtype=dtype)
    for rows in blocks:
        C[rows] = times_b(B[rows], b[..., rows]) * scaled
    return C


def vector_gradients(
    M: torch.Tensor,
    B: torch.Tensor,
    d: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    need_d: bool,
    need_b: bool,
    c_scale: float = 0.0,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """∂d [r] and ∂b, in b's shape, from M = gᵀ z [m, r], in the vectors' dtype; and `combined` of c_scale and dtype.

    That is None where no kernel, which reads B once for all, has made it, or ``dtype`` is None. Plain code gives None
    for a gradient that is not needed; the kernel makes both anyway.
    """
    if use_kernels(M, B, d, b):
        vectors = d.contiguous(), b.contiguous()
        grad_d, grad_b, C = _gradients(M.contiguous(), _rows(B), *vectors, scale, c_scale, dtype)
        return grad_d.to(d.dtype), grad_b.to(b.dtype), None if dtype is None else C
    b_groups = as_groups(b)
    d_groups = d.view(len(b_groups), -1)
    grad_d = torch.zeros_like(d_groups) if need_d else None
    grad_b = torch.empty_like(b_groups) if need_b else None
    for rows in row_blocks(B):
        weighted = M[rows].to(d.dtype) * B[rows]
        for g, part in enumerate(weighted.chunk(len(b_groups), dim=1)):
            if grad_b is not None:
                grad_b[g, rows] = part @ d_groups[g]
            if grad_d is not None:
                grad_d[g] += b_groups[g, rows] @ part
    return (
        None if grad_d is None else grad_d.mul_(scale).view_as(d),
        None if grad_b is None else grad_b.mul_(scale).view_as(b),
        None,
    )


def wide_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right, summed and returned in fp32 by kernels, else in their dtype."""
    # rounding M = gᵀ z to 16 bits would lose its small elements, and the next pass reads it in fp32 anyway
    if left.dtype.itemsize == 2 and use_kernels(left, right):
        return _wide_product(left, right)
    return narrow_product(left, right)


_FEW_COLUMNS = 16  # up to here the turned product is faster or as fast (bench/narrow_products.py)


def narrow_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right. MKL takes up to seven times as long where ``right`` has few columns as for the transpose of it."""
    if left.device.type == "cpu" and 1 < right.shape[1] <= _FEW_COLUMNS:
        return (right.t() @ left.t()).t()
    return left @ right


def _empty_combined(
    B: torch.Tensor, d: torch.Tensor, b: torch.Tensor, scale: float, dtype: torch.dtype
) -> torch.Tensor:
    return B.new_empty(B.shape, dtype=dtype)


def _empty_gradients(
    M: torch.Tensor,
    B: torch.Tensor,
    d: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    c_scale: float,
    dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_d, grad_b = B.new_empty(d.shape, dtype=torch.float32), B.new_empty(b.shape, dtype=torch.float32)
    return grad_d, grad_b, B.new_empty(B.shape if dtype else (0,), dtype=dtype or M.dtype)


def _empty_wide_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left.new_empty(left.shape[0], right.shape[1], dtype=torch.float32)


@functools.cache
def _has_wide_product(device_type: str) -> bool:
    key = torch._C._dispatch_key_for_device(device_type)
    return torch._C._dispatch_has_kernel_for_dispatch_key("aten::mm.dtype", key)


def _torch_wide_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if _has_wide_product(left.device.type):
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()  # slower; torch has no such product for this device


_combined = register_operator("combined", _empty_combined)
_gradients = register_operator("vector_gradients", _empty_gradients)
_wide_product = register_operator("wide_product", _empty_wide_product, _torch_wide_product)


def scaled_columns(
    x: torch.Tensor,
    vector: torch.Tensor,
    scale: float = 1.0,
    base: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
    overwrite: bool = False,
) -> torch.Tensor:
    """scale x ⊙ vector, or base + scale x ⊙ vector, in x's dtype, or in base's if given; x and base are [..., k].

    ``vector`` is [k]. With ``index``, int64 [T], it is [V, k], and row t of x takes vector index[t]. ``overwrite``:
    plain code may take x's memory for the result.
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
    # by blocks, so that the product of g and x stays in a CPU's cache
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


_scaled_columns = register_operator("scaled_columns", _empty)
_backward = register_operator("scaled_columns_backward", _empty_backward)
