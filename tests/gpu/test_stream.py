"""Layers streamed to the fake accelerator: in which order copies and reads are launched, and what waits for what."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qvera.models import quantization, stream
from qvera.models.forward import hidden_states, make_batch
from qvera.models.quantization import Linear4bit
from qvera.models.stream import CopyStream
from qvera.models.structure import decoder_layers
from tests.gpu.fake_accelerator import FakeAccelerator
from tests.gpu.own_process import measured

pytestmark = pytest.mark.process

LAYERS = 4
Entry = list[Any]
"""``mark ID``; ``copy LAYER BUFFER BYTES after ID event ID``; ``wait ID``; ``read LAYER BUFFER``."""


class LoggedStream(CopyStream):
    """A `CopyStream` that writes down what it is asked for; events are numbers."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.log: list[Entry] = []
        self.events: list[Any] = []
        self.layer_of: dict[int, int] = {}
        self.buffer_of: dict[int, int] = {}

    def _number(self, event: Any) -> int:
        self.events.append(event)
        return len(self.events) - 1

    def mark(self) -> int:
        number = self._number(super().mark())
        self.log.append(["mark", number])
        return number

    def copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], after: Any = None) -> int:
        pairs, after = list(pairs), self.mark() if after is None else after
        event = self._number(super().copy(pairs, self.events[after]))
        buffer = self.buffer_of[pairs[0][0].untyped_storage()._cdata]
        layer = self.layer_of[pairs[0][1].untyped_storage()._cdata]
        size_bytes = sum(len(part) for part, _ in pairs)
        self.log.append(["copy", layer, buffer, size_bytes, after, event])
        return event

    def wait(self, event: int) -> None:
        super().wait(self.events[event])
        self.log.append(["wait", event])

    def keep(self, tensor: torch.Tensor) -> None:
        """Fake tensors have no `record_stream`."""


class ReadsOf(TorchDispatchMode):
    """Logs each kernel that reads a buffer, with the decoder layer that is at work."""

    def __init__(self, model: nn.Module, copies: LoggedStream) -> None:
        super().__init__()
        self._copies, self._layer = copies, -1
        for number, layer in enumerate(decoder_layers(model.get_decoder())):  # type: ignore[operator]
            # transformers recomputes a layer's forward without the layer's own hooks
            layer.input_layernorm.register_forward_pre_hook(lambda *_, number=number: setattr(self, "_layer", number))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # copies have a log of their own, and views and questions read nothing
        if not func.is_view and str(func.overloadpacket) not in ("aten.copy_", "aten.detach", "prim.device"):
            buffers = [self._copies.buffer_of.get(t.untyped_storage()._cdata) for t in args if torch.is_tensor(t)]
            read = [buffer for buffer in buffers if buffer is not None]
            if read:
                self._copies.log.append(["read", self._layer, read[0]])
        return func(*args, **(kwargs or {}))


def streamed(model: Any, device: torch.device) -> LoggedStream:
    """Move the packed layers of a model to RAM, and stream them from there."""
    copies = LoggedStream(device)
    layers = []
    for layer in decoder_layers(model.get_decoder()):
        layers.append([m for m in layer.modules() if isinstance(m, Linear4bit)])
        for module in layers[-1]:
            in_ram = [tensor.cpu() for tensor in quantization.stored_tensors(module)]
            quantization.replace_tensors(module, in_ram, device)
    made = stream.LayerStream(layers, device, pinned=True, copies=copies)
    gc.collect()  # what the layers were before
    assert made._pinned is not None
    copies.buffer_of = {buffer.untyped_storage()._cdata: number for number, buffer in enumerate(made._buffers)}
    copies.layer_of = {
        chunk.untyped_storage()._cdata: number for number, chunks in enumerate(made._pinned) for chunk in chunks
    }
    return copies


def streaming(fake: FakeAccelerator, shape: str) -> dict[str, Any]:
    """The second training step on a resident and on a streamed base; then, on that, three passes without gradients."""
    found = one_step(fake, shape, on_stream=False)
    gc.collect()
    return {"resident": found["step"], **one_step(fake, shape, on_stream=True)}


