"""A weight quantized and dequantized row by row is what bitsandbytes makes of the whole of it."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch

from qvera.config.schema import ModelSection
from qvera.export.roundtrip import RoundTrip, absolute_maxima, row_step
from qvera.models import quantization


@pytest.mark.parametrize("shape", [(48, 64), (64, 96), (40, 200), (130, 1), (512, 128)])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "none"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_equal_the_whole(shape: tuple[int, int], kind: str, double_quant: bool, dtype: torch.dtype) -> None:
    section = ModelSection(path="x", quantization=kind, double_quant=double_quant)  # type: ignore[arg-type]
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.05).to(dtype)
    expected = quantization.quantize_dequantize(weight, section)
    step = row_step(shape[1], section) * 3
    pieces = list(zip(range(0, shape[0], step), weight.split(step), strict=True))
    maxima = torch.cat([absolute_maxima(rows) for _, rows in pieces]) if kind in ("nf4", "fp4") else None
    trip = RoundTrip(section, maxima, dtype)
    found = torch.cat([trip.rows(rows, first) for first, rows in pieces])
    assert (found.dtype == expected.dtype and len(pieces) > 1) or shape == (130, 1)
    assert torch.equal(found, expected)
    if shape[1] > 1:
        assert torch.equal(found, weight) == (kind == "none")


@pytest.mark.parametrize("shape", [(48, 64), (8, 32), (7, 32), (64, 96), (10, 160), (7, 44)])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
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
