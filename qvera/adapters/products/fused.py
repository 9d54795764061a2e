"""The same linear in fewer operations when there are many tokens: one product with W + ΔW.

The low-rank path costs T r (2 n + 3 m) multiply-adds for T tokens, forward and backward. Adding ΔW to the dequantized
weight once per call, m n r of them, makes it part of the base's own products:

    forward     W' = W + C A                y = x W'ᵀ
    backward    W' again                    ∂x = g W'
                M = gᵀ z   or   (gᵀ x) Aᵀ   ∂b, ∂d from M as in `functional`

M from z = x Aᵀ costs T r (n + m) and keeps z [T, r]. M from gᵀ x costs m n (T + r) and keeps x [T, n], which is cheaper
if the rank is above n. With a vector a, A diag(a) replaces A, and x is always kept. Its gradient N = ∂zᵀ x = Cᵀ (gᵀ x)
gives ∂a_j = Σ_k A_kj N_kj: T r (2 n + 2 m) in all, or m n (T + 2 r).

If memory allows, W' is held for a whole optimizer step (`HeldWeight`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qvera.adapters.factors import Factors
from qvera.adapters.products.functional import as_output, split_scale
from qvera.kernels import once_differentiable
from qvera.kernels.low_rank import combined, vector_gradients, wide_product
from qvera.models import quantization
from qvera.utils import accelerator

BUILDS_UNHELD = 2.0
"""How often a pass makes W + ΔW if it is not held: forward and backward."""


def pays(
    tokens: int,
    in_features: int,
    out_features: int,
    rank: int,
    dtype: torch.dtype,
    device_type: str = "cpu",
    input_scale: bool = False,
    builds: float = BUILDS_UNHELD,
) -> bool:
    """Whether `summed_linear` is as exact as the low-rank path and cheaper, if a pass makes W + ΔW ``builds`` times."""
    # in 16 bits only on CPUs, where it was measured to be as exact end to end (bench/summed.py)
    if dtype.itemsize < 4 and accelerator.is_accelerator(device_type):
        return False
    n, m = in_features, out_features
    return builds * m * n * rank + gradient_cost(tokens, n, m, rank, input_scale) < tokens * rank * (2 * n + 3 * m)


def keeps_input(tokens: int, in_features: int, out_features: int, rank: int, input_scale: bool = False) -> bool:
    """Whether backward keeps x [T, n] in place of z [T, r]."""
    return input_scale or (in_features <= rank and _by_weight(tokens, in_features, out_features, rank, False))


def gradient_cost(tokens: int, in_features: int, out_features: int, rank: int, input_scale: bool = False) -> int:
    """Multiply-adds of the vectors' gradients, without the gradient of x."""
    n, m, passes = in_features, out_features, 2 if input_scale else 1
    kept = keeps_input(tokens, n, m, rank, input_scale)
    by_weight = kept and _by_weight(tokens, n, m, rank, input_scale)
    return m * n * (tokens + passes * rank) if by_weight else passes * tokens * rank * (n + m)


def _by_weight(tokens: int, n: int, m: int, rank: int, input_scale: bool) -> bool:
    """Whether gᵀ x [m, n] is the cheaper way to the vectors' gradients."""
    passes = 2 if input_scale else 1
    return m * n * (tokens + passes * rank) < passes * tokens * rank * (n + m)


def summed_weight(module: torch.nn.Linear, factors: Factors, dtype: torch.dtype) -> Tensor:
    """W + ΔW [m, n] in ``dtype``, a new tensor."""
    weight = quantization.dequantized_weight(module, dtype)
    quantized = isinstance(module, (quantization.Linear4bit, quantization.Linear8bit))
    # a copy made for this call takes ΔW in place; a weight that the layer goes on holding must not change
    is_copy = weight.dtype != module.weight.dtype
    if quantized:
        is_copy = quantization.resident_weight(module, dtype) is None
    in_c, after = split_scale(factors.scale, dtype)
    assert factors.vectors is not None
    C = combined(factors.B, *factors.vectors, in_c, dtype)
    A = _scaled(factors.A, factors.a, dtype).to(dtype)
    return weight.addmm_(C, A, alpha=after) if is_copy else torch.addmm(weight, C, A, alpha=after)


