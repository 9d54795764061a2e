"""A weight quantized and dequantized row by row is what bitsandbytes makes of the whole of it."""

from __future__ import annotations

import pytest
import torch

from qvera import quantize
from qvera.recipe import ModelSection
from qvera.roundtrip import RoundTrip, absolute_maxima, row_step


@pytest.mark.parametrize("shape", [(48, 64), (64, 96), (40, 200), (130, 1), (512, 128)])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "none"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_equal_the_whole(shape: tuple[int, int], kind: str, double_quant: bool, dtype: torch.dtype) -> None:
    section = ModelSection(path="x", quantization=kind, double_quant=double_quant)  # type: ignore[arg-type]
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.05).to(dtype)
    expected = quantize.roundtrip(weight, section)
    step = row_step(shape[1], section) * 3
    pieces = list(zip(range(0, shape[0], step), weight.split(step), strict=True))
    maxima = torch.cat([absolute_maxima(rows) for _, rows in pieces]) if kind in ("nf4", "fp4") else None
    trip = RoundTrip(section, maxima, dtype)
    found = torch.cat([trip.rows(rows, first) for first, rows in pieces])
    assert found.dtype == expected.dtype and len(pieces) > 1 or shape == (130, 1)
    assert torch.equal(found, expected)
    if shape[1] > 1:
        assert torch.equal(found, weight) == (kind == "none")
