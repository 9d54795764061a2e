"""Layers streamed from RAM: the same bytes as resident ones, in whatever order they are used, and no buffer too early."""

from __future__ import annotations

import copy
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from qvera.models import quantization, stream
from qvera.models.linear import freeze_linears
from qvera.models.stream import LayerStream
from tests.two_threads import HostStream, ThreadStream, TwoThreads

CPU = torch.device("cpu")


def four_bit_layers(count: int) -> list[list[Linear4bit]]:
    """Layers of two 4-bit linears, one with nested scales and one without; the layers differ in size."""
    torch.manual_seed(0)
    return [
        [
            Linear4bit(64, 96 + 32 * (number % 3), bias=False, compress_statistics=nested, quant_type="nf4").to("cpu")
            for nested in (True, False)
        ]
        for number in range(count)
    ]


def assert_own_weights(layers: list[list[Linear4bit]], wanted: list[list[torch.Tensor]], order: Iterable[int]) -> None:
    for number in order:
        torch.testing.assert_close(dense(layers[number]), wanted[number], rtol=0, atol=0)


def dense(layer: list[Linear4bit]) -> list[torch.Tensor]:
    """The weights of a layer."""
    return [quantization.dequantized_weight(linear, torch.float32) for linear in layer]


def orders(count: int) -> list[int]:
    """Two training passes, three evaluations, another training pass, and any order."""
    up, down = list(range(count)), list(range(count))[::-1]
    anything = random.Random(0).choices(up, k=30)
    return [*up, *down, *up, *down, *up, *up, *up, *up, *down, *anything]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("pinned", [True, False])
def test_a_streamed_layer_has_its_own_weights_in_every_order(count: int, pinned: bool) -> None:
    layers = four_bit_layers(count)
    wanted = [dense(layer) for layer in layers]
    LayerStream(layers, CPU, pinned)
    assert_own_weights(layers, wanted, orders(count))


@pytest.mark.parametrize("failing", [1, 3, 6])
def test_a_copy_that_fails_leaves_no_buffer_that_seems_full(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = four_bit_layers(4)
    wanted = [dense(layer) for layer in layers]
    LayerStream(layers, CPU)
    dense(layers[1])
    plain_copy, calls = torch.Tensor.copy_, itertools.count(1)

    def copy_or_fail(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if next(calls) == failing:
            raise RuntimeError("out of memory")
        return plain_copy(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(torch.Tensor, "copy_", copy_or_fail)
        for number in (3, 2, 1):
            dense(layers[number])
    assert_own_weights(layers, wanted, (1, 3, 2))


def test_a_thread_that_fails_to_read_a_layer_reads_it_at_its_next_use(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = four_bit_layers(4)
    wanted = [dense(layer) for layer in layers]
    LayerStream(layers, CPU, pinned=False, copies=TwoThreads(HostStream()))
    fill, calls = stream._fill, itertools.count(1)

    def fill_or_fail(*args: Any) -> None:
        if next(calls) == 3:
            raise RuntimeError("out of memory")
        fill(*args)

    monkeypatch.setattr(stream, "_fill", fill_or_fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        for number in (0, 1, 2, 3):
            dense(layers[number])
    assert_own_weights(layers, wanted, (0, 2, 1, 3))


def test_a_streamed_layer_is_not_copied() -> None:
    layers = nn.ModuleList([nn.Sequential(*layer) for layer in four_bit_layers(2)])
    freeze_linears(layers)
    LayerStream([list(layer) for layer in layers], CPU)  # type: ignore[arg-type, call-overload]
    with pytest.raises(RuntimeError, match="streamed"):
        copy.deepcopy(layers)


@pytest.mark.parametrize(
    ("pinned", "gate", "slow"), [(True, "computing", 0.0), (True, "copying", 0.0), (False, None, 0.001)]
)
def test_no_buffer_is_overwritten_or_read_too_early(pinned: bool, gate: str | None, slow: float) -> None:
    """Pinned, or read from the file by a thread. The gated thread starts only when the host has given all its work."""
    copies = TwoThreads(ThreadStream())
    layers = four_bit_layers(5)
    wanted = [[t.clone() for m in layer for t in quantization.stored_tensors(m)] for layer in layers]
    stream = LayerStream(layers, CPU, pinned, copies)
    computing, opened, right = copies.computing(), threading.Event(), []
    threads = {"computing": computing, "copying": copies.copying}

    def compute(number: int) -> Callable[[], object]:
        reads = [t for m in layers[number] for t in quantization.stored_tensors(m)]

        def read() -> None:
            time.sleep(slow)
            pairs = zip(reads, wanted[number], strict=True)
            right.append(all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs))

        return read

    if gate:
        threads[gate].give(lambda: opened.wait(20))
    order = orders(5)
    for number in order:
        stream.use(number)
        computing.give(compute(number))
    if gate == "copying":  # where nothing waits for the copies, all is read before the first of them
        time.sleep(0.05)
    opened.set()
    copies.copying.drain()
    computing.drain()
    assert len(right) == len(order) and all(right)