class HeldWeight:
    """W + ΔW of one layer [m, n], until its sources change."""

    def __init__(self) -> None:
        self.drop()

    def drop(self) -> None:
        """Drop the weight; the next `get` makes it again."""
        self._weight: Tensor | None = None
        self._frozen: list[tuple[Tensor, int]] = []
        self._vectors: list[Tensor | None] = []
        self._kind: tuple[float, torch.dtype] | None = None

    def get(self, module: torch.nn.Linear, factors: Factors, dtype: torch.dtype) -> Tensor:
        """`summed_weight`, cached. Do not change it in place."""
        # W, A and B are compared by address and version, and held, so that no other tensor gets their memory; vectors
        # are compared by value, since anything may have changed those
        frozen = [(t, 0 if t.is_inference() else t._version) for t in (module.weight, factors.A, factors.B)]
        vectors, kind = (factors.d, factors.b, factors.a), (factors.scale, dtype)
        is_same = (
            self._kind == kind
            and all(
                known.data_ptr() == now.data_ptr() and known.shape == now.shape and known_version == version
                for (known, known_version), (now, version) in zip(self._frozen, frozen, strict=True)
            )
            and all(
                known is now or (known is not None and now is not None and torch.equal(known, now))
                for known, now in zip(self._vectors, vectors, strict=True)
            )
        )
        if self._weight is None or not is_same:
            self.drop()  # first, so that no two are in memory
            self._weight = summed_weight(module, factors, dtype)
            self._frozen, self._kind = frozen, kind
            self._vectors = [None if v is None else v.detach().clone() for v in vectors]
        return self._weight


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor | None,
        d: Tensor,
        b: Tensor,
        A: Tensor,
        B: Tensor,
        scale: float,
        module: torch.nn.Linear,
        a: Tensor | None,
        held: HeldWeight | None,
    ) -> Tensor:
        ctx.save_for_backward(x if z is None else z, d, b, A, B, a)
        ctx.scale, ctx.module, ctx.keeps_input = scale, module, z is None
        ctx.held = held
        bias = None if module.bias is None else module.bias.to(x.dtype)
        weight = (summed_weight if held is None else held.get)(module, Factors(A, B, d, b, scale, a), x.dtype)
        y = F.linear(x.reshape(-1, x.shape[-1]), weight, bias)
        return as_output(y, torch.Size((*x.shape[:-1], y.shape[-1])))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        kept, d, b, A, B, a = ctx.saved_tensors
        grad_x = grad_d = grad_b = grad_a = None
        scaled = _scaled(A, a, g.dtype)
        # ∂x = g (W + ΔW); where it is not held it is made again, since forward's of every layer would fill the memory
        if ctx.needs_input_grad[0] and ctx.held is not None:
            grad_x = g @ ctx.held.get(ctx.module, Factors(A, B, d, b, ctx.scale, a), g.dtype)
        elif ctx.needs_input_grad[0]:
            grad_x = g @ summed_weight(ctx.module, Factors(scaled, B, d, b, ctx.scale), g.dtype)
        rows, kept = g.reshape(-1, g.shape[-1]), kept.reshape(-1, kept.shape[-1])
        # M for ∂b and ∂d, and N for ∂a, both from gᵀ x if that was the reason to keep x, else token by token
        by_weight = ctx.keeps_input and (a is None or _by_weight(len(rows), A.shape[1], len(B), len(A), True))
        whole = rows.t() @ kept if by_weight else None  # gᵀ x
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            if whole is not None:
                M = wide_product(whole, scaled.to(g.dtype).t())
            else:
                M = wide_product(rows.t(), kept @ scaled.t() if ctx.keeps_input else kept)
            grad_d, grad_b, _ = vector_gradients(M, B, d, b, ctx.scale, *ctx.needs_input_grad[2:4])
        if a is not None and ctx.needs_input_grad[8]:
            in_c, after = split_scale(ctx.scale, g.dtype)
            C = combined(B, d, b, in_c, g.dtype)
            N = C.t() @ whole if whole is not None else (rows @ C).t() @ kept
            grad_a = (A.to(a.dtype) * N).sum(0).mul_(after)
        return grad_x, None, grad_d, grad_b, None, None, None, None, grad_a, None


def _scaled(A: Tensor, a: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A diag(a) [r, n] in ``dtype``; without an a, A as it is."""
    return A if a is None else (A * a).to(dtype)


def summed_linear(
    module: torch.nn.Linear, x: Tensor, z: Tensor | None, factors: Factors, held: HeldWeight | None = None
) -> Tensor:
    """y = x (W + ΔW)ᵀ + bias, [..., m] in x's dtype. Differentiable once in x, d, b and a; W and bias get no gradient.

    x is [..., n] in the compute dtype, and z = x Aᵀ [..., r] has no graph. z None: backward keeps x instead
    (`keeps_input`), as it must if there is an a. ``held`` None: W + ΔW is made anew, forward and backward.
    """
    A, B, d, b, scale, a, *_ = factors
    return _Summed.apply(x, z, d, b, A, B, scale, module, a, held)
