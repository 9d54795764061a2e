"""Losses of explicit targets through the chunked head, against autograd over whole logits in fp64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from qvera.models.loss import target_loss
from qvera.models.token_losses import TOKEN_LOSSES, sequence_ratios, weigher
from tests.adapters.helpers import dense_weight, relative
from tests.models.test_loss import HIDDEN, VOCABULARY, head

TOKENS = 23
ROW = torch.tensor([0] * 9 + [1] * 4 + [2] * 10)


def plain_loss(name: str, lp: Tensor, given: Mapping[str, Tensor], settings: Mapping[str, float]) -> Tensor:
    """The loss of one row by its formula alone; autograd finds the weights."""
    if name == "cross_entropy":
        return -(given["weights"] * lp).sum()
    q, A = given["logprobs"], given["advantages"]
    low, high = settings.get("clip_low_threshold", 0.0), settings.get("clip_high_threshold", 0.0)
    ratio = (lp - q).exp()
    if name == "importance_sampling":
        return -(ratio * A).sum()
    if name == "cispo":
        return -(ratio.clamp(low, high).detach() * lp * A).sum()
    if name == "dro":
        return -(A * lp - settings["beta"] / 2 * (lp - q) ** 2).sum()
    if name == "gspo":
        mask = given["sequence_ratio_mask"]
        mean = (mask * (lp - q)).sum() / mask.sum().clamp_min(1.0)
        ratio = mean.exp().detach() * (lp - lp.detach()).exp()
    return -torch.minimum(ratio * A, ratio.clamp(low, high) * A).sum()


@pytest.mark.parametrize("name", TOKEN_LOSSES)
@pytest.mark.parametrize(("chunk", "settings", "dtype"), [(7, {}, torch.float32), (64, {"softcap": 4.0, "scale": 0.7}, torch.float64)])  # fmt: skip
def test_value_gradient_and_log_probabilities(
    name: str, chunk: int, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(5)
    hidden = (2 * torch.randn(TOKENS, HIDDEN, generator=g)).to(dtype).requires_grad_()
    each = 3 if name == "cross_entropy" else 1
    targets = torch.randint(0, VOCABULARY, (TOKENS, each), generator=g)
    own_head = head(dtype, **settings)
    wide = hidden.detach().double().requires_grad_()
    logits = wide @ dense_weight(own_head.module).t() * own_head.scale
    if own_head.softcap is not None:
        logits = own_head.softcap * torch.tanh(logits / own_head.softcap)
    lp = logits.log_softmax(1).gather(1, targets)
    given = {
        "weights": 3 * torch.randn(TOKENS, each, generator=g),  # of any sign
        "logprobs": lp.detach().float() + 0.4 * torch.randn(TOKENS, each, generator=g),
        "advantages": torch.randn(TOKENS, each, generator=g),
        "sequence_ratio_mask": (torch.rand(TOKENS, each, generator=g) < 0.7).float(),
    }
    loss = TOKEN_LOSSES[name]
    chosen = {key: 0.05 if usual is None else usual for key, usual in loss.settings.items()}
    parts = [({key: tensor[row == ROW].double() for key, tensor in given.items()}, lp[row == ROW]) for row in range(3)]
    expected = torch.stack([plain_loss(name, lps, own, chosen) for own, lps in parts]).sum()
    if loss.by_row:
        _, logprobs = target_loss(
            hidden.detach(), targets, own_head, chunk, weigher(TOKEN_LOSSES["cross_entropy"], given, {})
        )
        given["sequence_ratio"] = sequence_ratios(logprobs, given, ROW, 3)
    found, logprobs = target_loss(hidden, targets, own_head, chunk, weigher(loss, given, chosen))
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert relative(logprobs, lp) < tolerance and not logprobs.requires_grad
    assert found.item() == pytest.approx(expected.item(), rel=10 * tolerance)
    assert relative(torch.autograd.grad(found, hidden)[0], torch.autograd.grad(expected, wide)[0]) < tolerance


def test_a_ratio_beyond_its_bounds_weighs_nothing_where_clipping_holds_it_back() -> None:
    lp, q = torch.tensor([[-1.0], [-1.0], [-1.0], [-1.0]]), torch.tensor([[-2.0], [-2.0], [-0.5], [-0.5]])
    given = {"logprobs": q, "advantages": torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])}
    loss, weights = TOKEN_LOSSES["ppo"].compute(lp, given, {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2})
    rising, falling = torch.tensor([1.0, -0.5]).exp().tolist()
    assert loss.flatten().tolist() == pytest.approx([-1.2, rising, -falling, 0.8])
    assert weights.flatten().tolist() == pytest.approx([0, -rising, falling, 0])


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo", "gspo"])
def test_an_advantage_of_zero_weighs_nothing_however_unlikely_the_token_was(name: str) -> None:
    lp, given = torch.tensor([[-1.0]]), {"logprobs": torch.tensor([[-1e4]]), "advantages": torch.zeros(1, 1)}
    given["sequence_ratio"] = sequence_ratios(
        lp, {"sequence_ratio_mask": torch.ones(1, 1), **given}, torch.tensor([0]), 1
    )
    loss = TOKEN_LOSSES[name]
    found, weights = weigher(loss, given, {key: usual or 0.0 for key, usual in loss.settings.items()})(lp, slice(None))
    assert (found.item(), weights.item()) == (0, 0)
