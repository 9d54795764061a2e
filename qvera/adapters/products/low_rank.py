"""LoRA's path, whose A and B are both trained (arXiv 2106.09685): y = base + s (x Aᵀ) Bᵀ as one autograd node.

    x [T, n] input      A [r, n], B [m, r] parameters      s scalar      g [T, m] upstream gradient
    z = x Aᵀ            y = base + s z Bᵀ
    h = g B             ∂x = s h A          ∂A = s hᵀ x          ∂B = s gᵀ z

A and B are fp32 parameters, cast to x's dtype; their gradients are summed and returned in fp32. Backward keeps the
casts, x only if A is trained, and z only if B is. s goes into z and h, except in fp16 (`functional.split_scale`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qvera.adapters.products.functional import add_product, split_scale, times
from qvera.kernels import once_differentiable
from qvera.kernels.choice import use_kernels
from qvera.kernels.low_rank import wide_product
from qvera.models import linear

Sampler = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""x [..., n] → the rows that backward keeps [k, n], their token indices [k], and their weights [k]."""


def _product(x: Tensor, A: Tensor, B: Tensor, scale: float, y: Tensor, overwrite: bool) -> tuple[Tensor, Tensor]:
    """y + s (x Aᵀ) Bᵀ in y's dtype and shape, and z [T, r]; A and B in x's dtype."""
    inner, after = split_scale(scale, x.dtype)
    z = times(x.reshape(-1, x.shape[-1]), A.t(), inner)
    return add_product(y, z, B, after, overwrite), z


class _TrainedPair(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        scale: float,
        base: Tensor | None,
        module: Any,
        overwrite: bool,
        kept: Tensor | None,
        tokens: Tensor | None,
        weight: Tensor | None,
    ) -> Tensor:
        ctx.scale, ctx.module, ctx.dtypes = scale, module, (x.dtype, A.dtype, B.dtype)
        A, B = A.to(x.dtype), B.to(x.dtype)
        if base is None:
            base, overwrite = linear.frozen_product(module, x), True  # a new tensor that nobody else reads
        y, z = _product(x, A, B, scale, base, overwrite)
        needs_x, needs_A, needs_B = ctx.needs_input_grad[:3]
        ctx.save_for_backward(
            (x if kept is None else kept) if needs_A else None,
            z if needs_B else None,
            A if needs_x else None,
            B if needs_x or needs_A else None,
            tokens,
            weight,
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, z, A, B, tokens, weight = ctx.saved_tensors
        needs_x, needs_A, needs_B, _, needs_base = ctx.needs_input_grad[:5]
        dtype, *parameter_dtypes = ctx.dtypes
        cast = g.to(dtype)
        rows, (inner, after) = cast.reshape(-1, g.shape[-1]), split_scale(ctx.scale, dtype)
        grad_x = grad_A = grad_B = None
        if needs_B:
            grad_B = _parameter_gradient(rows, z, after, parameter_dtypes[1])
        if needs_x or needs_A:
            h = times(rows, B, inner)
            if needs_A:
                own = h if tokens is None else h[tokens] * weight.unsqueeze(1).to(h.dtype)
                grad_A = _parameter_gradient(own, x.reshape(-1, x.shape[-1]), after, parameter_dtypes[0])
            if needs_x and ctx.module is None:
                grad_x = times(h, A, after).view(*g.shape[:-1], A.shape[1])
            elif needs_x:
                # the second product adds to the first: two nodes would leave a sum of [T, n] to autograd
                grad_x = linear.frozen_input_grad(ctx.module, cast)
                grad_x.view(-1, A.shape[1]).addmm_(h, A, alpha=after)
        return grad_x, grad_A, grad_B, None, g if needs_base else None, None, None, None, None, None


def _parameter_gradient(left: Tensor, right: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale leftᵀ right in the parameter's dtype. Kernels sum over the tokens in fp32, plain code in its own dtype."""
    if not use_kernels(left, right):
        return times(left.t(), right, scale).to(dtype)
    found = wide_product(left.t(), right)
    return (found if scale == 1.0 else found.mul_(scale)).to(dtype)


def trained_path(
    base: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, overwrite: bool = False, sampler: Sampler | None = None
) -> Tensor:
    """y = base + s (x Aᵀ) Bᵀ, [..., m] in base's dtype. Differentiable once in base, x, A and B.

    ``base`` [..., m] is the frozen layer's output, x [..., n] its input in the compute dtype. A [r, n] and B [m, r] are
    fp32 or wider, like their gradients. ``overwrite`` is that of `functional.expand`. ``sampler`` chooses rows of x for
    backward, and ∂A is then right in expectation; None: all.
    """
    if not torch.is_grad_enabled():
        return _product(x, A.to(x.dtype), B.to(x.dtype), scale, base, overwrite)[0]
    return _TrainedPair.apply(x, A, B, scale, base, None, overwrite, *_sampled(sampler, x, A))


def trained_linear(
    module: torch.nn.Linear, x: Tensor, A: Tensor, B: Tensor, scale: float, sampler: Sampler | None = None
) -> Tensor:
    """y = x Wᵀ + bias + s (x Aᵀ) Bᵀ, [..., m] in x's dtype. W and bias get no gradient. See `trained_path`."""
    return _TrainedPair.apply(x, A, B, scale, None, module, True, *_sampled(sampler, x, A))


def _sampled(sampler: Sampler | None, x: Tensor, A: Tensor) -> tuple[Tensor | None, ...]:
    """Return the rows of x that backward keeps, their tokens and their weights; three times None if all are kept."""
    return (None, None, None) if sampler is None or not A.requires_grad else sampler(x)