def one_step(fake: FakeAccelerator, shape: str, on_stream: bool) -> dict[str, Any]:
    """The parts of `streaming` for one of the two bases."""
    logs: list[LoggedStream] = []
    held_bytes, load = fake.alive_bytes, fake.model

    def model(*what: Any) -> Any:
        base = load(*what)
        if on_stream:
            logs.append(streamed(base, fake.device))
        return base

    with mock.patch.object(fake, "model", model):
        training = {"gradient_checkpointing": True, "try_longest_batch": False}
        session = fake.session(shape, rows=[256, 250], rank=64, layers=LAYERS, **training)
    session.train_step()
    log = logs[0].log if logs else []
    reads: Any = ReadsOf(session.base.model, logs[0]) if logs else contextlib.nullcontext()
    start = len(log)
    with fake.record() as seen, reads:
        session.train_step()
    parts = {"before": log[:start], "log": log[start:], "base_bytes": session.base_bytes - held_bytes}
    found = {"step": {**seen.to_dict(), **parts}}
    if on_stream:
        start = len(log)
        batch = make_batch(session.model, session.datasets.train[:1], 0)
        with reads, torch.no_grad():
            for _ in range(3):
                hidden_states(session.model, batch)
        found["evaluation"] = {"before": log[:start], "log": log[start:]}
    return found


@pytest.fixture(scope="module")
def found() -> Any:
    return measured(streaming, "70b")


def faults(log: list[Entry], checked_from: int = 0) -> list[str]:
    """Where a read could come before its bytes or get another layer's, or a copy could overwrite what is still read."""
    wrong: list[str] = []
    position: dict[int, int] = {}
    held: dict[int, tuple[int, int]] = {}  # buffer → layer, event of the copy
    waited: set[int] = set()
    last_read: dict[int, int] = {}
    for at, (kind, *what) in enumerate(log):
        if kind == "mark":
            position[what[0]] = at
        elif kind == "wait":
            waited.add(what[0])
        elif kind == "copy":
            layer, buffer, _, after, event = what
            if position[after] < last_read.get(buffer, -1):
                wrong.append(f"copy of layer {layer} does not wait for the last reader of its buffer")
            held[buffer] = layer, event
        else:
            layer, buffer = what
            last_read[buffer] = at
            if at >= checked_from and held[buffer][0] != layer:
                wrong.append(f"layer {layer} reads layer {held[buffer][0]}")
            if held[buffer][1] not in waited:
                wrong.append(f"layer {layer} does not wait for its copy")
    return wrong


def copied(log: list[Entry]) -> list[int]:
    """The layers that are copied, in order."""
    return [entry[1] for entry in log if entry[0] == "copy"]


def test_reads_and_copies_wait_for_each_other(found: Any) -> None:
    for part in (found["step"], found["evaluation"]):
        assert sum(entry[0] == "read" for entry in part["log"]) >= 7 * LAYERS
        assert not faults(part["before"] + part["log"], checked_from=len(part["before"]))


def test_a_log_without_a_wait_has_faults(found: Any) -> None:
    step = found["step"]["before"] + found["step"]["log"]
    assert faults([entry for entry in step if entry[0] != "wait"])
    early = [[*entry[:4], 0, entry[5]] if entry[0] == "copy" else entry for entry in step]
    assert faults(early)


def test_each_layer_is_copied_ahead_once_for_forward_and_once_for_backward(found: Any) -> None:
    log = found["step"]["log"]
    up, down = list(range(2, LAYERS)), list(range(LAYERS - 2))[::-1]
    assert copied(log) == [*up, *down]
    first_read: dict[int, int] = {}
    for at, (kind, *what) in enumerate(log):
        if kind == "read":
            first_read.setdefault(what[0], at)
    for layer in up:  # its copy is launched before the layer below it computes
        launched = next(at for at, entry in enumerate(log) if entry[0] == "copy" and entry[1] == layer)
        assert launched < first_read[layer - 1] + 1


def test_a_pass_after_a_pass_copies_the_first_layer_while_the_last_one_computes(found: Any) -> None:
    log = found["evaluation"]["log"]
    up = list(range(LAYERS))
    # training ended at layers 1 and 0; that another pass follows is known after the first
    assert copied(log) == [*up[2:], *up, *up, 0]


def test_a_streamed_base_takes_two_layers_of_the_device_and_no_sync(found: Any) -> None:
    resident, step = found["resident"], found["step"]
    (layer_bytes,) = {entry[3] for entry in step["log"] if entry[0] == "copy"}
    assert resident["base_bytes"] - step["base_bytes"] == pytest.approx((LAYERS - 2) * layer_bytes, rel=1e-3)
    assert step["syncs"] == resident["syncs"]
    assert step["kernels"] == resident["kernels"]
