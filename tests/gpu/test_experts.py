"""Experts on the fake accelerator: one wait of the host a layer, whatever number of experts.

Launches do not grow with them either where torch multiplies groups in one launch.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from qvera.models.experts import ExpertStack, StackScales, expert_specs, place_stack, run_experts
from tests.gpu.fake_accelerator import FakeAccelerator
from tests.gpu.own_process import measured

pytestmark = pytest.mark.process


ROWS = 128
"""64 tokens that go to two experts each: at least one row for every expert."""


def layer(fake: FakeAccelerator, count: int, grouped: bool) -> dict[str, Any]:
    """What forward and backward of one layer's quantized experts take, between which the rows are shared out evenly."""
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
    hidden = torch.empty(ROWS // 2, 256, dtype=torch.bfloat16, device=fake.device, requires_grad=True)
    chosen = torch.empty(ROWS // 2, 2, dtype=torch.int64, device=fake.device)
    shares = torch.empty(ROWS // 2, 2, dtype=torch.bfloat16, device=fake.device)
    fake.count(*(ROWS // count * (expert + 1) for expert in range(count)))
    with mock.patch("qvera.utils.accelerator.multiplies_groups", return_value=grouped):
        with fake.record() as seen:
            out = run_experts(module, hidden, chosen, shares)
        forward = seen.to_dict()
        with fake.record() as seen:
            out.backward(torch.empty_like(out))
    return {"forward": forward, "backward": seen.to_dict(), "device": str(out.device)}


@pytest.mark.parametrize("grouped", [True, False])
def test_the_host_waits_once_for_a_layer_s_experts(grouped: bool) -> None:
    counts = 8, 64
    found = [measured(layer, count, grouped) for count in counts]
    for count, one in zip(counts, found, strict=True):
        assert one["device"] == "fakegpu:0"
        assert list(one["forward"]["syncs"].values()) == [1]
        assert not one["backward"]["syncs"]
        for passed in ("forward", "backward"):
            products = {name: n for name, n in one[passed]["kernels"].items() if name.endswith("mm")}
            # two projections: one launch for each, or one for each expert of each
            assert products == ({"aten._grouped_mm": 2} if grouped else {"aten.mm": 2 * count})
            assert one[passed]["kernels"]["qvera.dequantize_4bit"] == 2
    if grouped:
        assert found[0]["forward"]["launches"] == found[1]["forward"]["launches"]
        assert found[0]["backward"]["launches"] == found[1]["backward"]["launches"]
