"""Intruder dimensions of a fine-tuned weight (LoRA vs Full Fine-tuning, arXiv 2410.21228), and their mitigation.

A left singular vector of W + ΔW among the first k is an intruder where its largest cosine with a left singular vector
of W, with any of them, is below ε. The vectors of W + ΔW are compared, not those of ΔW, and their signs do not count.
"""

from typing import NamedTuple

import torch

from qvera.models.svd import TruncatedSvd, leading_singular_vectors, singular_vectors

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

    top: TruncatedSvd
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


def largest_share_bounds(weight: torch.Tensor, vectors: torch.Tensor, steps: int) -> torch.Tensor:
    """For each vector x, an upper bound on the largest (u_iᵀ x)² of all left singular vectors u_i of a weight [m, n].

    The Lanczos process on W Wᵀ, begun at x, gives the nodes and weights of the Gauss quadrature of x's spectral measure
    Σ (u_iᵀ x)² δ(σ_i²). By the inequalities of Chebyshev, Markov and Stieltjes no point has more of the measure than
    two neighbouring weights together (Golub and Meurant, "Matrices, Moments and Quadrature with Applications", 2010,
    chapters 4 and 6). So a vector that is spread over many singular vectors is known to be, before any of them is.

    Args:
        weight: [m, n] with m <= n: a part of x outside the span of W would count as one more vector.
        vectors: [m, j].
        steps: products with W Wᵀ.

    Returns:
        Bounds [j] in fp64, rising to ‖x‖² where nothing is known.
    """
    norms = vectors.norm(dim=0)
    alone = torch.finfo(weight.dtype).eps * weight.norm() ** 2  # a shorter remainder is rounding
    space = vectors.new_zeros(steps, *vectors.shape)
    space[0] = vectors / norms.clamp_min(torch.finfo(norms.dtype).tiny)
    diagonal, beside = [], []
    for step in range(steps):
        product = weight @ (weight.t() @ space[step])
        diagonal.append((space[step].double() * product.double()).sum(dim=0))
        if step == steps - 1:
            break
        known = space[: step + 1]
        for _ in range(2):
            product = product - torch.einsum("smj,sj->mj", known, torch.einsum("smj,mj->sj", known, product))
        length = product.norm(dim=0)
        goes_on = length > alone  # else the space holds all of x's measure
        space[step + 1] = torch.where(goes_on, product / length.clamp_min(alone), 0)
        beside.append(torch.where(goes_on, length, 0).double())
    matrix = torch.diag_embed(torch.stack(diagonal, dim=1))
    off = torch.stack(beside, dim=1) if beside else matrix.new_zeros(len(matrix), 0)
    matrix += torch.diag_embed(off, offset=1) + torch.diag_embed(off, offset=-1)
    weights = torch.linalg.eigh(matrix).eigenvectors[:, 0] ** 2  # [j, steps], nodes rising
    pairs = weights[:, 1:] + weights[:, :-1] if steps > 1 else weights
    return pairs.max(dim=1).values * norms.double() ** 2


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
