"""What `qvera plan` runs on an accelerator to time a step: one whole layer's work, drawn there, in bounded memory."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from qvera.config.schema import parse_recipe
from qvera.training.plan import Batch, Machine, PlannedRun, shape_of
from qvera.training.plan import plan as planning
from tests.gpu.fake_accelerator import SHAPES, FakeAccelerator
from tests.gpu.own_process import measured

pytestmark = pytest.mark.process

TOKENS, RANK = 78_000, 256


class _LargestOnCpu(TorchDispatchMode):
    """The bytes of the largest tensor that is made on the CPU."""

    largest_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t.nbytes for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.device.type == "cpu"]
        self.largest_bytes = max(self.largest_bytes, *made, 0)
        return out


def probe(fake: FakeAccelerator, shape: str) -> dict[str, Any]:
    """One run of each part, at so many tokens as no probe should draw numbers for."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**{**SHAPES[shape], "num_hidden_layers": 2}))
    recipe = parse_recipe({"model": "-", "data": {"path": "-"}, "adapter": {"rank": RANK}}, "a test")
    batch = Batch(1, TOKENS, TOKENS, False, False, "", TOKENS)
    run = PlannedRun(shape_of(model), recipe, batch, Machine("a GPU", "cuda", torch.bfloat16, False, 10**12))
    with mock.patch.object(planning, "_seconds", lambda part: len([part()])):
        with fake.record() as seen, _LargestOnCpu() as cpu:
            rates = planning._rates(run, fake.device)
    layer = sum(x.n * x.m for x in run.layer)
    return {**seen.to_dict(), "largest_on_cpu_bytes": cpu.largest_bytes, "rates": rates, "layer_weights": layer}


def test_a_whole_layer_is_timed_and_drawn_on_the_device() -> None:
    found = measured(probe, "70b")
    assert found["kernels"]["aten.mm"] == 2 * 7 + 2 * 7  # x Wᵀ and g W; x Aᵀ and z Cᵀ
    assert found["kernels"]["qvera.dequantize_4bit"] == 7
    assert found["rates"]["dequantization"] == found["layer_weights"]  # in the second that a part takes here
    assert found["rates"]["products"] == 4 * 4096 * found["layer_weights"]
    assert found["largest_on_cpu_bytes"] < 10_000
    assert found["copies"].get("to host", 0) == 0
    widest, hidden = 28672, 8192
    # the largest weight, as it is drawn, and quantized or as a gradient beside it; one input and one output
    assert found["peak_bytes"] < 2 * (3 * widest * hidden + 3 * 4096 * widest)
