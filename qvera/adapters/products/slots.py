"""The products of a batch whose tokens use different adapters, forward and backward.

`expand_slots` is for adapters over one pair A, B. As in `functional`, with own vectors for each of R slots i:

    z = x Aᵀ            y_i = base_i + b_i ⊙ ((s d_i ⊙ z_i) Bᵀ)        d [R, r], b [R, m] or [R, G, m]

and for the upstream gradient g, summed over the tokens of a slot:

    u = (s d ⊙ z) Bᵀ    ∂b_i = Σ g_i ⊙ u_i        h = (g ⊙ b) B        ∂d_i = s Σ h_i ⊙ z_i        ∂z = s d ⊙ h

These are the same three dense products for any number of adapters. C or M would take [m, r] for each of them. Only z is
kept; u is computed again. No token is multiplied with another slot's vectors, not even with a zero in between.

`pair_slots` is for adapters with an A_i [r, n] and B_i [m, r] each, as LoRA has them (`low_rank`). Tokens are sorted by
slot, and each slot's tokens are multiplied with its own matrices: in one launch where the device can, else one by one.
On a CPU the slots are filled up with zeros to one length for one batched product, if that at most doubles the rows.
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qvera.adapters.products.functional import expand, outward, scale_input
from qvera.adapters.products.low_rank import trained_path
from qvera.adapters.projection import vera_scale
from qvera.kernels import once_differentiable
from qvera.kernels.low_rank import narrow_product, scaled_columns, wide_product
from qvera.models import linear
from qvera.utils import accelerator


@dataclass(frozen=True)
class TokenSlots:
    """Which slot each of T tokens uses, in any order: int64 [T], from 0 to ``slots`` - 1."""

    index: Tensor
    slots: int
    ends: tuple[int, ...] = ()
    """The places where each slot's tokens end, after a 0, if the host knows them and tokens are sorted by slot."""
    fixed: bool = False
    """Whether products must have shapes that do not depend on how many tokens a slot has, because last bits do."""

    @functools.cached_property
    def sorted(self) -> tuple[Tensor, Tensor]:
        """Tokens in the order of their slots, int64 [T], and where each slot begins there, int64 [R]."""
        slots, order = torch.sort(self.index, stable=True)
        return order, torch.searchsorted(slots, torch.arange(self.slots, device=slots.device))

    @functools.cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """The places where each slot's tokens begin and end in the sorted order. Without `ends` the host waits once."""
        return list(itertools.pairwise(self.ends or [*self.sorted[1].tolist(), len(self.index)]))

    @functools.cached_property
    def width(self) -> int | None:
        """How many rows each slot is filled up to on a CPU; None: slots have as many rows as they have tokens."""
        if self.fixed or self.index.device.type != "cpu":
            return None
        longest = max(end - start for start, end in self.bounds)
        return longest if longest * self.slots <= 2 * len(self.index) else None

    @functools.cached_property
    def places(self) -> Tensor | None:
        """Each token's row in the order of the slots, filled up to the `width`, int64 [T]; None: it is its own."""
        if self.ends and (self.width is None or self.width * self.slots == len(self.index)):
            return None
        order, begins = self.sorted
        row = torch.arange(len(order), device=order.device)
        if self.width is not None:
            slot = self.index[order]
            row += slot * self.width - begins[slot]
        return torch.empty_like(order).index_copy_(0, order, row)

    def to_rows(self, x: Tensor) -> Tensor:
        """x [..., k] of T tokens as rows by slot: [T, k], or [R · `width`, k] with zeros where a slot has no token."""
        x = x.reshape(-1, x.shape[-1])
        if self.places is None:
            return x
        if self.width is None:
            return x[self.sorted[0]]
        return x.new_zeros(self.slots * self.width, x.shape[-1]).index_copy_(0, self.places, x)

    def to_tokens(self, rows: Tensor) -> Tensor:
        """The reverse of `to_rows`, without the rows that have no token."""
        return rows if self.places is None else rows[self.places]


def _sum(left: Tensor, right: Tensor, dtype: torch.dtype, tokens: TokenSlots) -> Tensor:
    """Σ left ⊙ right over each slot's tokens, [..., k] twice → [R, k], in ``dtype`` and in a fixed order."""
    order, begins = tokens.sorted
    # embedding_bag adds each slot's rows in the order of the tokens; index_add has no fixed order on an accelerator
    product = torch.mul(left, right, out=torch.empty(left.shape, dtype=dtype, device=left.device))
    return F.embedding_bag(order, product.view(-1, product.shape[-1]), begins, mode="sum")


