"""The plan's peak against the bytes that the real training step holds on the fake accelerator, at the shapes of large models."""

from __future__ import annotations

import gc
import itertools
from typing import Any, NamedTuple

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qvera.config.schema import parse_recipe
from qvera.data.rows import Joined
from qvera.training.plan import Machine, PlannedRun, plan_memory, shape_of
from qvera.training.plan.decisions import batch_of
from tests.gpu.fake_accelerator import SHAPES, FakeAccelerator, make_rows
from tests.gpu.own_process import measured

pytestmark = pytest.mark.process

TOLERANCE = 0.03


class Case(NamedTuple):
    """One step: rows of so many tokens in one forward pass, of a model with so many of its layers (None: all)."""

    shape: str
    rows: list[int]
    rank: int
    checkpointing: bool | str
    packed: bool
    layers: int | None = 2

    def __str__(self) -> str:
        joined = "packed" if self.packed else "padded" if len(set(self.rows)) > 1 else "one length"
        return f"{self.shape}, r={self.rank}, checkpointing {self.checkpointing}, {joined}"


SAMPLE = [
    Case("7b", [512, 300], 256, True, False),
    Case("8b", [512], 1024, False, False),
    Case("34b", [400, 600], 1024, True, True),
    *(Case("70b", [4500], 256, way, False, 3) for way in (True, "offload")),  # its MLPs go by tiles
]
PRODUCT = [
    Case(shape, [1500, 548], rank, checkpointing, packed, 3)
    for shape, checkpointing, packed, rank in itertools.product(
        SHAPES, (True, False, "offload"), (True, False), (256, 1024)
    )
]
WHOLE = Case("8b", [2048], 256, True, False, None)
LARGEST = Case("70b", [2048], 1024, "offload", False, None)


def peaks(fake: FakeAccelerator, cases: list[Any]) -> list[dict[str, Any]]:
    """Bytes before the first step of each case, the most in each part of it, and what the host waited for."""
    found = []
    for case in itertools.starmap(Case, cases):
        data = {"packing": True, "max_length": sum(case.rows)} if case.packed else {}
        gc.collect()
        before = fake.alive_bytes
        session = fake.session(
            case.shape, case.rows, rank=case.rank, layers=case.layers, data=data,
            gradient_checkpointing=case.checkpointing, try_longest_batch=False,
        )  # fmt: skip
        session.model.train()
        with fake.record() as seen:
            session.train_step()
        parts = {part: moment.alive_bytes - before for part, moment in seen.peaks.items()}
        found.append({"start": seen.start_bytes - before, **parts, "syncs": seen.syncs, "copies": seen.copies})
        del session
    return found


def planned(case: Case) -> Any:
    """The plan of that step on a GPU without a context."""
    layers = {} if case.layers is None else {"num_hidden_layers": case.layers}
    with torch.device("meta"):
        shape = shape_of(LlamaForCausalLM(LlamaConfig(**{**SHAPES[case.shape], **layers})))
    tree = {
        "model": "-", "data": {"path": "-"}, "adapter": {"rank": case.rank},
        "training": {"gradient_checkpointing": case.checkpointing},
    }  # fmt: skip
    batch = batch_of(make_rows(case.rows), Joined.OFFSETS if case.packed else None, case.packed)
    machine = Machine("a GPU", "cuda", torch.bfloat16, False, 10**12)
    return plan_memory(PlannedRun(shape, parse_recipe(tree, "a test"), batch, machine))


def check(cases: list[Case], found: list[dict[str, Any]]) -> None:
    wrong = []
    for case, counted in zip(cases, found, strict=True):
        memory = planned(case)
        # the first step begins before there are gradients and AdamW's state
        later = sum(c.bytes for c in memory.standing if c.name in ("their gradients", "optimizer state"))
        standing = sum(c.bytes for c in memory.standing) - later
        assert standing == pytest.approx(counted["start"], rel=0.001), str(case)
        for part, parts in memory.moments.items():
            gradients = later // 3 if part == "backward" else 0  # of a few MB, those of the layers that are through
            off = (standing + gradients + sum(c.bytes for c in parts)) / counted[part] - 1
            if abs(off) > TOLERANCE:
                wrong.append(f"{case}: {part} is off by {off:+.1%}")
    assert not wrong, "\n".join(wrong)


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return measured(peaks, SAMPLE)


def test_the_peak_of_each_part_of_a_step_is_the_plan_s(found: list[dict[str, Any]]) -> None:
    check(SAMPLE, found)


def test_offloaded_inputs_leave_the_device_and_no_way_of_checkpointing_waits_more(found: list[dict[str, Any]]) -> None:
    on, offload = found[-2:]
    assert on["forward"] - offload["forward"] == pytest.approx((3 - 2) * 4500 * 8192 * 2, rel=0.02)
    assert offload["copies"]["to host"] and "to host" not in on["copies"]
    assert [one["syncs"] for one in found] == [on["syncs"]] * len(found)


@pytest.mark.matrix
def test_the_peak_is_the_plan_s_for_every_shape_rank_and_way_of_keeping_activations() -> None:
    cases = [*PRODUCT, LARGEST]
    check(cases, measured(peaks, cases))


@pytest.mark.slow
def test_the_peak_of_a_whole_model_is_the_plan_s() -> None:
    check([WHOLE], measured(peaks, [WHOLE]))
