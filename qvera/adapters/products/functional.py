"""The mathematics of VeRA: forward, backward and ΔW as pure functions over tensors. Vectors are fp32 or wider.

Notation (VeRA, arXiv 2310.11454, equation 2, with the Kaiming bounds as one scalar s, see `projection.vera_scale`):

    x [T, n] input      A [r, n], B [m, r] frozen and shared      d [r], b [m] trained      s scalar
    z = x Aᵀ            y = base + b ⊙ ((s d ⊙ z) Bᵀ) = base + z Cᵀ      with C = diag(b) B diag(s d)   [m, r]

and for the upstream gradient g [T, m]:

    M  = gᵀ z                           one product [m, r]: everything that the vectors need
    ∂b_i = s Σ_k M_ik B_ik d_k          ∂d_k = s Σ_i b_i B_ik M_ik          ∂z = g C

Only z is kept for backward: A is frozen, so x is not needed, and building C again costs less than keeping it.
In fp16 C leaves out s, and the products have it: y = base + s z Cᵀ and ∂z = s (g C) (`split_scale`).

Two options go beyond the paper:

- b [G, m] cuts the rank into G equal groups of columns, each with its own row of b: a sum of G adapters of rank r / G,
  as RandLoRA sums random bases (arXiv 2502.00987, equation 3). b̂ ⊙ B replaces diag(b) B, with b̂ [m, r],
  b̂_ik = b[g(k), i] (`times_b`), and ∂b[g, i] = s Σ_{k in g} M_ik B_ik d_k.
- a [n] (``input_scale``) stands right of A, like RandLoRA's Γ: z = (a ⊙ x) Aᵀ. With h = ∂z A: ∂x = a ⊙ h and
  ∂a_j = Σ_t x_tj h_tj. x is kept, and layers that read the same x can't share z, since each has its own a.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qvera.kernels import once_differentiable
from qvera.kernels.low_rank import (
    as_groups,
    combined,
    scaled_columns,
    scaled_columns_backward,
    vector_gradients,
    wide_product,
)
from qvera.models import linear, quantization
from qvera.utils import accelerator


def at_least_fp32(vector: Tensor) -> Tensor:
    """A vector that TRL or PEFT cast to 16 bits, in fp32 again; others unchanged."""
    return vector.float() if vector.dtype.itemsize < 4 else vector


def split_scale(scale: float, dtype: torch.dtype) -> tuple[float, float]:
    """Split s into a factor of C and a factor of the products with C, for C in this dtype."""
    # s may be 0.003, and in fp16 small elements of C lose bits below 6e-5 and vanish below 3e-8
    return (1.0, scale) if dtype == torch.float16 else (scale, 1.0)


def as_output(flat: Tensor, shape: torch.Size) -> Tensor:
    """Reshape a fresh tensor for the output of an autograd function, as `torch.matmul` does."""
    # a view as output could not be changed in place, which transformers' Llama 4 does
    return torch.ops.aten._unsafe_view(flat, shape)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, done: Callable[..., None] | None) -> Tensor:
        ctx.set_materialize_grads(False)  # if all linears use `GradientSums`, no ∂z arrives, and zeros need not be made
        ctx.A, ctx.sums, ctx.done, ctx.shape = A, GradientSums(), done, x.shape
        return torch.nn.functional.linear(x, A)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.done is not None:
            ctx.done()
        return ctx.sums.of_input(g, ctx.A, ctx.shape), None, None


class GradientSums:
    """The sums of ∂x and of ∂z over the linears that share a z, in one backward pass.

    A product that adds to its result is one launch. Autograd takes two, and a node for each linear.
    """

    def __init__(self) -> None:
        self._held: dict[int, tuple[Tensor, Tensor]] = {}
        """Backward pass → ∂x [T, n] and ∂z [T, r]. A pass may end in an error, and be taken again."""

    def add(self, g: Tensor, W: Tensor, C: Tensor, scale: float) -> None:
        """∂x += g W and ∂z += scale g C, for g [T, m], W [m, n] and C [m, r]."""
        held = self._held.get(task := torch._C._current_graph_task_id())
        if held is None:
            self._held[task] = torch.mm(g, W), times(g, C, scale)
        else:
            held[0].addmm_(g, W)
            held[1].addmm_(g, C, alpha=scale)

    def of_input(self, g: Tensor | None, A: Tensor, shape: torch.Size) -> Tensor | None:
        """Return ∂x in the given shape, and forget the sums. None: nobody added to them, and ``g`` is None.

        ``g`` is ∂z of the linears that did not add theirs.
        """
        found = self._held.pop(torch._C._current_graph_task_id(), None)
        if found is None:
            return None if g is None else g @ A
        grad_x, grad_z = found
        if g is not None:
            grad_z.add_(g.reshape(grad_z.shape))
        return grad_x.addmm_(grad_z, A).view(shape)


def project(x: Tensor, A: Tensor, done: Callable[..., None] | None = None) -> Tensor:
    """z = x Aᵀ: [..., n] and [r, n] give [..., r]. ``done`` is called where backward comes through."""
    # a node of its own, so that layers which read the same x can share z: the ∂z of all are added up before the one
    # product of backward; A is frozen, so x is not kept
    if accelerator.is_accelerator(x.device.type) and not torch.compiler.is_compiling():
        return _Project.apply(x, A, done)
    z = torch.nn.functional.linear(x, A)
    if done is not None and z.requires_grad:
        z.register_hook(done)
    return z


class _ScaleInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor) -> Tensor:
        ctx.save_for_backward(x, a)
        return scaled_columns(x, a)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, h: Tensor) -> tuple[Tensor | None, ...]:
        x, a = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            return scaled_columns_backward(h, x, a)
        return scaled_columns(h, a), None


def scale_input(x: Tensor, a: Tensor) -> Tensor:
    """diag(a) x: [..., n] and [n] give [..., n] in x's dtype; differentiable once in both."""
    return _ScaleInput.apply(x, a)


