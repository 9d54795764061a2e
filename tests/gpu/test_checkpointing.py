"""Checkpointing modes on the fake accelerator: no wait of the host more, and as many bytes as the plan says."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import pytest
import torch

from bench.plan_table import shapes
from qvera.config.schema import parse_recipe
from qvera.training.plan import Batch, Machine, PlannedRun, plan_memory
from tests.gpu.fake_accelerator import FakeAccelerator
from tests.gpu.own_process import measured

pytestmark = pytest.mark.process

LAYERS, TOKENS, RANK = 3, 8192, 64
MODES = (False, True, "offload")


def steps_of_each_mode(fake: FakeAccelerator) -> list[dict[str, Any]]:
    found = []
    for mode in MODES:
        gc.collect()
        before = fake.alive_bytes
        session = fake.session("8b", rows=[TOKENS], rank=RANK, layers=LAYERS, gradient_checkpointing=mode)
        session.train_step()
        with fake.record() as seen:
            session.train_step()
        found.append({**seen.to_dict(), "peak_bytes": seen.peak_bytes - before})
        del session
    return found


def test_offloaded_inputs_and_tiles_take_what_the_plan_says_and_no_wait_of_the_host() -> None:
    off, on, offload = measured(steps_of_each_mode)
    assert off["syncs"] == on["syncs"] == offload["syncs"]
    one_input = TOKENS * 4096 * 2
    assert on["peak_bytes"] - offload["peak_bytes"] == pytest.approx((LAYERS - 2) * one_input, rel=0.02)
    assert offload["copies"]["to host"] == LAYERS * one_input // 2**24
    shape = shapes()["Llama-3 8B"]
    few = dataclasses.replace(
        shape, layers=LAYERS, linears=tuple(x for x in shape.linears if x.layer is None or x.layer < LAYERS),
        dense_numbers=shape.dense_numbers - (shape.layers - LAYERS) * 2 * shape.hidden,
    )  # fmt: skip
    for mode, seen in ((True, on), ("offload", offload)):
        tree = {"model": "-", "data": {"path": "-"}, "adapter": {"rank": RANK},
                "training": {"gradient_checkpointing": mode}}  # fmt: skip
        batch = Batch(1, TOKENS, TOKENS - 1, False, False, "", TOKENS)
        machine = Machine("GPU", "cuda", torch.bfloat16, False, 10**12)
        planned = plan_memory(PlannedRun(few, parse_recipe(tree, "t"), batch, machine)).total_bytes
        assert planned == pytest.approx(seen["peak_bytes"], rel=0.03)
