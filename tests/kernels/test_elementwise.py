"""Norm, SwiGLU and RoPE: Triton's interpreter against the plain code, forward and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from qvera.kernels import elementwise
from tests.adapters.helpers import relative

Kernels = Callable[[], Any]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # the interpreter cuts bf16 off, unrounded
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp32", "fp16", "bf16"])


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def true_gradients(
    function: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]],
    inputs: list[torch.Tensor],
    upstream: list[torch.Tensor],
) -> list[torch.Tensor]:
    """By autograd in float64."""
    wide = [t.double().requires_grad_() for t in inputs]
    outputs = function(*wide)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return list(torch.autograd.grad(outputs, wide, [t.double() for t in upstream]))


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 48), (2, 1100)], ids=str)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, as_on_an_accelerator: Kernels) -> None:
    torch.manual_seed(0)
    x, g = random(*shape, dtype=dtype), random(*shape, dtype=dtype)
    weight = 1 + 0.3 * random(shape[-1], dtype=dtype)
    with as_on_an_accelerator():
        y, factor = elementwise.rms_norm(x, weight, 1e-5)
        grad = elementwise.rms_norm_backward(g, x, factor, weight)
    expected, expected_factor = elementwise.rms_norm(x, weight, 1e-5)
    assert (y.dtype, y.shape, factor.dtype, factor.shape) == (dtype, x.shape, torch.float32, expected_factor.shape)
    assert relative(y, expected) < TOLERANCE[dtype]
    assert relative(factor, expected_factor) < 1e-6

    def formula(x: torch.Tensor) -> torch.Tensor:
        return weight.double() * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)

    (truth,) = true_gradients(formula, [x], [g])
    for one in (grad, elementwise.rms_norm_backward(g, x, factor, weight)):
        assert one.dtype == dtype
        assert (one.double() - truth).norm() < TOLERANCE[dtype] * max(1, float(truth.norm()))


@DTYPES
@pytest.mark.parametrize("shape", [(1,), (2, 1025)], ids=str)
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype, as_on_an_accelerator: Kernels) -> None:
    torch.manual_seed(0)
    a, c, g = (random(*shape, dtype=dtype) for _ in range(3))
    a.view(-1)[0] = -200.0  # where exp overflows
    with as_on_an_accelerator():
        y, grads = elementwise.swiglu(a, c), elementwise.swiglu_backward(g, a, c)
    assert y.dtype == dtype
    exact = torch.nn.functional.silu(a.double()) * c.double()
    for forward in (y, elementwise.swiglu(a, c)):
        assert (forward.double() - exact).norm() <= TOLERANCE[dtype] * exact.norm() + 1e-9
    truth = true_gradients(lambda a, c: torch.nn.functional.silu(a) * c, [a, c], [g])
    for found in (grads, elementwise.swiglu_backward(g, a, c)):
        for grad, true in zip(found, truth, strict=True):
            assert grad.dtype == dtype
            assert (grad.double() - true).norm() <= TOLERANCE[dtype] * true.norm() + 1e-9


@DTYPES
@pytest.mark.parametrize(("heads", "kv_heads", "width", "batch"), [(9, 3, 24, 1), (2, 2, 128, 2)], ids=str)
def test_rope(
    heads: int, kv_heads: int, width: int, batch: int, dtype: torch.dtype, as_on_an_accelerator: Kernels
) -> None:
    torch.manual_seed(0)
    tokens = 2
    # as attention has them: views of [B, T, H D], transposed; one table of angles for the whole batch, or one a row
    q, k, g_q, g_k = (
        random(2, tokens, n * width, dtype=dtype).view(2, tokens, n, width).transpose(1, 2)
        for n in (heads, kv_heads, heads, kv_heads)
    )
    cos, sin = random(batch, tokens, width, dtype=dtype), random(batch, tokens, width, dtype=dtype)
    with as_on_an_accelerator():
        outputs = elementwise.rope(q, k, cos, sin)
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    plain = elementwise.rope(q, k, cos, sin, False)
    for one, other, same in zip(outputs, expected, plain, strict=True):
        assert torch.equal(same, other)
        assert one.transpose(1, 2).is_contiguous()
        assert torch.equal(one, other) if dtype != torch.bfloat16 else relative(one, other) < 1.5e-2
    truth = true_gradients(lambda q, k: apply_rotary_pos_emb(q, k, cos.double(), sin.double()), [q, k], [g_q, g_k])
    # the flash kernel's gradients may be laid out in any order
    for g in ((g_q, g_k), (g_q.contiguous(), g_k.mT.contiguous().mT)):
        with as_on_an_accelerator():
            grads = elementwise.rope(*g, cos, sin, backward=True)
        for found in (grads, elementwise.rope(*g, cos, sin, True)):
            for grad, true in zip(found, truth, strict=True):
                assert relative(grad, true) < TOLERANCE[dtype]


def test_nothing_to_do(as_on_an_accelerator: Kernels) -> None:
    nothing, heads = torch.empty(0, 8), torch.empty(1, 2, 0, 8)
    with as_on_an_accelerator():
        assert elementwise.rms_norm(nothing, torch.ones(8), 1e-5)[0].shape == (0, 8)
        assert elementwise.swiglu(nothing, nothing).shape == (0, 8)
        assert elementwise.rope(heads, heads, heads[:, 0], heads[:, 0])[0].shape == (1, 2, 0, 8)


def test_fake_implementations_say_what_the_kernels_give() -> None:
    x, row = torch.randn(2, 3, 8), torch.randn(8)
    factor = torch.ones(2, 3, 1)
    q = torch.randn(2, 3, 32).view(2, 3, 4, 8).transpose(1, 2)
    calls = [
        ("rms_norm", (x, row, 1e-5)),
        ("rms_norm_backward", (x, x, factor, row)),
        ("swiglu", (x, x)),
        ("swiglu_backward", (x, x, x)),
        ("rope", (q, q, x, x, False)),
    ]
    for name, arguments in calls:
        torch.library.opcheck(
            getattr(torch.ops.qvera, name).default, arguments, test_utils=("test_schema", "test_faketensor")
        )
