"""Experts on the fake accelerator: one wait of the host a layer, whatever number of experts, and launches that do not grow with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from qvera.models.experts import ExpertStack, StackScales, expert_specs, place_stack, run_experts
from tests.gpu.fake_accelerator import FakeAccelerator
from tests.gpu.own_process import measured

pytestmark = pytest.mark.process


def layer(fake: FakeAccelerator, count: int) -> dict[str, Any]:
    """What forward and backward of one layer's quantized experts take."""
    config = MixtralConfig(hidden_size=256, intermediate_size=512, num_local_experts=count)
    with torch.device("meta"):
        module = MixtralExperts(config)
    for name, spec in expert_specs(torch.nn.ModuleDict({"experts": module})).items():
        numbers = spec.rows * spec.columns

        def made(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=fake.device)

        blocks = numbers // 64
        scales = StackScales(
            made(count, blocks, dtype=torch.uint8), made(16), "nf4", 64, made(count, -(-blocks // 256)), made(256),
            made(count),
        )  # fmt: skip
        stack = ExpertStack(spec, made(count * numbers // 2, 1, dtype=torch.uint8), scales, torch.bfloat16)
        place_stack(torch.nn.ModuleDict({"experts": module}), name, stack)
    hidden = torch.empty(40, 256, dtype=torch.bfloat16, device=fake.device, requires_grad=True)
    chosen = torch.empty(40, 2, dtype=torch.int64, device=fake.device)
    shares = torch.empty(40, 2, dtype=torch.bfloat16, device=fake.device)
    with fake.record() as seen:
        out = run_experts(module, hidden, chosen, shares)
    forward = seen.to_dict()
    with fake.record() as seen:
        out.backward(torch.empty_like(out))
    return {"forward": forward, "backward": seen.to_dict(), "device": str(out.device)}


def test_the_host_waits_once_for_a_layer_s_experts() -> None:
    found = [measured(layer, count) for count in (8, 64)]
    for one in found:
        assert one["device"] == "fakegpu:0"
        assert list(one["forward"]["syncs"].values()) == [1]
        assert not one["backward"]["syncs"]
    assert found[0]["forward"]["kernels"] == found[1]["forward"]["kernels"]
