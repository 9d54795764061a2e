"""Leading singular vectors of a weight, and bounds on what its other singular vectors can hold of a vector.

Both take products with the weight instead of a full decomposition, which costs m n min(m, n) operations: minutes for
each linear of a 7B. Products are computed in the dtype of the weight, everything small in fp64. The same input gives
the same result: the start is drawn from a seed, and each left vector's largest entry is positive. Run on CPUs only so
far.
"""

from typing import NamedTuple

import torch

SMALL_SIDE = 128
"""A weight with a side of at most this many is decomposed fully: that is quicker there."""
_OVERSAMPLES = 8
_BLOCKS_A_CHECK, _MOST_BLOCKS = 4, 40
"""Blocks of a Krylov space between two looks at what has converged, and at most."""


class SingularVectors(NamedTuple):
    """W V = U diag(S): left vectors U [m, k], values S [k], falling, and right vectors V [n, k]."""

    U: torch.Tensor
    S: torch.Tensor
    V: torch.Tensor


def singular_vectors(weight: torch.Tensor) -> SingularVectors:
    """All min(m, n) singular vectors of a weight [m, n], in its dtype."""
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    return _with_fixed_signs(U, S, Vh.t())


def leading_singular_vectors(
    weight: torch.Tensor, count: int, at_least: int | None = None, seed: int = 0
) -> SingularVectors:
    """The ``count`` leading singular vectors of a weight [m, n], in its dtype, by block Krylov iteration.

    Musco and Musco, arXiv 1504.05477, algorithm 2, with more blocks until ‖Wᵀu − σv‖ is at the level of rounding for
    each of the ``count``. Memory beside the weight: at most 40 (count + 8) vectors on either side.

    Args:
        weight: W.
        count: how many.
        at_least: where the last ones take more than 40 blocks, fewer come back, but not fewer than this. Default: then
            the whole weight is decomposed.
        seed: of the start.
    """
    needed = count if at_least is None else at_least
    if weight.shape[0] < weight.shape[1]:  # the Krylov space is of the smaller side
        U, S, V = _leading(weight.t(), count, needed, seed)
        return _with_fixed_signs(V, S, U)
    return _with_fixed_signs(*_leading(weight, count, needed, seed))


def _leading(weight: torch.Tensor, count: int, needed: int, seed: int) -> SingularVectors:
    """The same for m >= n, with any signs."""
    n, block = weight.shape[1], count + _OVERSAMPLES
    last = 0 if n <= SMALL_SIDE else min(n // (2 * block), _MOST_BLOCKS)
    start = torch.randn(n, block, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    vectors = torch.linalg.qr(start.to(weight)).Q
    spaces: list[torch.Tensor] = []
    images: list[torch.Tensor] = []
    for number in range(1, last + 1):
        spaces.append(vectors)
        images.append(weight @ vectors)
        if number == last or number % _BLOCKS_A_CHECK == 0:
            found, converged = _of_space(weight, torch.cat(spaces, dim=1), torch.cat(images, dim=1), count)
            if converged == count or (number == last and converged >= needed):
                return SingularVectors(*(part[..., :converged] for part in found))
        vectors = weight.t() @ images[-1]
        for _ in range(2):  # once leaves an error where most of a vector was in the space already
            for space in spaces:
                vectors = vectors - space @ (space.t() @ vectors)
            vectors = torch.linalg.qr(vectors).Q
    return SingularVectors(*(part[..., :count] for part in singular_vectors(weight)))


def _of_space(
    weight: torch.Tensor, space: torch.Tensor, image: torch.Tensor, count: int
) -> tuple[SingularVectors, int]:
    """Rayleigh and Ritz: the singular vectors of W on a space, given W times the space, and how many are those of W.

    W V = U S holds exactly for each of them, Wᵀ U = V S only once they have converged.
    """
    wide = image.double()
    squares, turned = torch.linalg.eigh(wide.t() @ wide)
    S = squares.flip(0)[:count].clamp_min(torch.finfo(squares.dtype).tiny).sqrt()
    turned = turned.flip(1)[:, :count].to(weight)
    U, V, S = image @ turned / S.to(weight), space @ turned, S.to(weight)
    remainders = (weight.t() @ U - V * S).norm(dim=0)
    converged = remainders <= 50 * torch.finfo(weight.dtype).eps * S[0]
    return SingularVectors(U, S, V), int(converged.cumprod(dim=0).sum())


def _with_fixed_signs(U: torch.Tensor, S: torch.Tensor, V: torch.Tensor) -> SingularVectors:
    signs = U.gather(0, U.abs().argmax(dim=0, keepdim=True)).sign()
    signs[signs == 0] = 1
    return SingularVectors(U * signs, S, V * signs)


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
