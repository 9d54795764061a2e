"""Packed nibbles and scales are bitsandbytes' own, whatever the weights, their number and the threads."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvera.config.sections import ModelSection
from qvera.models import quantization
from qvera.utils.safetensors_io import TensorSpec

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TYPES = ["nf4", "fp4"]


def assert_equal_to_bitsandbytes(weights: torch.Tensor, quant_type: str) -> None:
    packed, absmax = quantization.pack_four_bit(weights, quant_type)
    expected, scales = torch.ops.bitsandbytes.quantize_4bit.default(weights, 64, quant_type, torch.uint8)
    assert torch.equal(absmax, scales)
    assert torch.equal(packed, expected.flatten())


def normal(count: int, dtype: torch.dtype, seed: int = 0, size: float = 0.02) -> torch.Tensor:
    return (torch.randn(count, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_weights(dtype: torch.dtype, quant_type: str) -> None:
    for count in (1, 2, 63, 64, 65, 128, 64 * 300 + 17, quantization.PACK_CHUNK + 64, 2 * quantization.PACK_CHUNK + 63):
        assert_equal_to_bitsandbytes(normal(count, dtype), quant_type)


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("count", [64, 63])
def test_at_and_one_ulp_around_every_threshold(quant_type: str, count: int) -> None:
    code = quantization.bnb_functional.get_4bit_type(quant_type, device="cpu").sort().values
    near = [(code[:-1] + code[1:]) / 2]
    for direction in (-2.0, 2.0):
        step = near[0]
        for _ in range(2):
            step = torch.nextafter(step, torch.tensor(direction))
            near.append(step)
    values = torch.cat([*near, -torch.cat(near), torch.tensor([0.0, -0.0])])
    for largest in (1.0, 2.0, 0.75, 3.3e-3):  # 1 and 2 keep the scaled values exact
        rows = []
        for chosen in values.split(count - 1):
            row = torch.full((count,), largest)
            row[1 : 1 + len(chosen)] = chosen * largest
            rows.append(row)
        for row in rows if count < 64 else [torch.cat(rows)]:
            assert_equal_to_bitsandbytes(row, quant_type)


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_denormals_and_extremes(dtype: torch.dtype, quant_type: str) -> None:
    info = torch.finfo(dtype)
    smallest = torch.nextafter(torch.tensor(0.0, dtype=dtype), torch.tensor(1.0, dtype=dtype)).item()
    cases = [
        torch.zeros(64), -torch.zeros(64), torch.full((64,), smallest), torch.full((64,), -smallest),
        torch.linspace(-1, 1, 64) * info.tiny, torch.linspace(-1, 1, 64) * info.tiny / 4, torch.linspace(-1, 1, 64) * info.max,
        torch.full((64,), info.max), torch.full((64,), -info.max), torch.tensor([info.max, -info.max] * 32),
        torch.tensor([smallest, info.max] * 32), torch.linspace(-1, 1, 64) * 1e-38, torch.linspace(-1, 1, 64) * 0.9e-38,
    ]  # fmt: skip
    rows = [case.to(dtype) for case in cases]
    assert_equal_to_bitsandbytes(torch.cat(rows), quant_type)
    for row in rows:
        assert_equal_to_bitsandbytes(row, quant_type)
        assert_equal_to_bitsandbytes(row[:63], quant_type)
        assert_equal_to_bitsandbytes(row[:1], quant_type)


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_finite_16_bit_number(dtype: torch.dtype, quant_type: str) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[torch.isfinite(values)]
    for order in (slice(None), torch.randperm(len(values), generator=torch.Generator().manual_seed(1))):
        assert_equal_to_bitsandbytes(values[order], quant_type)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=200), st.sampled_from(DTYPES), st.sampled_from(TYPES))
def test_random_bits(words: list[int], dtype: torch.dtype, quant_type: str) -> None:
    values = torch.tensor(words, dtype=torch.int64).to(torch.int32).view(dtype)
    assert_equal_to_bitsandbytes(torch.where(torch.isfinite(values), values, torch.zeros_like(values)), quant_type)


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_shows_in_its_blocks_scale_and_nowhere_else(dtype: torch.dtype, bad: float) -> None:
    for place, block in ((70, 1), (64 * 5 + 1, 5)):
        spoilt = normal(64 * 5 + 3, dtype)
        spoilt[place] = bad
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _, absmax = quantization.pack_four_bit(spoilt, "nf4")
        assert [i for i, value in enumerate(absmax) if not torch.isfinite(value)] == [block]


@pytest.mark.parametrize(("threads", "double_quant"), [(1, True), (2, True), (2, False)])
def test_statistics_are_bitsandbytes_own_at_the_same_thread_count(threads: int, double_quant: bool) -> None:
    weight = normal(700 * 320, torch.bfloat16).view(700, 320)
    section, spec = ModelSection(path="x", double_quant=double_quant), TensorSpec("w", torch.bfloat16, (700, 320))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _, state = quantization.bnb_functional.quantize_4bit(
            weight, blocksize=64, compress_statistics=double_quant, quant_type="nf4", quant_storage=torch.bfloat16
        )
        found = quantization.serialized_statistics(spec, quantization.pack_four_bit(weight, "nf4")[1], section)
    finally:
        torch.set_num_threads(before)
    layout = {each.name: (each.dtype, each.shape) for each in quantization.serialized_layout(spec, section)[1:]}
    assert layout == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()}
    expected = {f"w.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
    (text,) = (key for key in expected if "quant_state" in key)
    assert bytes(found.pop(text).tolist()).rstrip() == bytes(expected.pop(text).tolist())
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
