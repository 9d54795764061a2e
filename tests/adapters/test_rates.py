"""``adapter.d_initial`` is what a learning rate of its own for d would be: there is no second key for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from qvera.adapters import QveraConfig
from qvera.adapters.files.save_load import named_vectors

IN, OUT, RANK, STEPS = 24, 40, 8, 6


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(IN, OUT), nn.Linear(OUT, IN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def output_after(d_initial: float, b_rate: float, d_rate: float) -> torch.Tensor:
    """Where AdamW is after a few steps. Its eps is next to nothing, as gradients scale with what they are taken by."""
    config = QveraConfig(rank=RANK, target_modules=["first", "second"], d_initial=d_initial)
    model: Any = get_peft_model(Two(), config)  # type: ignore[arg-type]
    vectors = named_vectors(model)
    groups = [
        {"params": [v for name, v in vectors.items() if ("qvera_b" in name) == first], "lr": rate}
        for first, rate in ((True, b_rate), (False, d_rate))
    ]
    assert all(len(group["params"]) == 2 for group in groups)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(groups, eps=1e-30, weight_decay=0.0)
    x, y = torch.randn(16, IN, generator=torch.Generator().manual_seed(1)), torch.ones(16, IN)
    for _ in range(STEPS):
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("ratio", [0.25, 3.0])
def test_one_rate_with_another_d_initial_is_two_rates(ratio: float) -> None:
    one = output_after(0.1 * ratio, 0.02, 0.02)
    two = output_after(0.1, 0.02 * ratio, 0.02 / ratio)
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    plain = output_after(0.1, 0.02, 0.02)
    assert (one - plain).abs().max() > 1e-3, "the ratio does nothing, so the comparison shows nothing"
