"""Weights as the trained base has them, row by row; and the threads that read and compute them in order."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import bitsandbytes as bnb
import pytest
import torch

from qvera.config.schema import ModelSection
from qvera.export.stream import FakeQuantization, absolute_maxima, in_order, one_thread_each, row_step
from qvera.models import quantization

# every kind with and without double quantization; shapes and dtypes in turn
SETTINGS = list(itertools.product(["nf4", "fp4", "int8", "none"], [True, False]))
SHAPES = [(48, 64), (64, 96), (40, 200), (512, 128)]


@pytest.mark.parametrize(
    ("kind", "double_quant", "shape", "dtype"),
    [
        *((*setting, SHAPES[i % 4], torch.float32) for i, setting in enumerate(SETTINGS)),
        *((*setting, SHAPES[(i + 1) % 4], torch.bfloat16) for i, setting in enumerate(SETTINGS)),
        ("nf4", True, (130, 1), torch.float32),  # less than one block per step
    ],
)
def test_rows_equal_the_whole(kind: str, double_quant: bool, shape: tuple[int, int], dtype: torch.dtype) -> None:
    section = ModelSection(path="x", quantization=kind, double_quant=double_quant)  # type: ignore[arg-type]
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.05).to(dtype)
    expected = quantization.quantize_dequantize(weight, section)
    step = row_step(shape[1], section) * 3
    parts = list(zip(range(0, shape[0], step), weight.split(step), strict=True))
    maxima = torch.cat([absolute_maxima(rows) for _, rows in parts]) if kind in ("nf4", "fp4") else None
    fake = FakeQuantization(section, maxima, dtype)
    found = torch.cat([fake.rows(rows, first) for first, rows in parts])
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    if shape[1] > 1:
        assert len(parts) > 1
        assert torch.equal(found, weight) == (kind == "none")


ACROSS_ROWS = [(48, 64), (8, 32), (7, 32), (64, 96), (10, 160), (7, 44)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("shape", "kind", "dtype"),
    [(s, kind, DTYPES[(i + j) % 3]) for i, s in enumerate(ACROSS_ROWS) for j, kind in enumerate(["nf4", "fp4"])],
)
def test_a_block_across_two_rows_keeps_its_scale(shape: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    """Against a table look-up; rows that differ in size, so that another block's scale shows."""
    size = torch.logspace(-2, 0, shape[0]).view(-1, 1)
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * size).to(dtype)
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
    nibbles = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten()[: weight.numel()]
    code = bnb.functional.get_4bit_type(kind, device="cpu")
    expected = (code[nibbles.long()] * state.absmax.repeat_interleave(64)[: weight.numel()]).view(shape).to(dtype)
    section = ModelSection(path="x", quantization=kind, double_quant=False)  # type: ignore[arg-type]
    assert torch.equal(quantization.quantize_dequantize(weight, section), expected)

    dense = torch.nn.Linear(shape[1], shape[0], bias=False, device="meta")
    statistics = {k.removeprefix("w."): v for k, v in quantization.serialized_state("w", state, section).items()}
    layer = quantization.prequantized_linear(dense, packed, statistics, dtype, torch.device("cpu"))
    assert torch.equal(quantization.dequantized_weight(layer, dtype), expected)


def test_order_and_bound() -> None:
    drawn: list[int] = []

    def items() -> Iterator[int]:
        for i in range(50):
            drawn.append(i)
            yield i

    def slow_first(i: int) -> int:
        time.sleep(0.01 if i % 3 == 0 else 0)
        return i * i

    taken: list[int] = []
    for result in in_order(items(), slow_first, 4, 6):
        time.sleep(0.002)
        assert len(drawn) <= len(taken) + 7
        taken.append(result)
    assert taken == [i * i for i in range(50)]


@pytest.mark.parametrize("where", ["items", "compute"])
def test_an_error_comes_where_its_result_would(where: str) -> None:
    def items() -> Iterator[int]:
        for i in range(9):
            if i == 5 and where == "items":
                raise OSError("read")
            yield i

    def compute(i: int) -> int:
        if i == 5 and where == "compute":
            raise OSError("compute")
        return i

    taken = []
    with pytest.raises(OSError, match="read" if where == "items" else "compute"):
        for result in in_order(items(), compute, 2, 4):
            taken.append(result)
    assert taken == [0, 1, 2, 3, 4]


def test_closing_stops_the_threads_and_torchs_threads_come_back() -> None:
    before = threading.active_count(), torch.get_num_threads()
    with one_thread_each() as workers:
        assert workers >= 1
        assert torch.get_num_threads() == 1
        results = in_order(iter(range(10**9)), lambda i: i, workers, 4)
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        results.close()
    assert (threading.active_count(), torch.get_num_threads()) == before
