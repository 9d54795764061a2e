"""Momentum that lives in a random subspace, moved to another subspace (Flora, arXiv 2402.03293, algorithm 2)."""

from __future__ import annotations

import torch

from qvera.adapters.factors import Factors


def moved_momentum(momentum: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """The momentum of a gradient G [m, n] that is kept as G Pᵀ [m, r], in another subspace: M' = (M P_old) P_newᵀ.

    Decompressed by the old projection, compressed by the new one. With normal projections of variance 1 / r,
    E[Pᵀ P] = 1, so M' is the compressed momentum of the same G in expectation. For a projection from the left (P G)
    transpose everything.

    Args:
        momentum: M [m, r].
        old, new: P_old [r, n] and P_new [r', n].

    Returns:
        M' [m, r'].
    """
    return momentum @ (old @ new.t())


def carried_share(old: Factors, new: Factors) -> torch.Tensor:
    """What `moved_momentum` makes of the momentum of VeRA's b, as a factor for each element: [m].

    ∂b_i = s (B_i ⊙ d) A ∂W_iᵀ is the gradient of row i of W in a subspace of one direction, v_i = s (B_i ⊙ d) A [n].
    With v_i / ‖v_i‖² in place of P_old, what comes over to v'_i is the momentum times v_i · v'_i / ‖v_i‖². For random
    pairs that is about 1 / √n.

    Args:
        old, new: of one linear, with A, B and d of two phases; b is not read.
    """
    assert old.d is not None
    assert new.d is not None
    left, right = old.scale * old.B.float() * old.d, new.scale * new.B.float() * new.d
    A, A_new = old.A.float(), new.A.float()
    own = ((left @ (A @ A.t())) * left).sum(1)
    return ((left @ (A @ A_new.t())) * right).sum(1) / own
