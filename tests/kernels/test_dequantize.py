"""The 4-bit weight in one launch: to the bit what bitsandbytes gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch

from qvera.kernels import dequantize
from tests.adapters.helpers import relative


def plain_dequantize_4bit(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """In torch operations. bitsandbytes' own code differs between devices."""
    scale = state.absmax
    if state.nested:
        outer = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: scale.numel()]
        scale = state.state2.code[scale.int()] * outer + state.offset
    pairs = packed.view(torch.uint8).flatten().int()
    count = state.shape.numel()
    codes = state.code[torch.stack((pairs >> 4, pairs & 15), dim=1).flatten()[:count]]
    return (codes * scale.repeat_interleave(state.blocksize)[:count]).to(state.dtype).view(state.shape)


@pytest.mark.parametrize(
    ("quant_type", "double", "storage", "dtype", "shape", "blocksize"),
    [
        ("nf4", True, torch.uint8, torch.float32, (130, 192), 64),
        ("nf4", True, torch.bfloat16, torch.float16, (37, 64), 64),
        ("nf4", False, torch.uint8, torch.float16, (5, 24), 64),  # one block, not full
        ("nf4", True, torch.uint8, torch.float32, (3, 25), 32),  # an odd number of weights
        ("fp4", True, torch.float32, torch.float16, (300, 64), 64),  # two blocks of blocks
        ("fp4", False, torch.uint8, torch.float32, (7, 640), 128),
        ("nf4", True, torch.uint8, torch.bfloat16, (130, 192), 64),
    ],
)
def test_the_weight_of_the_plain_code_and_of_bitsandbytes(
    quant_type: str, double: bool, storage: torch.dtype, dtype: torch.dtype, shape: tuple[int, int], blocksize: int,
    as_on_an_accelerator: Callable[[], Any],
) -> None:  # fmt: skip
    torch.manual_seed(0)
    packed, state = bnb.quantize_4bit(
        torch.randn(shape, dtype=dtype), blocksize=blocksize, compress_statistics=double, quant_type=quant_type,
        quant_storage=storage,
    )  # fmt: skip
    assert dequantize.dequantize_4bit(packed, state) is None  # a CPU leaves it to bitsandbytes
    with as_on_an_accelerator():
        weight = dequantize.dequantize_4bit(packed, state)
    plain = plain_dequantize_4bit(packed, state)
    assert weight is not None
    assert weight.dtype == dtype
    if dtype == torch.bfloat16:  # the interpreter cuts bf16 off, unrounded
        assert relative(weight, plain) < 1e-2
    else:
        assert torch.equal(weight, plain)
    if shape[1] % blocksize == 0:  # where bitsandbytes' CPU code is right
        assert torch.equal(plain, bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("double", [False, True])
def test_the_fake_implementation_says_what_the_kernel_gives(double: bool) -> None:
    packed, state = bnb.quantize_4bit(torch.randn(5, 64), compress_statistics=double, quant_type="nf4")
    nested = (state.state2.absmax, state.state2.code, state.offset) if double else (None, None, None)
    arguments = (packed, state.absmax, state.code, *nested, 64, 256, state.shape, torch.bfloat16)
    operator = torch.ops.qvera.dequantize_4bit.default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
