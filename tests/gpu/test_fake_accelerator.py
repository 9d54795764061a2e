"""The real code at the shapes of 7B to 70B models on the fake accelerator: nothing stays on the CPU, and nothing waits for it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gpu.fake_accelerator import FakeAccelerator
from tests.gpu.own_process import measured

pytestmark = pytest.mark.process

SHAPES = ("7b", "8b", "13b", "70b")

STEP_SYNCS = {
    "training.session.train_step: list": 1,  # the losses of all passes, once they are all under way
    "training.engine.step: list": 1,  # the gradient norm: a step that is not finite must not be taken
}
"""Where the host waits for the device in an optimizer step, however many layers and passes it has, and how often."""


def training_steps(fake: FakeAccelerator) -> dict[str, Any]:
    """The second step of a model of two layers, for each shape."""
    found = {}
    for shape in SHAPES:
        session = fake.session(shape, rows=[512, 500], rank=64, layers=2, prompt_tokens=100)
        session.train_step()
        with fake.record() as seen:
            record = session.train_step()
        devices = sorted(
            {str(p.device) for p in session.model.parameters()} | {str(b.device) for b in session.model.buffers()}
        )
        states = [value for state in session.optimizer.state.values() for key, value in state.items() if key != "step"]
        found[shape] = {**seen.to_dict(), "devices": devices, "tokens": record["input_tokens"],
                        "state_devices": sorted({str(value.device) for value in states}),
                        "base_bytes": session.base_bytes}  # fmt: skip
    return found


@pytest.fixture(scope="module")
def steps() -> dict[str, Any]:
    return measured(training_steps)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_training_step_leaves_nothing_on_the_cpu(steps: dict[str, Any], shape: str) -> None:
    step = steps[shape]
    assert step["devices"] == step["state_devices"] == ["fakegpu:0"]
    assert step["tokens"] == 1012 and step["kernels"]["qvera.dequantize_4bit"] >= 2 * 7


@pytest.mark.parametrize("shape", SHAPES)
def test_a_training_step_waits_for_the_device_only_where_it_is_listed(steps: dict[str, Any], shape: str) -> None:
    assert steps[shape]["syncs"] == STEP_SYNCS
    assert steps[shape]["copies"] == {"to device": 1}
