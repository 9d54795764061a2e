"""Forward and every gradient of the adapter's mathematics against the textbook formula in double precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from qvera.adapters.products.functional import expand, few_tokens, project, scale_input
from qvera.kernels import low_rank
from tests.adapters.helpers import TOLERANCE, parts, relative, rounded, textbook

REFERENCE = Path(__file__).parent / "reference"

SIZES = [  # n, m, r, b_groups
    (33, 17, 9, 1), (64, 129, 31, 1), (33, 17, 9, 3), (3, 5, 7, 1), (64, 129, 32, 2), (6, 5, 8, 8), (1, 1, 1, 1),
]  # fmt: skip
SETTINGS = [  # tokens, dtype, the base's dtype, whether with an a: every pair of the first three
    (1, torch.float64, None, False), (3, torch.float64, torch.float32, False), (257, torch.float64, torch.bfloat16, False),
    (3, torch.float32, None, False), (257, torch.float32, torch.float32, False), (1, torch.float32, torch.bfloat16, False),
    (257, torch.bfloat16, None, False), (1, torch.bfloat16, torch.float32, False), (3, torch.bfloat16, torch.bfloat16, False),
    (257, torch.float16, None, False), (3, torch.float16, torch.float32, False), (1, torch.float16, torch.bfloat16, False),
    (257, torch.float64, None, True), (1, torch.float32, None, True), (257, torch.bfloat16, None, True),
    (3, torch.float16, None, True),
]  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "size"), [(setting, SIZES[(i + j) % 7]) for i, setting in enumerate(SETTINGS) for j in (0, 2, 5)]
)
def test_forward_and_every_gradient(
    setting: tuple[int, torch.dtype, torch.dtype | None, bool], size: tuple[int, int, int, int]
) -> None:
    (T, dtype, base_dtype, scaled), (n, m, r, groups) = setting, size
    base_dtype = base_dtype or dtype
    exact = rounded(parts(T, n, m, r, groups=groups, scaled=scaled), dtype)
    vector = torch.promote_types(dtype, torch.float32)
    upstream = torch.randn(T, m, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    upstream = upstream.to(base_dtype).double()
    expected = textbook(exact, 0.37, upstream)
    leaves = {"x": exact["x"].to(dtype), **{k: exact[k].to(vector) for k in "dba" if k in exact}}
    x, d, b, *a = (leaf.requires_grad_() for leaf in leaves.values())
    # the base product in fp64, so that what is measured is the adapter's own error
    base = (x.double() @ exact["W"].t()).to(base_dtype)
    z = project(scale_input(x, a[0]) if a else x, exact["A"].to(dtype))
    before = base.clone(), z.clone()
    y = expand(base, z, d, b, exact["B"].to(dtype), 0.37)
    y.backward(upstream.to(base_dtype))
    assert torch.equal(base, before[0]) and torch.equal(z, before[1])
    assert y.dtype == base_dtype
    tolerance = max(TOLERANCE[dtype], TOLERANCE[base_dtype]) * (1.5 if scaled else 1)
    assert relative(y.detach(), expected["y"]) < tolerance
    for name, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype
        assert relative(leaf.grad, expected[name]) < tolerance, name


def of_peft(number: int) -> tuple[dict[str, torch.Tensor], float]:
    """A linear of PEFT's VeRA: it uses the leading columns of A and rows of B."""
    stored = np.load(REFERENCE / "vera_peft.npz")
    names = ("W", "bias", "d", "b", "x", "g", "y", "grad_x", "grad_d", "grad_b")
    found = {name: torch.from_numpy(stored[f"{name}{number}"]) for name in names}
    m, n = found["W"].shape
    return {**found, "A": torch.from_numpy(stored["A"])[:, :n], "B": torch.from_numpy(stored["B"])[:m]}, 1.0


def of_randlora() -> tuple[dict[str, torch.Tensor], float]:
    """ConvVeRA of RandLoRA's authors, which is VeRA up to a scale."""
    stored = {name: torch.from_numpy(value) for name, value in np.load(REFERENCE / "vera_randlora_repo.npz").items()}
    names = {"bias": "bias", "d": "lambda", "b": "gamma", "x": "x", "g": "g", "y": "y", "grad_x": "grad_x"}
    names |= {"grad_d": "grad_lambda", "grad_b": "grad_gamma"}
    found = {ours: stored[f"conv_{theirs}"].squeeze(0) for ours, theirs in names.items()}
    W = stored["conv_W_in_out"].t()
    A, B = stored["basis_b"][0, : W.shape[1]].t(), stored["basis_a"][0, :, : len(W)].t()
    return {**found, "W": W, "A": A, "B": B}, float(stored["conv_scaling"])