class _ExpandSlots(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, base: Tensor, z: Tensor, d: Tensor, b: Tensor, B: Tensor, scale: float, tokens: TokenSlots
    ) -> Tensor:
        ctx.save_for_backward(z, d, b, B)
        ctx.scale, ctx.tokens = scale, tokens
        return outward(scaled_columns(z, d, scale, index=tokens.index), B, b, base, tokens.index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        z, d, b, B = ctx.saved_tensors
        need_base, need_z, need_d, need_b = ctx.needs_input_grad[:4]
        tokens: TokenSlots = ctx.tokens
        upstream, B, groups = g.to(z.dtype), B.to(z.dtype), b.shape[1]
        sums, parts = [], []
        inner = scaled_columns(z, d, ctx.scale, index=tokens.index) if need_b else z
        for i, (part, columns) in enumerate(zip(inner.chunk(groups, -1), B.chunk(groups, 1), strict=True)):
            if need_b:
                sums.append(_sum(part @ columns.t(), upstream, b.dtype, tokens).unsqueeze(1))
            if need_z or need_d:
                parts.append(scaled_columns(upstream, b[:, i], index=tokens.index) @ columns)
        grad_z = grad_d = grad_b = None
        if sums:
            grad_b = sums[0] if groups == 1 else torch.cat(sums, 1)
        if parts:
            h = parts[0] if groups == 1 else torch.cat(parts, -1)
            grad_z = scaled_columns(h, d, ctx.scale, index=tokens.index) if need_z else None
            grad_d = _sum(h, z, d.dtype, tokens).mul_(ctx.scale) if need_d else None
        return (g if need_base else None), grad_z, grad_d, grad_b, None, None, None


def expand_slots(base: Tensor, z: Tensor, d: Tensor, b: Tensor, B: Tensor, scale: float, tokens: TokenSlots) -> Tensor:
    """y_i = base_i + b_i ⊙ ((s d_i ⊙ z_i) Bᵀ) for each slot i of the batch, in base's shape and dtype.

    Differentiable once in base, z, d and b. NaN or Inf in a slot does not reach other slots, forward or backward.

    ``base`` [..., m] is the frozen layer's output of T tokens, z = x Aᵀ [..., r] is in the compute dtype. d [R, r] and
    b [R, m], or [R, G, m] for G groups, are fp32 or wider, like their gradients; B [m, r] is frozen, in any dtype.
    ``scale`` is `projection.vera_scale`. ``tokens`` has each token's slot.
    """
    grouped = b if b.dim() == 3 else b.unsqueeze(1)
    return _ExpandSlots.apply(base, z, d, grouped, B, scale, tokens)


class _ScaleSlots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, tokens: TokenSlots) -> Tensor:
        ctx.save_for_backward(x, a)
        ctx.tokens = tokens
        return scaled_columns(x, a, index=tokens.index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, h: Tensor) -> tuple[Tensor | None, ...]:
        x, a = ctx.saved_tensors
        tokens: TokenSlots = ctx.tokens
        need_x, need_a = ctx.needs_input_grad[:2]
        grad_a = _sum(h, x, a.dtype, tokens) if need_a else None
        return scaled_columns(h, a, index=tokens.index) if need_x else None, grad_a, None


def scale_slots(x: Tensor, a: Tensor, tokens: TokenSlots) -> Tensor:
    """diag(a_i) x_i for each slot: [..., n] of T tokens and [R, n] give [..., n] in x's dtype; differentiable once."""
    return _ScaleSlots.apply(x, a, tokens)


_ALIGNED = 8
"""torch's grouped product takes matrices whose sides are multiples of this, in 16 bits."""


def _takes_groups(x: Tensor, weights: Tensor) -> bool:
    """Whether one launch multiplies the rows of all slots."""
    is_aligned = all(side % _ALIGNED == 0 for side in weights.shape[1:])
    return is_aligned and x.dtype == torch.bfloat16 and accelerator.multiplies_groups(x.device)


def _by_slot(x: Tensor, weights: Tensor, tokens: TokenSlots) -> Tensor:
    """Each slot's rows of x [S, k], as `to_rows` gives them, times its own matrix of ``weights`` [R, k, m]: [S, m]."""
    if tokens.width is not None:
        return _batched(x.unflatten(0, (tokens.slots, tokens.width)), weights.to(x.dtype)).flatten(0, 1)
    if tokens.fixed:
        # every row times every slot's matrix, of which one result is taken: the shapes are those of any other batch
        index, out = tokens.index[tokens.sorted[0]].unsqueeze(1), x.new_zeros(len(x), weights.shape[-1])
        for slot, weight in enumerate(weights):
            out = torch.where(index == slot, x @ weight.to(x.dtype), out)
        return out
    if _takes_groups(x, weights):
        ends = F.pad(tokens.sorted[1][1:], (0, 1), value=len(x))  # made on the device: a graph may record it
        return F.grouped_mm(x, weights.to(x.dtype), offs=ends.int())
    out = x.new_empty(len(x), weights.shape[-1])
    for weight, (start, end) in zip(weights, tokens.bounds, strict=True):
        out[start:end] = narrow_product(x[start:end], weight.to(x.dtype))
    return out


def _batched(left: Tensor, right: Tensor) -> Tensor:
    """[R, a, k] times [R, k, b]. A CPU takes up to ten times as long where the result has more rows than columns."""
    if left.shape[1] > right.shape[2]:
        return torch.bmm(right.transpose(1, 2), left.transpose(1, 2)).transpose(1, 2)
    return torch.bmm(left, right)