class _Core(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, R: Tensor) -> Tensor:
        ctx.save_for_backward(z, R)
        return z @ R.to(z.dtype).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        z, R = ctx.saved_tensors
        grad_z = g @ R.to(g.dtype) if ctx.needs_input_grad[0] else None
        grad_R = None
        if ctx.needs_input_grad[1]:
            grad_R = wide_product(g.reshape(-1, g.shape[-1]).t(), z.reshape(-1, z.shape[-1])).to(R.dtype)
        return grad_z, grad_R


def core(z: Tensor, R: Tensor) -> Tensor:
    """R z: [..., r] and [r, r], fp32 or wider, give [..., r] in z's dtype; differentiable once in both."""
    return _Core.apply(z, R)


def add_product(base: Tensor, inner: Tensor, B: Tensor, scale: float, overwrite: bool = False) -> Tensor:
    """base + s inner Bᵀ: [..., m] and [..., r] give [..., m] in base's dtype. Differentiable in base, inner and B."""
    rows, flat = base.reshape(-1, base.shape[-1]), inner.reshape(-1, inner.shape[-1])
    if base.dtype != inner.dtype:
        return base + times(flat, B.to(inner.dtype).t(), scale).view(base.shape).to(base.dtype)
    add = rows.addmm_ if overwrite else rows.addmm
    return as_output(add(flat, B.to(inner.dtype).t(), alpha=scale), base.shape)


def outward(inner: Tensor, B: Tensor, b: Tensor, base: Tensor, index: Tensor | None = None) -> Tensor:
    """base + b ⊙ (inner Bᵀ), group by group, without C: [..., r] to [..., m] in base's dtype.

    b is [G, m], or with an ``index`` [R, G, m], and token t has b[index[t]].
    """
    groups, total = b.shape[-2], base
    for i, (part, columns) in enumerate(zip(inner.chunk(groups, -1), B.to(inner.dtype).chunk(groups, 1), strict=True)):
        total = scaled_columns(part @ columns.t(), b[..., i, :], 1.0, total, index, overwrite=True)
    return total


def few_tokens(tokens: int, B: Tensor, groups: int = 1) -> bool:
    """Whether scaling z and outputs, T (r + 2 G m) elements, touches fewer than building C [m, r]."""
    # compiled code has one path for all numbers of tokens (`qvera.models.checkpointing`)
    out_features, rank = B.shape
    return not torch.compiler.is_compiling() and tokens * (rank + 2 * groups * out_features) < out_features * rank


def delta_weight(A: Tensor, B: Tensor, d: Tensor, b: Tensor, scale: float, a: Tensor | None = None) -> Tensor:
    """ΔW = diag(b) B diag(s d) A diag(a): [m, n], in the dtype of the inputs."""
    delta = combined(B, d, b, scale, B.dtype) @ A
    return delta if a is None else delta.mul_(a)


