"""VeRA's low-rank path with the frozen product in one autograd node: y = x Wᵀ + bias + z Cᵀ, for z = x Aᵀ.

On an accelerator a short batch waits for the host, and a node takes some 30 µs of it. `functional` has the formulas.
"""

from typing import Any

import torch
from torch import Tensor

from qvera.adapters.factors import Factors
from qvera.adapters.products import functional
from qvera.kernels import once_differentiable
from qvera.kernels.low_rank import as_groups, combined, scaled_columns, vector_gradients, wide_product
from qvera.models import linear, quantization


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        d: Tensor,
        b: Tensor,
        constants: tuple[Tensor, float, Any, Tensor, functional.GradientSums | None],
    ) -> Tensor:
        B, scale, module, x, sums = constants
        z = z.reshape(-1, z.shape[-1])
        ctx.save_for_backward(z, d, b)
        ctx.B, ctx.scale, ctx.module, ctx.sums = B, scale, module, sums
        y = linear.frozen_product(module, x.contiguous())  # else of three dimensions it may be a product for each row
        rows = y.view(-1, y.shape[-1])
        if functional.few_tokens(z.shape[0], B, b.numel() // B.shape[0]):  # as in `functional.expand`
            inner = scaled_columns(z, d, scale)
            return functional.as_output(functional.outward(inner, B, as_groups(b), rows), y.shape)
        in_c, after = functional.split_scale(scale, z.dtype)
        rows.addmm_(z, combined(B, d, b, in_c, z.dtype).t(), alpha=after)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        z, d, b = ctx.saved_tensors
        need_z, need_d, need_b, _ = ctx.needs_input_grad
        B = ctx.B
        g = g.reshape(-1, g.shape[-1])
        in_c, after = functional.split_scale(ctx.scale, z.dtype)
        grad_d = grad_b = C = None
        if need_d or need_b:
            M = wide_product(g.t(), z)
            dtype = z.dtype if need_z else None
            grad_d, grad_b, C = vector_gradients(M, B, d, b, ctx.scale, need_d, need_b, in_c, dtype)
        if need_z:
            C = combined(B, d, b, in_c, z.dtype) if C is None else C
            # the node of z has these sums, and turns them into ∂x once all layers over x have added theirs: so no
            # gradient of z is returned, and autograd adds none
            ctx.sums.add(g, quantization.dequantized_weight(ctx.module, g.dtype), C, after)
        return None, grad_d, grad_b, None


def joined_linear(module: torch.nn.Linear, x: Tensor, z: Tensor, factors: Factors) -> Tensor:
    """y [..., m] in x's dtype, differentiable once in x, d and b; W and bias get no gradient.

    x [..., n] is in the compute dtype, on an accelerator, and z [..., r] is `functional.project` of it.
    """
    _, B, d, b, scale, *_ = factors
    # x is no input of the node: its gradient goes by way of z
    return _Joined.apply(z, d, b, (B, scale, module, x, getattr(z.grad_fn, "sums", None)))
