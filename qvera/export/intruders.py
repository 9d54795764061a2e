"""Intruder dimensions of a fine-tuned weight (LoRA vs Full Fine-tuning, arXiv 2410.21228), and their mitigation.

A left singular vector of W + ΔW among the first k is an intruder where its largest cosine with a left singular vector
of W, with any of them, is below ε. The vectors of W + ΔW are compared, not those of ΔW, and their signs do not count.
"""

from typing import NamedTuple

import torch

from qvera.models.singular_vectors import (
    SingularVectors,
    largest_share_bounds,
    leading_singular_vectors,
    singular_vectors,
)

DENSE_SIDE = 1024
"""A base weight with a side of at most this many is decomposed fully, so all of its cosines are exact."""


class Cosines(NamedTuple):
    """For each vector its largest cosine with a left singular vector of the base weight, fp64 [k].

    Where it is not ``exact`` it is a bound on the same side of ε: at most this of an intruder, else at least this.
    """

    values: torch.Tensor
    exact: torch.Tensor


class Intruders(NamedTuple):
    """The ``top`` k singular vectors of W + ΔW, the cosines of the left ones, and which of them are intruders [k]."""

    top: SingularVectors
    cosines: Cosines
    found: torch.Tensor


def find_intruders(weight: torch.Tensor, tuned: torch.Tensor, top_k: int, epsilon: float) -> Intruders:
    """The intruder dimensions of ``tuned`` = W + ΔW [m, n] among its first ``top_k`` singular vectors.

    ``weight`` is W, the base weight that was trained on, in the same dtype. Where both sides have fewer vectors than
    ``top_k``, all are looked at.
    """
    top = leading_singular_vectors(tuned, min(top_k, *tuned.shape))
    cosines = largest_cosines(weight, top.U, epsilon)
    return Intruders(top, cosines, cosines.values < epsilon)


def largest_cosines(weight: torch.Tensor, vectors: torch.Tensor, epsilon: float) -> Cosines:
    """The largest |cosine| of each of ``vectors`` [m, k], of length 1, with any left singular vector of W [m, n].

    Of a large weight, as much is computed as it takes to say on which side of ``epsilon`` each is:

    1. The cosines with the leading vectors of W: one of at least ``epsilon`` decides. What the leading ones leave of a
       vector bounds its cosine with every other.
    2. `largest_share_bounds` of what they leave: a vector that is spread over many others is close to none of them.
    3. All singular vectors of W, if one is still undecided.
    """
    m, n = weight.shape
    if min(m, n) <= DENSE_SIDE:
        return _exact_cosines(weight, vectors)
    leading = leading_singular_vectors(weight, 2 * vectors.shape[1], at_least=0).U
    shares = leading.t() @ vectors
    rest = vectors - leading @ shares
    none = shares.new_zeros(1, shares.shape[1])
    found, left = torch.cat([none, shares.abs()]).amax(dim=0).double(), rest.norm(dim=0).double()
    unclear = (found < epsilon) & (left >= epsilon)
    if unclear.any():
        inner, unknown = weight, rest[:, unclear]
        if m > n:  # a part of a vector outside the span of W belongs to no singular vector
            basis, inner = torch.linalg.qr(weight)
            unknown = basis.t() @ unknown
            del basis
        for steps in (32, 96):
            left[unclear] = torch.minimum(left[unclear], largest_share_bounds(inner, unknown, steps).sqrt())
            if (left[unclear] < epsilon).all():
                break
        else:
            return _exact_cosines(weight, vectors)
    return Cosines(torch.where(found < epsilon, torch.maximum(found, left), found), left <= found)


def _exact_cosines(weight: torch.Tensor, vectors: torch.Tensor) -> Cosines:
    values = (singular_vectors(weight).U.t() @ vectors).abs().amax(dim=0).double()
    return Cosines(values, torch.ones_like(values, dtype=torch.bool))


def mitigation_factors(intruders: Intruders, keep: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What takes each of k intruders down to λ = ``keep`` of itself, in factors: A [k, n] and B [m, k].

    B A = (λ − 1) Σ_i σ_i u_i v_iᵀ (the paper, section 5). Appended to the factors of ΔW this is exact: no rank is cut
    off.
    """
    U, S, V = (part[..., intruders.found] for part in intruders.top)
    return V.t().contiguous(), (keep - 1) * S * U


def delta_singular_values(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """The singular values of ΔW = B A [min(m, n, r)], falling, in fp64, by way of the factors' small cores."""
    left, right = (torch.linalg.qr(factor.double(), mode="r").R for factor in (B, A.t()))
    return torch.linalg.svdvals(left @ right.t())


def effective_rank(singular_values: torch.Tensor) -> float:
    """exp of the entropy of the singular values' shares of their sum (Roy and Vetterli, 2007); 0 for a zero matrix."""
    total = singular_values.sum()
    if not total > 0:
        return 0.0
    shares = (singular_values / total).double()
    return torch.special.entr(shares).sum().exp().item()