def _sums_by_slot(left: Tensor, right: Tensor, dtype: torch.dtype, tokens: TokenSlots) -> Tensor:
    """Σ left_t right_tᵀ over each slot's rows: [S, a] and [S, b] of `to_rows` give [R, a, b] in ``dtype``."""
    if tokens.width is not None:
        left, right = (rows.unflatten(0, (tokens.slots, tokens.width)) for rows in (left, right))
        return _batched(left.transpose(1, 2), right).to(dtype)
    return torch.stack([wide_product(left[a:b].t(), right[a:b]).to(dtype) for a, b in tokens.bounds])


class _PairSlots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, tokens: TokenSlots) -> Tensor:
        ctx.scale, ctx.tokens = scale, tokens
        z = _by_slot(tokens.to_rows(x), A.transpose(1, 2), tokens)
        ctx.save_for_backward(x, z, A, B)
        added = tokens.to_tokens(_by_slot(z, B.transpose(1, 2), tokens)).to(base.dtype)
        return base.add(added.view(base.shape), alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, z, A, B = ctx.saved_tensors
        tokens: TokenSlots = ctx.tokens
        need_base, need_x, need_A, need_B = ctx.needs_input_grad[:4]
        upstream = tokens.to_rows(g.to(z.dtype))
        grad_x = grad_A = grad_B = None
        if need_B:
            grad_B = _sums_by_slot(upstream, z, B.dtype, tokens).mul_(ctx.scale)
        if need_x or need_A:
            h = _by_slot(upstream, B, tokens).mul_(ctx.scale)
            if need_A:
                grad_A = _sums_by_slot(h, tokens.to_rows(x), A.dtype, tokens)
            if need_x:
                grad_x = tokens.to_tokens(_by_slot(h, A, tokens)).view(x.shape)
        return (g if need_base else None), grad_x, grad_A, grad_B, None, None


def pair_slots(base: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, tokens: TokenSlots) -> Tensor:
    """y_i = base_i + s B_i A_i x_i for each slot i of the batch, in base's shape and dtype.

    Differentiable once in base, x, A and B. NaN or Inf in a slot does not reach other slots, forward or backward.

    ``base`` [..., m] is the frozen layer's output of T tokens, x [..., n] its input in the compute dtype. A [R, r, n]
    and B [R, m, r] are fp32 or wider, like their gradients. ``tokens`` has each token's slot.
    """
    return _PairSlots.apply(base, x, A, B, scale, tokens)


def vera_slots(
    layer: Any,
    adapter: str,
    x: Tensor,
    y: Tensor,
    tensors: Mapping[str, Tensor],
    tokens: TokenSlots | None,
    gather: Tensor | None = None,
) -> Tensor:
    """y + b_i ⊙ B (s d_i ⊙ A (a_i ⊙ x_i)) for each token's slot i, with the pair of a layer's ``adapter``.

    ``tensors`` has d, b and a of the slots [R, ...] by kind. ``tokens`` None: there is one slot, which takes the path
    of an adapter by itself. ``gather``: the row of x that each row of y is of; None: they are the same.
    """
    pair, dtype = layer.qvera_projection[adapter], linear.compute_dtype(layer.base_layer, x)
    rank, inner = tensors["qvera_d"].shape[-1], layer.dropout_of(adapter)(x)
    if "qvera_a" in tensors:
        inner, gather = inner if gather is None else inner[gather], None
        inner, a = inner.to(dtype), tensors["qvera_a"]
        inner = scale_input(inner, a[0]) if tokens is None else scale_slots(inner, a, tokens)
    z = pair.project(inner, rank, dtype)  # once a token, and shared by layers that read the same x, where there is no a
    z = z if gather is None else z[gather]
    scale, B = vera_scale(rank, layer.in_features), pair.B[: layer.out_features, :rank]
    d, b = tensors["qvera_d"], tensors["qvera_b"]
    return expand(y, z, d[0], b[0], B, scale) if tokens is None else expand_slots(y, z, d, b, B, scale, tokens)


def lora_slots(
    layer: Any,
    adapter: str,
    x: Tensor,
    y: Tensor,
    tensors: Mapping[str, Tensor],
    tokens: TokenSlots | None,
    gather: Tensor | None = None,
) -> Tensor:
    """y + s B_i A_i x_i for each token's slot i, with the scale of the layer's ``adapter``.

    ``tensors`` has A and B of the slots by kind, [R, r, n] and [R, m, r]; the others are as those of `vera_slots`.
    """
    inner = layer.dropout_of(adapter)(x).to(linear.compute_dtype(layer.base_layer, x))
    inner = inner if gather is None else inner[gather]
    A, B, scale = tensors["qvera_A"], tensors["qvera_B"], layer.parts(adapter).scale
    return trained_path(y, inner, A[0], B[0], scale) if tokens is None else pair_slots(y, inner, A, B, scale, tokens)


PATHS: dict[str | None, Callable[..., Tensor]] = {"VERA": vera_slots, "LORA": lora_slots}
"""`Method.peft_type` → the function that adds each token's own adapter to y = W x.

Adapters of other methods can be neither in a bank nor on experts."""
