"""LoRA's path as one node: forward and every gradient against the plain formula in double precision, and against PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
import torch
from torch import nn

from qvera.adapters.products.low_rank import trained_linear, trained_path
from tests.adapters.helpers import IN, OUT, TOLERANCE, base_layer, dense_weight, relative

Leaves: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
REFERENCE = Path(__file__).parent / "reference"
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


def as_leaves(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, dtype: torch.dtype) -> Leaves:
    """x in the compute dtype, A and B in fp32 or wider, to be trained."""
    held = torch.promote_types(dtype, torch.float32)
    x, A, B = (t.to(kind, copy=True).requires_grad_() for t, kind in ((x, dtype), (A, held), (B, held)))
    return x, A, B


def check(y: torch.Tensor, leaves: Leaves, expected: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, found in zip("yxAB", (y.detach(), *(leaf.grad for leaf in leaves)), strict=True):
        assert found is not None and relative(found, expected[name]) < tolerance, name
    assert [leaf.dtype for leaf in leaves] == [leaf.grad.dtype for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize(("n", "m", "r", "tokens", "dtype", "base_dtype"), SETTINGS)
def test_a_path_and_every_gradient(
    n: int, m: int, r: int, tokens: int, dtype: torch.dtype, base_dtype: torch.dtype
) -> None:
    x, W = numbers(tokens, n, seed=0, dtype=dtype), numbers(m, n, seed=1, dtype=dtype)
    A, B = numbers(r, n, seed=2, dtype=dtype), numbers(m, r, seed=3, dtype=dtype)
    upstream = numbers(tokens, m, seed=4, dtype=base_dtype)
    expected = textbook(x, W, A, B, 0.37, upstream)
    for overwrite in (False, True):
        leaves = as_leaves(x, A, B, dtype)
        # the base in fp64, so that what is measured is the path's own error
        base = (leaves[0].double() @ W.t()).to(base_dtype)
        before = base.clone()
        y = trained_path(base, *leaves, 0.37, overwrite)
        y.backward(upstream.to(base_dtype))
        assert y.dtype == base_dtype and (overwrite or torch.equal(base, before))
        check(y, leaves, expected, max(TOLERANCE[dtype], TOLERANCE[base_dtype]))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("linear", torch.float32), ("linear-nobias", torch.bfloat16), ("int8", torch.float16),
     ("nf4+dq-uint8", torch.float32), ("fp4-bfloat16", torch.bfloat16)],
)  # fmt: skip
def test_a_frozen_linear_and_a_pair_in_one_node(kind: str, dtype: torch.dtype) -> None:
    base = base_layer(kind, dtype)
    x, upstream = numbers(2, 5, IN, seed=0, dtype=dtype), numbers(2, 5, OUT, seed=4, dtype=dtype)
    A, B = numbers(6, IN, seed=2, dtype=dtype), numbers(OUT, 6, seed=3, dtype=dtype)
    expected = textbook(x, dense_weight(base), A, B, 2.5, upstream)
    if base.bias is not None:
        expected["y"] += base.bias.double()
    leaves = as_leaves(x, A, B, dtype)
    y = trained_linear(base, *leaves, 2.5)
    y.backward(upstream.to(dtype))
    assert y.shape == (2, 5, OUT)
    check(y, leaves, expected, 2 * TOLERANCE[dtype])


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
    leaves = as_leaves(x, A, B, torch.float16)
    y = trained_path(torch.zeros(64, 16, dtype=torch.float16), *leaves, 1e-5)
    y.backward(upstream.half())
    check(y, leaves, expected, 3e-3)


@pytest.mark.parametrize(("trained", "dtype"), [("AB", torch.float32), ("A", torch.bfloat16), ("B", torch.float32)])
def test_x_is_kept_only_for_a_trained_a_and_z_only_for_a_trained_b(trained: str, dtype: torch.dtype) -> None:
    base, x = base_layer("nf4-uint8", dtype), numbers(10, IN, seed=0).to(dtype).requires_grad_()
    A, B = (numbers(*s, seed=1).float().requires_grad_(k in trained) for k, s in (("A", (4, IN)), ("B", (OUT, 4))))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = trained_linear(base, x, A, B, 0.5)
    wanted = {"A": [(10, IN)], "B": [(10, 4)]}
    assert sorted(tuple(t.shape) for t in kept) == sorted([*(s for k in trained for s in wanted[k]), (4, IN), (OUT, 4)])
    assert any(t.data_ptr() == x.data_ptr() for t in kept) is ("A" in trained)  # x itself and no copy
    y.sum().backward()
    assert [t.grad is not None for t in (x, A, B)] == [True, "A" in trained, "B" in trained]


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_tokens_give_gradients_of_zeros(shape: tuple[int, ...]) -> None:
    """As an expert gets them that no token was routed to."""
    for base in (None, base_layer("linear"), base_layer("nf4-uint8")):
        leaves = as_leaves(numbers(*shape, IN, seed=0), numbers(4, IN, seed=1), numbers(OUT, 4, seed=2), torch.float32)
        y = trained_path(torch.zeros(*shape, OUT), *leaves, 0.5) if base is None else trained_linear(base, *leaves, 0.5)
        y.sum().backward()
        assert y.shape == (*shape, OUT)
        assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves)


def test_an_input_without_a_gradient_needs_no_product_with_the_weight() -> None:
    base = base_layer("nf4-uint8")
    A, B = numbers(4, IN, seed=1).float().requires_grad_(), numbers(OUT, 4, seed=2).float().requires_grad_()
    y = trained_linear(base, numbers(10, IN, seed=0).float(), A, B, 0.5)
    base.weight.quant_state = None  # backward may not read the weight
    y.sum().backward()
    assert A.grad is not None and A.grad.abs().sum() > 0


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    A, B = numbers(2, 3, seed=0).requires_grad_(), numbers(5, 2, seed=1).requires_grad_()
    y = trained_path(torch.zeros(4, 5, dtype=torch.float64), numbers(4, 3, seed=2), A, B, 1.0)
    (first,) = torch.autograd.grad(y.square().sum(), A, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
