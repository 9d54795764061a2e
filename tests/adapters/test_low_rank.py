"""LoRA's path as one node: forward and every gradient against the plain formula in double precision, and against PEFT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from qvera.adapters.products.low_rank import trained_linear, trained_path
from tests.adapters.helpers import FOUR_BIT, base_layer, dense_weight, relative

REFERENCE = Path(__file__).parent / "reference"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SETTINGS = [  # n, m, r, tokens, the compute dtype, the base's dtype
    (3, 5, 7, 257, torch.float64, torch.float64), (33, 17, 9, 3, torch.float64, torch.float32),
    (1, 1, 1, 1, torch.float32, torch.float32), (64, 129, 31, 3, torch.float32, torch.bfloat16),
    (64, 129, 16, 257, torch.bfloat16, torch.bfloat16), (33, 17, 9, 1, torch.bfloat16, torch.float32),
    (64, 129, 16, 257, torch.float16, torch.float16), (3, 5, 7, 3, torch.float16, torch.float32),
]  # fmt: skip


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    found = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return found.to(dtype).double()


def textbook(
    x: torch.Tensor, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float, upstream: torch.Tensor
) -> dict[str, torch.Tensor]:
    """y = x (W + s B A)ᵀ in fp64, with autograd through the plain product."""
    x, A, B = (t.double().clone().requires_grad_() for t in (x, A, B))
    y = x @ (W + scale * B @ A).t()
    y.backward(upstream)
    assert x.grad is not None and A.grad is not None and B.grad is not None
    return {"y": y.detach(), "x": x.grad, "A": A.grad, "B": B.grad}


@pytest.mark.parametrize(("n", "m", "r", "tokens", "dtype", "base_dtype"), SETTINGS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_path_and_every_gradient(
    n: int, m: int, r: int, tokens: int, dtype: torch.dtype, base_dtype: torch.dtype, overwrite: bool
) -> None:
    held = torch.promote_types(dtype, torch.float32)
    x, W = numbers(tokens, n, seed=0, dtype=dtype), numbers(m, n, seed=1, dtype=dtype)
    A, B = numbers(r, n, seed=2, dtype=dtype), numbers(m, r, seed=3, dtype=dtype)
    upstream = numbers(tokens, m, seed=4, dtype=base_dtype)
    expected = textbook(x, W, A, B, 0.37, upstream)

    inner, A, B = x.to(dtype).requires_grad_(), A.to(held).requires_grad_(), B.to(held).requires_grad_()
    base = (inner.double() @ W.t()).to(base_dtype)  # in fp64, so that what is measured is the path's own error
    y = trained_path(base, inner, A, B, 0.37, overwrite)
    y.backward(upstream.to(base_dtype))
    assert y.dtype == base_dtype
    assert inner.grad is not None and inner.grad.dtype == dtype
    assert A.grad is not None and A.grad.dtype == held
    assert B.grad is not None and B.grad.dtype == held
    tolerance = max(TOLERANCE[dtype], TOLERANCE[base_dtype])
    for name, found in {"y": y.detach(), "x": inner.grad, "A": A.grad, "B": B.grad}.items():
        assert relative(found, expected[name]) < tolerance, name


@pytest.mark.parametrize("kind", ["linear", "linear-nobias", "int8", "nf4+dq-uint8", "fp4-bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_linear_and_a_pair_in_one_node(kind: str, dtype: torch.dtype) -> None:
    if kind == "int8" and dtype == torch.float32:
        dtype = torch.float16
    base = base_layer(kind, dtype)
    m, n = dense_weight(base).shape
    x, upstream = numbers(2, 5, n, seed=0, dtype=dtype), numbers(2, 5, m, seed=4, dtype=dtype)
    A, B = numbers(6, n, seed=2, dtype=dtype), numbers(m, 6, seed=3, dtype=dtype)
    expected = textbook(x, dense_weight(base), A, B, 2.5, upstream)
    if base.bias is not None:
        expected["y"] += base.bias.double()
    inner, A, B = x.to(dtype).requires_grad_(), A.float().requires_grad_(), B.float().requires_grad_()
    y = trained_linear(base, inner, A, B, 2.5)
    y.backward(upstream.to(dtype))
    assert y.shape == (2, 5, m)
    for name, found in {"y": y.detach(), "x": inner.grad, "A": A.grad, "B": B.grad}.items():
        assert found is not None and relative(found, expected[name]) < 2 * TOLERANCE[dtype], name
    two_nodes = trained_path(base(inner.detach()), inner.detach(), A.detach(), B.detach(), 2.5)
    assert relative(y.detach(), two_nodes) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["lora_peft", "rslora_peft"])
def test_the_numbers_of_peft(name: str) -> None:
    with np.load(REFERENCE / f"{name}.npz") as stored:
        p = {key: torch.from_numpy(stored[key]) for key in stored.files}
    base = nn.Linear(16, 24, dtype=torch.float64).requires_grad_(False)
    base.weight.data, base.bias.data = p["W"], p["bias"]
    x, A, B = (p[key].clone().requires_grad_() for key in ("x", "A", "B"))
    y = trained_linear(base, x, A, B, p["scaling"].item())
    y.backward(p["g"])
    for found, key in ((y.detach(), "y"), (x.grad, "grad_x"), (A.grad, "grad_A"), (B.grad, "grad_B")):
        torch.testing.assert_close(found, p[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("inside", [False, True])
def test_gradcheck(inside: bool) -> None:
    base = nn.Linear(4, 5, dtype=torch.float64).requires_grad_(False)
    leaves = [numbers(*shape, seed=seed).requires_grad_() for seed, shape in enumerate([(7, 4), (3, 4), (5, 3)])]

    def run(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return trained_linear(base, x, A, B, 0.7) if inside else trained_path(base(x), x, A, B, 0.7)

    assert torch.autograd.gradcheck(run, leaves)


def test_a_small_scale_keeps_its_bits_in_float16() -> None:
    """s = 1e-5: s z and s h are below the smallest number of float16, and their products with x, g and B are not."""
    x, A = 8 * numbers(64, 32, seed=0), numbers(8, 32, seed=1) / 64
    B, upstream = 64 * numbers(16, 8, seed=2), 8 * numbers(64, 16, seed=3)
    x, A, B, upstream = (t.half().double() for t in (x, A, B, upstream))
    expected = textbook(x, torch.zeros(16, 32, dtype=torch.float64), A, B, 1e-5, upstream)
    inner, A, B = x.half().requires_grad_(), A.float().requires_grad_(), B.float().requires_grad_()
    y = trained_path(torch.zeros(64, 16, dtype=torch.float16), inner, A, B, 1e-5)
    y.backward(upstream.half())
    for name, found in {"y": y.detach(), "x": inner.grad, "A": A.grad, "B": B.grad}.items():
        assert found is not None and relative(found, expected[name]) < 3e-3, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", ["AB", "A", "B", ""])
def test_x_is_kept_only_for_a_trained_a_and_z_only_for_a_trained_b(trained: str, dtype: torch.dtype) -> None:
    base = base_layer("nf4-uint8", dtype)
    m, n = dense_weight(base).shape
    x = numbers(10, n, seed=0).to(dtype).requires_grad_()
    A, B = (numbers(*s, seed=1).float().requires_grad_(k in trained) for k, s in (("A", (4, n)), ("B", (m, 4))))
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = trained_linear(base, x, A, B, 0.5)
    assert sorted(tuple(t.shape) for t in kept) == sorted(
        [*([(10, n)] if "A" in trained else []), *([(10, 4)] if "B" in trained else []), (4, n), (m, 4)]
    )
    assert any(t.data_ptr() == x.data_ptr() for t in kept) is ("A" in trained)  # x itself and no copy
    y.sum().backward()
    assert [t.grad is not None for t in (x, A, B)] == [True, "A" in trained, "B" in trained]


@pytest.mark.parametrize("kind", FOUR_BIT[:1])
def test_an_input_without_a_gradient_needs_no_product_with_the_weight(kind: str) -> None:
    base = base_layer(kind)
    m, n = dense_weight(base).shape
    A, B = numbers(4, n, seed=1).float().requires_grad_(), numbers(m, 4, seed=2).float().requires_grad_()
    y = trained_linear(base, numbers(10, n, seed=0).float(), A, B, 0.5)
    base.weight.quant_state = None  # backward may not read the weight
    y.sum().backward()
    assert A.grad is not None and A.grad.abs().sum() > 0


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    A, B = numbers(2, 3, seed=0).requires_grad_(), numbers(5, 2, seed=1).requires_grad_()
    y = trained_path(torch.zeros(4, 5, dtype=torch.float64), numbers(4, 3, seed=2), A, B, 1.0)
    (first,) = torch.autograd.grad(y.square().sum(), A, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_nothing_is_changed_in_place_unless_allowed() -> None:
    x, A, B = numbers(4, 3, seed=0), numbers(2, 3, seed=1).requires_grad_(), numbers(5, 2, seed=2).requires_grad_()
    base = numbers(4, 5, seed=3)
    before = base.clone()
    y = trained_path(base, x, A, B, 1.0)
    assert torch.equal(base, before)
    over = trained_path(base, x, A, B, 1.0, overwrite=True)
    assert over.data_ptr() == base.data_ptr()
    torch.testing.assert_close(y, over)
    with torch.no_grad():
        torch.testing.assert_close(trained_path(before, x, A, B, 1.0), y.detach())
