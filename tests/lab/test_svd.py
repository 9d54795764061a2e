"""The truncated SVD of a frozen weight: against torch's, against LoRA-XS's own numbers, and the ranks of SARA's rule."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qvera.lab import svd
from qvera.lab.svd import TruncatedSvd, rank_of_share, rows_of, rows_of_tensor, singular_values, truncated_svd
from tests.adapters.helpers import FOUR_BIT, IN, KINDS, OUT, base_layer, dense_weight
from tests.lab.authors import numbers_of


def decaying(m: int, n: int, fall: float = 0.97, seed: int = 0) -> torch.Tensor:
    """A random weight [m, n] fp64 whose singular values fall by that factor each."""
    torch.manual_seed(seed)
    side = min(m, n)
    left, right = torch.linalg.qr(torch.randn(m, side).double()).Q, torch.linalg.qr(torch.randn(n, side).double()).Q
    return left * fall ** torch.arange(side) @ right.t()


def assert_is_svd_of(weight: torch.Tensor, found: TruncatedSvd, tolerance: float) -> None:
    """Values, both spaces, and the pairing of their vectors, against torch's SVD."""
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    rank = len(found.S)
    torch.testing.assert_close(found.S, S[:rank], rtol=tolerance, atol=tolerance)
    identity = torch.eye(rank).double()
    torch.testing.assert_close(found.U.t() @ found.U, identity)
    torch.testing.assert_close(found.V.t() @ found.V, identity)
    # cosines of the angles between the spaces
    assert torch.linalg.svdvals(U[:, :rank].t() @ found.U)[-1] > 1 - tolerance
    assert torch.linalg.svdvals(Vh[:rank] @ found.V)[-1] > 1 - tolerance
    torch.testing.assert_close(weight.double() @ found.V, found.U * found.S, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("shape", "rank"), [((40, 24), 24), ((24, 40), 7), ((33, 33), 1), ((300, 65), 24)], ids=str)
def test_it_is_the_svd(shape: tuple[int, int], rank: int) -> None:
    weight = decaying(*shape)
    assert_is_svd_of(weight, truncated_svd(rows_of_tensor(weight), rank), 1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_kind_of_layer_is_read_as_stored(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 4-bit weight too: it is not rounded to what the layer computes in."""
    monkeypatch.setattr(svd, "_CHUNK_ELEMENTS", 5 * IN)  # several blocks, and a last one that is smaller
    layer = base_layer(kind, dtype)
    rows = rows_of(layer)
    weight = torch.cat([block.float() for block in rows.read()])
    assert rows.shape == weight.shape == (OUT, IN)
    assert_is_svd_of(weight, truncated_svd(rows, 5), 1e-3)
    if kind in FOUR_BIT:
        layer.compute_dtype = layer.weight.quant_state.dtype = torch.float32
    torch.testing.assert_close(weight.double(), dense_weight(layer), rtol=1e-6, atol=1e-7)


def test_a_flat_spectrum_is_captured_almost_whole() -> None:
    """Values of a random weight lie close together, as a language model's do: the energy counts, not each vector."""
    torch.manual_seed(0)
    weight = torch.randn(400, 300).double()
    best = torch.linalg.svdvals(weight)
    for rank in (4, 16, 64):
        found = truncated_svd(rows_of_tensor(weight), rank)
        assert (best[:rank] ** 2).sum() / (found.S**2).sum() < 1 + 1e-4


def test_the_same_bits_again_however_the_rows_come(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = decaying(90, 70).float()
    first, again = (truncated_svd(rows_of_tensor(weight), 9) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    monkeypatch.setattr(svd, "_CHUNK_ELEMENTS", 7 * 70)
    blocked = truncated_svd(rows_of_tensor(weight), 9)
    for a, b in zip(first, blocked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_signs_survive_rounding() -> None:
    """A weight that was rounded otherwise gives the same vectors with the same signs, close values included."""
    weight = decaying(120, 80, fall=0.9995)
    noisy = weight * (1 + 1e-10 * torch.randn(weight.shape).double())
    one, other = (truncated_svd(rows_of_tensor(w), 40) for w in (weight, noisy))
    torch.testing.assert_close(one.U, other.U, rtol=0, atol=1e-5)
    torch.testing.assert_close(one.V, other.V, rtol=0, atol=1e-5)


def test_a_weight_of_lower_rank_has_zeros_for_the_rest() -> None:
    weight = decaying(30, 20) @ decaying(20, 20)[:, :3] @ torch.randn(3, 20).double()
    found = truncated_svd(rows_of_tensor(weight), 6)
    assert (found.S[3:] < 1e-12).all()
    torch.testing.assert_close(found.U.t() @ found.U, torch.eye(6).double())
    torch.testing.assert_close(found.U * found.S @ found.V.t(), weight)
    assert torch.isfinite(truncated_svd(rows_of_tensor(torch.zeros(8, 5)), 5).U).all()


@pytest.mark.parametrize("rank", [0, 25])
def test_a_rank_beyond_the_weight_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"1 to 24 singular values, and {rank}"):
        truncated_svd(rows_of_tensor(torch.ones(40, 24)), rank)


@pytest.mark.parametrize("version", ["sk0240", "sk191"])
@pytest.mark.parametrize("case", ["tall", "wide"])
def test_the_pair_of_lora_xs(case: str, version: str) -> None:
    """A and B of the authors' code, which their two scikit-learns give with different signs."""
    theirs = numbers_of(f"lora_xs_{case}")
    A, B = (theirs[f"{version}_{name}_{case}"] for name in "AB")
    ours = truncated_svd(rows_of_tensor(theirs[f"W_{case}"]), int(theirs["r"]))
    mine_A, mine_B = ours.pair()
    signs = torch.sign((mine_B * B).sum(dim=0))
    torch.testing.assert_close(mine_A * signs.unsqueeze(1), A, rtol=0, atol=1e-10)
    torch.testing.assert_close(mine_B * signs, B, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", ["fast", "slow"])
def test_the_ranks_of_sara(case: str) -> None:
    known = numbers_of("sara_ranks_numpy")
    values = singular_values(rows_of_tensor(known[f"{case}_W"]))
    torch.testing.assert_close(values, known[f"{case}_singular_values"], rtol=0, atol=1e-12)
    assert [rank_of_share(values, share) for share in known["thresholds"].tolist()] == known[f"{case}_ranks"].tolist()


def test_all_of_the_sum_takes_all_values_that_are_not_zero() -> None:
    assert rank_of_share(torch.tensor([3.0, 2.0, 1.0]), 1.0) == 3
    assert rank_of_share(torch.tensor([3.0, 2.0, 1.0]), 0.5) == 1
    assert rank_of_share(torch.tensor([1.0] * 7), 1.0) == 7
    assert rank_of_share(torch.tensor([1.0, 0.0, 0.0]), 1.0) == 1


@pytest.mark.parametrize("shape", [(50, 30), (30, 50)], ids=str)
def test_singular_values_by_blocks_of_rows_or_columns(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svd, "_CHUNK_ELEMENTS", 400)
    weight = nn.Linear(shape[1], shape[0]).weight.detach()
    torch.testing.assert_close(
        singular_values(rows_of_tensor(weight)), torch.linalg.svdvals(weight.double()), rtol=1e-9, atol=1e-9
    )