def _expand(base: Tensor, z: Tensor, d: Tensor, b: Tensor, B: Tensor, scale: float, overwrite: bool) -> Tensor:
    flat = z.reshape(-1, z.shape[-1])
    if few_tokens(flat.shape[0], B, b.numel() // B.shape[0]):  # a decoding step: C would cost more
        rows = base.reshape(-1, base.shape[-1])
        return as_output(outward(scaled_columns(flat, d, scale), B, as_groups(b), rows), base.shape)
    in_c, after = split_scale(scale, z.dtype)
    return add_product(base, z, combined(B, d, b, in_c, z.dtype), after, overwrite)


def times(left: Tensor, right: Tensor, factor: float) -> Tensor:
    """factor left @ right; the factor is applied before rounding."""
    if factor == 1.0:
        return left @ right
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=factor)  # beta 0: the first one is not read


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor | None,
        z: Tensor,
        d: Tensor,
        b: Tensor,
        B: Tensor,
        scale: float,
        overwrite: bool,
        joined: tuple[torch.nn.Linear, Tensor, GradientSums | None] | None,
    ) -> Tensor:
        ctx.save_for_backward(z, d, b, B)
        ctx.scale, ctx.module = scale, None
        if base is None:
            assert joined is not None
            ctx.module, x, ctx.sums = joined
            # else of three dimensions it may be a product for each row
            base = linear.frozen_product(ctx.module, x.contiguous())
        return _expand(base, z, d, b, B, scale, overwrite)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        z, d, b, B = ctx.saved_tensors
        need_base, need_z, need_d, need_b = ctx.needs_input_grad[:4]
        g_flat = g.reshape(-1, g.shape[-1]).to(z.dtype)
        z_flat = z.reshape(-1, z.shape[-1])
        in_c, after = split_scale(ctx.scale, z.dtype)
        grad_z = grad_d = grad_b = C = None
        if need_d or need_b:
            M = wide_product(g_flat.t(), z_flat)
            dtype = z.dtype if need_z else None
            grad_d, grad_b, C = vector_gradients(M, B, d, b, ctx.scale, need_d, need_b, in_c, dtype)
        if need_z:
            # in fp16 g ⊙ b would lose what C does not
            may = C is None and ctx.module is None and z.dtype != torch.float16
            if may and few_tokens(z_flat.shape[0], B, b.numel() // B.shape[0]):
                each = zip(as_groups(b).to(z.dtype), B.to(z.dtype).chunk(b.numel() // B.shape[0], 1), strict=True)
                inward = torch.cat([(g_flat * own) @ columns for own, columns in each], 1)
                grad_z = scaled_columns(inward, d, ctx.scale).view(z.shape)
            else:
                C = combined(B, d, b, in_c, z.dtype) if C is None else C
                if ctx.module is None:
                    grad_z = times(g_flat, C, after).view(z.shape)
                else:
                    # the node of z has these sums, and turns them into ∂x once all layers over x have added theirs: so
                    # no gradient of z is returned, and autograd adds none
                    ctx.sums.add(g_flat, quantization.dequantized_weight(ctx.module, g.dtype), C, after)
        return (g if need_base else None), grad_z, grad_d, grad_b, None, None, None, None


def expand(base: Tensor, z: Tensor, d: Tensor, b: Tensor, B: Tensor, scale: float, overwrite: bool = False) -> Tensor:
    """y = base + b ⊙ ((s d ⊙ z) Bᵀ), [..., m] in base's dtype. Differentiable once in base, z, d and b.

    ``base`` [..., m] is the frozen layer's output, ``z`` [..., r] that of `project`, in the compute dtype. d [r] and
    b [m] or [G, m] are fp32 or wider, like their gradients; B [m, r] is frozen, in any dtype. ``scale`` is
    `projection.vera_scale`. ``overwrite``: y may take base's memory; nobody else may read base, in backward neither.
    """
    if not torch.is_grad_enabled():  # a decoding step is short enough for the bookkeeping of autograd to show
        return _expand(base, z, d, b, B, scale, overwrite)
    return _Expand.apply(base, z, d, b, B, scale, overwrite, None)


def joined_linear(
    module: torch.nn.Linear, x: Tensor, z: Tensor, d: Tensor, b: Tensor, B: Tensor, scale: float
) -> Tensor:
    """y = x Wᵀ + bias + b ⊙ ((s d ⊙ z) Bᵀ) as one node, [..., m] in x's dtype; W and bias get no gradient.

    On an accelerator, where a short batch waits for the host, and a node takes some 30 µs of it. x [..., n] is in the
    compute dtype. The others are those of `expand`.
    """
    # x is no input of the node: its gradient goes by way of z
    return _Expand.apply(None, z, d, b, B, scale, True, (module, x, getattr(z.grad_fn, "sums", None)))
