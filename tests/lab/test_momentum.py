"""Flora's momentum between subspaces: the authors' run, and what it would carry over for VeRA's b."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qvera.adapters.factors import Factors
from qvera.adapters.projection import uniform_pair
from qvera.lab.resample import carried_share, moved_momentum

AUTHORS = Path(__file__).parent / "reference"


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_momentum_after_a_resample_is_the_authors(side: str) -> None:
    """In their second step M' = β moved(M) + (1 - β) P_new(update), with Adafactor's update."""
    stored = {name: torch.from_numpy(value) for name, value in np.load(AUTHORS / f"flora_{side}.npz").items()}
    root, beta, step = float(stored["rank"]) ** 0.5, stored["beta1"], 1
    row, column = stored["exp_avg_sq_row"][step], stored["exp_avg_sq_col"][step]
    update = stored["grad_decompressed"][step] / (row / row.mean()).sqrt().unsqueeze(1) / column.sqrt()
    before, after = stored["exp_avg"][0], stored["exp_avg"][step]
    old, new = stored["momentum_randn_old"][step] / root, stored["momentum_randn_new"][step] / root
    if side == "left":  # P [r, rows] G: its transpose is a projection from the right
        update, before, after = update.t(), before.t(), after.t()
    else:
        old, new = old.t(), new.t()
    moved = moved_momentum(before, old, new)
    torch.testing.assert_close(beta * moved + (1 - beta) * update @ new.t(), after, rtol=0, atol=1e-12)
    assert (moved - before).norm() > 0.1 * before.norm()


def test_little_of_the_momentum_of_b_comes_over() -> None:
    """The closed form is Flora's move along b's own direction of each row; of SmolLM2's linears it is some percent."""
    n, m, rank = 576, 32, 64
    old, new = (
        Factors(A=A, B=B, d=torch.rand(rank) + 0.1, scale=0.3)
        for A, B in (map(torch.from_numpy, uniform_pair(rank, n, m, seed)) for seed in (1, 2))
    )
    share = carried_share(old, new)
    for row in range(m):
        v, v_new = (f.scale * (f.B[row] * d) @ f.A for f, d in ((old, old.d), (new, new.d)) if d is not None)
        moved = moved_momentum(torch.ones(1, 1), (v / v.square().sum()).unsqueeze(0), v_new.unsqueeze(0))
        torch.testing.assert_close(share[row], moved[0, 0], rtol=1e-3, atol=1e-5)
    size = share.square().mean().sqrt()
    assert 0.2 * n**-0.5 < size < 5 * n**-0.5
    torch.testing.assert_close(carried_share(old, old), torch.ones(m))
