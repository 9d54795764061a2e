"""ΔW of one adapter in one layer, in factors: the low-rank path that all methods share.

    ΔW = s diag(b) B M A diag(a)        A [r, n]   B [m, r]   M = diag(d) or a dense core R [r, r]   b [m]   a [n]

A missing factor counts as 1: LoRA has only A and B, VeRA also d and b.
With a magnitude m [m] (DoRA, arXiv 2402.09353) the rows of W + ΔW are scaled to the norms m.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qvera.adapters.products import functional
from qvera.kernels.low_rank import times_b


def no_zeros(norms: Tensor) -> Tensor:
    """The norms with 1 in place of 0, so that a row of zeros can be divided."""
    return norms.masked_fill(norms == 0, 1.0)


class Factors(NamedTuple):
    """ΔW [m, n] in factors."""

    A: Tensor  # [r, n]
    B: Tensor  # [m, r]
    d: Tensor | None = None  # [r], fp32 or wider
    b: Tensor | None = None  # [m], or [G, m] with b_groups; only with d
    scale: float = 1.0
    a: Tensor | None = None  # [n]
    R: Tensor | None = None  # [r, r], without d and b
    magnitude: Tensor | None = None  # [m]

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.B.shape[-2], self.A.shape[-1]

    @property
    def rank(self) -> int:
        """The rank r, which is the number of rows of A."""
        return self.A.shape[-2]

    @property
    def vectors(self) -> tuple[Tensor, Tensor] | None:
        """d and b, or None unless both are there. With both, the path is VeRA's, with its own backward and kernels."""
        return None if self.d is None or self.b is None else (self.d, self.b)

    def expand(self, base: Tensor, z: Tensor, overwrite: bool = False) -> Tensor:
        """y = base + s diag(b) B M z [..., m] in base's dtype, for z = A diag(a) x [..., r] in the compute dtype."""
        if (vectors := self.vectors) is not None:
            return functional.expand(base, z, *vectors, self.B, self.scale, overwrite)
        inner = z if self.R is None else functional.core(z, self.R)
        inner = inner if self.d is None else functional.scale_input(inner, self.d)
        return functional.add_product(base, inner, self.B, self.scale, overwrite)

    def lora(self) -> tuple[Tensor, Tensor]:
        """A' = s M A diag(a) [r, n] and B' = diag(b) B [m, r] in fp32, without a graph: ΔW = B' A'."""
        A, B, d, b, scale, a, R, _ = self.detached()
        right = A if R is None else R @ A
        right = right * scale if d is None else (d * scale).unsqueeze(1) * right
        return right if a is None else right.mul_(a), B if b is None else times_b(B, b)

    def delta(self) -> Tensor:
        """ΔW [m, n] in fp32, without a graph."""
        A, B, d, b, scale, a, *_ = self.detached()
        if d is not None and b is not None:
            return functional.delta_weight(A, B, d, b, scale, a)
        right, left = self.lora()
        return left @ right

    def change(self, weight: Tensor) -> Tensor:
        """The change of W [m, n], in fp32 without a graph: ΔW, or with a magnitude diag(m / ‖W + ΔW‖) (W + ΔW) - W."""
        delta = self.delta()
        if self.magnitude is None:
            return delta
        weight = weight.detach().to(delta)
        summed = delta.add_(weight)
        factor = self.magnitude.detach().float() / no_zeros(torch.linalg.vector_norm(summed, dim=1))
        return summed.mul_(factor.unsqueeze(1)).sub_(weight)

    def outputs(self, part: slice) -> Factors:
        """Return the factors of these rows of ΔW."""
        b, m = (None if v is None else v[..., part] for v in (self.b, self.magnitude))
        return self._replace(B=self.B[part], b=b, magnitude=m)

    def inputs(self, part: slice) -> Factors:
        """Return the factors of these columns of ΔW."""
        return self._replace(A=self.A[:, part], a=None if self.a is None else self.a[part])

    def expert(self, number: int) -> Factors:
        """Return the factors of one expert's ΔW; self where the experts of a layer share all factors."""
        if self.A.dim() == 3:
            return self._replace(A=self.A[number], B=self.B[number])
        if self.d is None or self.d.dim() == 1:
            return self
        d, b, a = (None if v is None else v[number] for v in (self.d, self.b, self.a))
        return self._replace(d=d, b=b, a=a)

    def detached(self) -> Factors:
        """All factors in fp32, without a graph."""
        parts = (p.detach().float() if isinstance(p, Tensor) else p for p in self)
        return Factors(*parts)  # type: ignore[arg-type]