@pytest.mark.parametrize(
    "read", [lambda: of_peft(1), lambda: of_peft(2), of_randlora], ids=["peft", "wide", "randlora"]
)
def test_it_is_the_vera_of_other_peoples_code(read: Callable[[], tuple[dict[str, torch.Tensor], float]]) -> None:
    p, scale = read()
    x, d, b = (p[name].clone().requires_grad_() for name in ("x", "d", "b"))
    y = expand(torch.nn.functional.linear(x, p["W"], p["bias"]), project(x, p["A"]), d, b, p["B"], scale)
    y.backward(p["g"])
    for found, name in ((y, "y"), (x.grad, "grad_x"), (d.grad, "grad_d"), (b.grad, "grad_b")):
        torch.testing.assert_close(found, p[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("T", "groups"), [(1, 1), (1, 4), (6, 1), (6, 4)])
def test_gradcheck(T: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "B_BLOCK_ELEMENTS", 12)  # four rows at a time: the last block is short
    p = parts(T, 3, 5, 16, groups=groups, scaled=True)
    assert few_tokens(T, p["B"]) is (T == 1)
    leaves = [p[k].requires_grad_() for k in "xWdba"]

    def run(*leaves: torch.Tensor) -> torch.Tensor:
        x, W, d, b, a = leaves
        return expand(x @ W.t(), project(scale_input(x, a), p["A"]), d, b, p["B"], 0.7)

    assert torch.autograd.gradcheck(run, leaves)


def test_a_strided_output_gradient_and_input_do() -> None:
    p = parts(6, 5, 7, 3)
    upstream = torch.randn(7, 6, dtype=torch.float64).t()  # not contiguous
    expected = textbook(p, 1.0, upstream)
    x = p["x"].t().contiguous().t().requires_grad_()
    d, b = p["d"].requires_grad_(), p["b"].requires_grad_()
    expand(x @ p["W"].t(), project(x, p["A"]), d, b, p["B"], 1.0).backward(upstream)
    for actual, name in ((x.grad, "x"), (d.grad, "d"), (b.grad, "b")):
        assert actual is not None and relative(actual, expected[name]) < 1e-12


@pytest.mark.parametrize(("T", "r"), [(2, 64), (64, 8)])
def test_only_z_and_the_small_tensors_are_kept_for_backward(T: int, r: int) -> None:
    n, m = 40, 48
    p = {k: v.float() for k, v in parts(T, n, m, r).items()}
    assert few_tokens(T, p["B"]) is (T == 2)
    x, d, b = (p[k].requires_grad_() for k in "xdb")
    base = torch.randn(T, m, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = expand(base, project(x, p["A"]), d, b, p["B"], 0.5)
    # A reaches `project`'s node, the rest `expand`'s: no x, no output, no copy of B scaled by the vectors
    shapes = sorted((n, r) if t.shape == (r, n) else tuple(t.shape) for t in saved)
    assert shapes == sorted([(n, r), (T, r), (r,), (m,), (m, r)])
    y.sum().backward()
    assert x.grad is not None


def test_only_the_gradients_asked_for_are_made() -> None:
    p = parts(4, 3, 5, 2)
    for wanted in ("base", "z", "d", "b"):
        leaves = {"base": p["x"] @ p["W"].t(), "z": project(p["x"], p["A"]), "d": p["d"].clone(), "b": p["b"].clone()}
        leaves[wanted].requires_grad_()
        expand(leaves["base"], leaves["z"], leaves["d"], leaves["b"], p["B"], 1.0).square().sum().backward()
        assert [k for k, v in leaves.items() if v.grad is not None] == [wanted]


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    p = parts(4, 3, 5, 2)
    b = p["b"].requires_grad_()
    y = expand(p["x"] @ p["W"].t(), project(p["x"], p["A"]), p["d"], b, p["B"], 1.0)
    (first,) = torch.autograd.grad(y.square().sum(), b, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
