"""Layers streamed to the fake accelerator: when they are copied, and what that takes of the device.

That no buffer is read or overwritten too early: tests/models/test_stream.py, and in a run tests/training/test_stream.py.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any
from unittest import mock

import pytest
import torch

from qvera.models import quantization, stream
from qvera.models.forward import hidden_states, make_batch
from qvera.models.quantization import Linear4bit
from qvera.models.stream import CopyStream
from qvera.models.structure import decoder_layers
from tests.gpu.fake_accelerator import FakeAccelerator
from tests.gpu.own_process import measured

pytestmark = pytest.mark.process

LAYERS = 4


class LoggedStream(CopyStream):
    """A `CopyStream` whose log has ``copy LAYER BYTES``."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.log: list[list[Any]] = []
        self.layer_of: dict[int, int] = {}

    def copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], after: Any = None) -> Any:
        pairs = list(pairs)
        layer = self.layer_of[pairs[0][1].untyped_storage()._cdata]
        self.log.append(["copy", layer, sum(len(part) for part, _ in pairs)])
        return super().copy(pairs, after)

    def keep(self, tensor: torch.Tensor) -> None:
        """Fake tensors have no `record_stream`."""


def streamed(model: Any, device: torch.device) -> LoggedStream:
    """Move the packed layers of a model to RAM, and stream them from there. The log has ``begin LAYER`` too."""
    copies = LoggedStream(device)
    layers = []
    for number, layer in enumerate(decoder_layers(model.get_decoder())):
        layers.append([m for m in layer.modules() if isinstance(m, Linear4bit)])
        for module in layers[-1]:
            in_ram = [tensor.cpu() for tensor in quantization.stored_tensors(module)]
            quantization.replace_tensors(module, in_ram, device)
        # transformers recomputes a layer's forward without the layer's own hooks
        layer.input_layernorm.register_forward_pre_hook(lambda *_, number=number: copies.log.append(["begin", number]))
    made = stream.LayerStream(layers, device, pinned=True, copies=copies)
    gc.collect()  # what the layers were before
    assert made._pinned is not None
    copies.layer_of = {
        chunk.untyped_storage()._cdata: number for number, chunks in enumerate(made._pinned) for chunk in chunks
    }
    return copies


def streaming(fake: FakeAccelerator, shape: str) -> dict[str, Any]:
    """The second training step on a resident and on a streamed base; then, on that, three passes without gradients."""
    found: dict[str, Any] = {}
    for on_stream in (False, True):
        gc.collect()
        copies: list[LoggedStream] = []
        held_bytes, load = fake.alive_bytes, fake.model

        def model(*what: Any, load: Any = load, on_stream: bool = on_stream, copies: Any = copies) -> Any:
            base = load(*what)
            if on_stream:
                copies.append(streamed(base, fake.device))
            return base

        with mock.patch.object(fake, "model", model):
            training = {"gradient_checkpointing": True, "try_longest_batch": False}
            session = fake.session(shape, rows=[256, 250], rank=64, layers=LAYERS, **training)
        session.train_step()
        start = len(copies[0].log) if copies else 0
        with fake.record() as seen:
            session.train_step()
        base_bytes = session.base_bytes - held_bytes
        found["streamed" if on_stream else "resident"] = {**seen.to_dict(), "base_bytes": base_bytes}
    end, log = len(copies[0].log), copies[0].log
    batch = make_batch(session.model, session.datasets.train[:1], 0)
    with torch.no_grad():
        for _ in range(3):
            hidden_states(session.model, batch)
    return found | {"step": log[start:end], "evaluation": log[end:]}


@pytest.fixture(scope="module")
def found() -> Any:
    return measured(streaming, "70b")


def copied(log: list[list[Any]]) -> list[int]:
    """The layers that are copied, in order."""
    return [entry[1] for entry in log if entry[0] == "copy"]


def test_each_layer_is_copied_ahead_once_for_forward_and_once_for_backward(found: Any) -> None:
    log = found["step"]
    up, down = list(range(2, LAYERS)), list(range(LAYERS - 2))[::-1]
    assert copied(log) == [*up, *down]
    begins = {entry[1]: at for at, entry in reversed([*enumerate(log)]) if entry[0] == "begin"}
    for layer in up:  # its copy is launched while the layer below it computes
        launched = next(at for at, entry in enumerate(log) if entry[:2] == ["copy", layer])
        assert launched < begins[layer]


def test_a_pass_after_a_pass_copies_the_first_layer_while_the_last_one_computes(found: Any) -> None:
    up = list(range(LAYERS))
    # training ended at layers 1 and 0; that another pass follows is known after the first
    assert copied(found["evaluation"]) == [*up[2:], *up, *up, 0]


def test_a_streamed_base_takes_two_layers_of_the_device_and_no_sync(found: Any) -> None:
    resident, step = found["resident"], found["streamed"]
    (layer_bytes,) = {entry[2] for entry in found["step"] if entry[0] == "copy"}
    assert resident["base_bytes"] - step["base_bytes"] == pytest.approx((LAYERS - 2) * layer_bytes, rel=1e-3)
    assert step["syncs"] == resident["syncs"]
    assert step["kernels"] == resident["kernels"]
