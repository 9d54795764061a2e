"""Rows in one sequence on the fake accelerator: no dense mask, no repeated keys, and the bytes that the plan counts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from qvera.data import Example
from qvera.data.rows import Joined
from qvera.models import attention, forward
from qvera.training.plan import Machine, PlannedRun, shape_of
from qvera.training.plan.activations import kept_bytes
from qvera.training.plan.decisions import batch_of
from tests.gpu.fake_accelerator import FakeAccelerator, make_rows
from tests.gpu.own_process import measured

pytestmark = pytest.mark.process

LENGTHS = (517, 300, 77, 64)
KINDS = {"padded": (False, 0), "packed": (True, 0), "packed behind a prefix": (True, 40), "joined": (False, 40)}
"""Whether the rows are packed, and how many tokens they begin with in common."""


def rows_with(prefix: int) -> list[Example]:
    """Rows of `LENGTHS` whose first ``prefix`` tokens are the same and whose tokens from 41 on are trained."""
    rows = make_rows(LENGTHS, prompt_tokens=41)
    for row in rows:
        row.input_ids[:prefix] = rows[0].input_ids[:prefix]
        row.input_ids[prefix] = row.input_ids[-1]
    return rows


def forward_and_backward(fake: FakeAccelerator) -> dict[str, Any]:
    """Bytes that one layer of an 8B keeps for backward, beside the plan's, and attention's kernels in two layers."""
    shape = dataclasses.replace(shape_of(fake.model("8b", layers=1)), attention="sdpa")
    found: dict[str, Any] = {kind: {"alive_bytes": []} for kind in KINDS}
    for layers in (1, 2):
        session = fake.session("8b", rows=LENGTHS, rank=64, layers=layers, gradient_checkpointing=False)
        for kind, (packing, prefix) in KINDS.items():
            rows, about = rows_with(prefix), found[kind]
            with fake.record() as seen:
                batch = forward.make_batch(session.model, rows, 0, prefix > 0, packing)
                nll, _ = forward.batch_nll(session.model, batch, 512)
                about["alive_bytes"].append(fake.alive_bytes - seen.start_bytes)
                nll.backward()
            del nll
            planned = batch_of(rows, Joined.OFFSETS if packing or prefix else None, packing)
            run = PlannedRun(shape, session.recipe, planned, Machine("fake", "cuda", torch.bfloat16, False, 10**12))
            about |= {"planned_bytes": kept_bytes(run), "syncs": seen.syncs, "tokens": batch["input_ids"].numel(),
                      "planned_tokens": planned.all_tokens,
                      "kernels": sorted(name for name in seen.kernels if "atten" in name or "attn" in name)}  # fmt: skip
    return found


@pytest.fixture(scope="module")
def passes() -> dict[str, Any]:
    return measured(forward_and_backward)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_layer_keeps_is_the_plan_s_without_a_mask_or_a_wait(passes: dict[str, Any], kind: str) -> None:
    one, two = passes[kind]["alive_bytes"]
    assert two - one == pytest.approx(passes[kind]["planned_bytes"], rel=0.01)
    assert passes[kind]["tokens"] == passes[kind]["planned_tokens"]
    # no mask, and no wait of the host
    name = "aten._scaled_dot_product_flash_attention" if kind == "padded" else "torch_attn._varlen_attn"
    assert passes[kind]["kernels"] == [name, f"{name}_backward"]
    assert passes[kind]["syncs"] == {}


def grouped_keys(fake: FakeAccelerator) -> dict[str, list[str]]:
    """Attention's kernels for grouped keys without a mask, by dtype: on this card, and on one without bfloat16."""
    card: Any = torch.get_device_module(fake.device.type)
    found: dict[str, list[str]] = {}
    for dtypes in ([torch.float16, torch.bfloat16], [torch.float16]):
        card.get_amp_supported_dtype = lambda dtypes=dtypes: dtypes
        for dtype in (torch.float32, torch.float16):
            with fake.record() as seen:
                q, k, v = (
                    torch.empty(1, heads, 64, 128, dtype=dtype, device=fake.device, requires_grad=True)
                    for heads in (32, 8, 8)
                )
                out, _ = attention._attention(torch.nn.Module(), q, k, v, None, scaling=0.1)
                out.sum().backward()
            assert k.grad is not None and k.grad.shape == k.shape
            found[f"{dtype}, {len(dtypes)}"] = sorted(name for name in seen.kernels if "atten" in name or "bmm" in name)
    return found


def test_grouped_keys_never_meet_the_mathematical_form() -> None:
    """It makes [heads, T, T] in fp32. Flash attention has groups, in 16 bits, on a card that has bfloat16."""
    flash = ["aten._scaled_dot_product_flash_attention", "aten._scaled_dot_product_flash_attention_backward"]
    efficient = [name.replace("flash", "efficient") for name in flash]
    assert measured(grouped_keys) == {
        "torch.float32, 2": efficient, "torch.float16, 2": flash,
        "torch.float32, 1": efficient, "torch.float16, 1": efficient,
    }  # fmt: skip
