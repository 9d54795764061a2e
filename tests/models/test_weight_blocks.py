"""A weight made some rows at a time is the weight, and products with it are those with the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qvera.models import linear, quantization
from qvera.models.linear import WeightBlocks, blocked_input_grad, blocked_linear
from tests.adapters.helpers import relative

SIZES = [(192, 128), (100, 64), (65, 320)]


def four_bit(m: int, n: int, kind: str, storage: str, nested: bool, dtype: torch.dtype, bias: bool = False) -> Any:
    torch.manual_seed(m)
    layer = quantization.Linear4bit(
        n,
        m,
        bias,
        compute_dtype=dtype,
        quant_type=kind,
        compress_statistics=nested,
        quant_storage=getattr(torch, storage),
    ).to("cpu")
    model = torch.nn.Sequential(layer)
    linear.freeze_linears(model)
    return layer.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("kind", "storage"), [("nf4", "bfloat16"), ("nf4", "uint8"), ("fp4", "float32")])
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_the_blocks_are_the_weight_to_the_bit(
    m: int, n: int, kind: str, storage: str, nested: bool, dtype: torch.dtype
) -> None:
    layer = four_bit(m, n, kind, storage, nested, dtype)
    blocks = WeightBlocks(layer, dtype, 7 * n + 3)
    found = list(blocks)
    assert len(blocks) == len(found) == -(-m // 7)
    assert [rows.start for rows, _ in found] == list(range(0, m, 7))
    assert torch.equal(torch.cat([weight for _, weight in found]), quantization.dequantized_weight(layer, dtype))


@pytest.mark.parametrize("width", [32, 96, 160])
def test_a_weight_whose_scales_lie_across_rows_is_one_block(width: int) -> None:
    layer = four_bit(64, width, "nf4", "uint8", True, torch.float32)
    blocks = WeightBlocks(layer, torch.float32, width)
    ((rows, weight),) = blocks
    assert (rows, len(blocks)) == (slice(0, 64), 1)
    assert torch.equal(weight, quantization.dequantized_weight(layer, torch.float32))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_products_by_blocks_are_those_with_the_whole(m: int, n: int, dtype: torch.dtype, bias: bool) -> None:
    layer = four_bit(m, n, "nf4", "bfloat16", True, dtype)
    W = quantization.dequantized_weight(layer, torch.float64)
    x, g, b = torch.randn(11, n, dtype=dtype), torch.randn(11, m, dtype=dtype), torch.randn(m, dtype=dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 5e-3
    y = blocked_linear(x, WeightBlocks(layer, dtype, 5 * n), b if bias else None)
    assert y.dtype == dtype
    assert relative(y, x.double() @ W.t() + (b.double() if bias else 0)) < tolerance
    out = torch.empty(11, n, dtype=dtype)
    blocked_input_grad(g, WeightBlocks(layer, dtype, 5 * n), out)
    assert relative(out, g.double() @ W) < tolerance


@pytest.mark.parametrize("tokens", [3, 40])
def test_a_large_frozen_linear_goes_by_blocks_and_backward_with_many_tokens_does_not(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "BLOCK_WEIGHTS", 64 * 128)
    monkeypatch.setattr(linear, "_MAX_SUMMED_ELEMENTS", 20 * 128)
    layer = four_bit(128, 128, "nf4", "bfloat16", True, torch.float32, bias=True)
    assert len(WeightBlocks(layer, torch.float32, linear.BLOCK_WEIGHTS)) == 2
    assert linear.backward_by_blocks(tokens, 128) is (tokens == 3)
    W = quantization.dequantized_weight(layer, torch.float32)
    x = torch.randn(1, tokens, 128).requires_grad_()
    g = torch.randn(1, tokens, 128)
    y = layer(x)
    y.backward(g)
    assert relative(y.detach(), x.detach() @ W.t() + layer.bias) < 1e-5
    assert x.grad is not None
    assert relative(x.grad, g @ W) < 1e-5


def test_the_weights_of_a_70b_go_by_blocks() -> None:
    assert linear.BLOCK_WEIGHTS < 2048 * 4096
    assert linear.backward_by_blocks(3, 8192)
    assert not linear.backward_by_blocks(1700, 8192)
