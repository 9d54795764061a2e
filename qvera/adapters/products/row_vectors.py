"""The product of a batch whose rows use different adapters of one pair A, B, forward and backward.

As in `functional`, with vectors of its own for each of the R rows of x [R, ..., n]:

    z = x Aᵀ            y_i = base_i + b_i ⊙ ((s d_i ⊙ z_i) Bᵀ)        d [R, r], b [R, m] or [R, G, m]

and for the upstream gradient g [R, ..., m], summed over what lies between the first and the last dimension:

    u = (s d ⊙ z) Bᵀ    ∂b_i = Σ g_i ⊙ u_i        h = (g ⊙ b) B        ∂d_i = s Σ h_i ⊙ z_i        ∂z = s d ⊙ h

These are the three dense products of one adapter over all rows, however many adapters there are. Building C or M, as
one adapter does, would take [m, r] for each of them. Only z is kept; u is computed again.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from qvera.adapters.products.functional import AutogradContext, scale_input
from qvera.kernels.choice import use_kernels
from qvera.kernels.columns import scaled_columns


def _spread(vectors: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Vectors [R, k] or [R, G, k] with dimensions of 1 for those that ``like`` [R, ..., n] has in the middle."""
    return vectors.view(len(vectors), *(1,) * (like.dim() - 2), *vectors.shape[1:])


def _row_sum(product: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[R, ..., k] summed to [R, k]."""
    return product.reshape(len(product), -1, product.shape[-1]).sum(1, dtype=dtype)


def _outward(inner: torch.Tensor, B: torch.Tensor, b: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """base + b_i ⊙ (inner_i Bᵀ), group by group: what is added is made in the memory of the product."""
    groups, B = b.shape[1], B.to(inner.dtype)
    total = base
    for i, (part, columns) in enumerate(zip(inner.chunk(groups, -1), B.chunk(groups, 1), strict=True)):
        u, own = part @ columns.t(), _spread(b[:, i], inner)
        if use_kernels(u, own, total):
            total = scaled_columns(u, own, base=total)
        elif u.dtype == total.dtype:
            total = u.mul_(own).add_(total)
        else:
            total = total + u.mul_(own)
    return total


class _ExpandRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: AutogradContext,
        base: torch.Tensor,
        z: torch.Tensor,
        d: torch.Tensor,
        b: torch.Tensor,
        B: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(z, d, b, B)
        ctx.scale = scale
        return _outward(scaled_columns(z, _spread(d, z), scale), B, b, base)

    @staticmethod
    @once_differentiable
    def backward(ctx: AutogradContext, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        z, d, b, B = ctx.saved_tensors
        need_base, need_z, need_d, need_b = ctx.needs_input_grad[:4]
        upstream, B, groups = g.to(z.dtype), B.to(z.dtype), b.shape[1]
        spread_d = _spread(d, z)
        sums, parts = [], []
        inner = scaled_columns(z, spread_d, ctx.scale) if need_b else z
        for i, (part, columns) in enumerate(zip(inner.chunk(groups, -1), B.chunk(groups, 1), strict=True)):
            if need_b:
                sums.append(_row_sum((part @ columns.t()).mul_(upstream), b.dtype).unsqueeze(1))
            if need_z or need_d:
                parts.append(scaled_columns(upstream, _spread(b[:, i], z)) @ columns)
        grad_z = grad_d = grad_b = None
        if sums:
            grad_b = sums[0] if groups == 1 else torch.cat(sums, 1)
        if parts:
            h = parts[0] if groups == 1 else torch.cat(parts, -1)
            grad_z = scaled_columns(h, spread_d, ctx.scale) if need_z else None
            grad_d = _row_sum(h.mul_(z), d.dtype).mul_(ctx.scale) if need_d else None
        return (g if need_base else None), grad_z, grad_d, grad_b, None, None


def expand_rows(
    base: torch.Tensor, z: torch.Tensor, d: torch.Tensor, b: torch.Tensor, B: torch.Tensor, scale: float
) -> torch.Tensor:
    """y_i = base_i + b_i ⊙ ((s d_i ⊙ z_i) Bᵀ) for each row i of the batch.

    Args:
        base: the frozen layer's output [R, ..., m].
        z: x Aᵀ [R, ..., r] in the compute dtype.
        d: [R, r], fp32 or wider; its gradient comes in the same dtype.
        b: [R, m], or [R, G, m] for G groups, like d.
        B: [m, r] in any dtype; frozen.
        scale: see `projection.vera_scale`.

    Returns:
        [R, ..., m] in base's dtype. Differentiable once in base, z, d and b. A row that is not finite leaves all
        others as they are, forward and backward.
    """
    grouped = b if b.dim() == 3 else b.unsqueeze(1)
    return _ExpandRows.apply(base, z, d, grouped, B, scale)


def scale_rows(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """diag(a_i) x_i for each row: [R, ..., n] and [R, n] give [R, ..., n] in x's dtype; differentiable once in both."""
    return scale_input(x, _spread(a, x))
