"""The adapter's kernels in Triton's interpreter against the textbook formula in fp64; and fp16 with small vectors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from qvera.adapters.products.functional import expand, few_tokens, project
from qvera.adapters.projection import uniform_pair, vera_scale
from qvera.kernels import choice, low_rank
from tests.adapters.helpers import TOLERANCE, parts, relative, rounded, textbook
from tests.device import DEVICE
from tests.kernels.conftest import Calls

SETTINGS = [  # tokens, n, m, r, groups, dtype, base's dtype
    (257, 5, 17, 9, 1, torch.bfloat16, None), (257, 6, 37, 300, 3, torch.bfloat16, torch.float32),
    (64, 33, 129, 31, 1, torch.float16, None), (2, 9, 45, 32, 2, torch.float16, torch.bfloat16),
    (257, 3, 5, 7, 1, torch.float32, None), (40, 6, 5, 8, 8, torch.float32, torch.bfloat16), (1, 1, 1, 1, 1, torch.float32, None),
]  # fmt: skip


def through(p: dict[str, torch.Tensor], dtype: torch.dtype, base_dtype: torch.dtype, g: torch.Tensor) -> dict[str, Any]:
    """y and every gradient, with B a view of a larger one, as the shared pair's is."""
    x = p["x"].to(dtype).requires_grad_()
    base = (x.double() @ p["W"].t()).to(base_dtype)
    d, b = (p[k].float().requires_grad_() for k in "db")
    m, r = p["B"].shape
    B = torch.nn.functional.pad(p["B"].to(dtype), (0, 3, 0, 2))[:m, :r]
    y = expand(base, project(x, p["A"].to(dtype)), d, b, B, 0.37)
    y.backward(g.to(base_dtype))
    return {"y": y.detach(), "x": x.grad, "d": d.grad, "b": b.grad}


@pytest.mark.parametrize(("T", "n", "m", "r", "groups", "dtype", "base_dtype"), SETTINGS)
def test_forward_and_every_gradient(
    T: int, n: int, m: int, r: int, groups: int, dtype: torch.dtype, base_dtype: torch.dtype | None,
    as_on_an_accelerator: Callable[[], Any],
) -> None:  # fmt: skip
    base_dtype = base_dtype or dtype
    exact = rounded(parts(T, n, m, r, groups=groups), dtype)
    g = torch.randn(T, m, generator=torch.Generator().manual_seed(1)).to(base_dtype)
    expected = textbook(exact, 0.37, g.double())
    with as_on_an_accelerator(), Calls() as calls:
        found = through(exact, dtype, base_dtype, g)
    assert "qvera::vector_gradients" in calls.names
    plain = through(exact, dtype, base_dtype, g)
    # the interpreter cuts fp32 to bf16 where a card rounds: one bit of C worse
    tolerance = max(TOLERANCE[dtype], TOLERANCE[base_dtype])
    for name, one in found.items():
        assert (one.dtype, one.shape) == (plain[name].dtype, plain[name].shape)
        assert relative(one, expected[name]) < tolerance, name


@pytest.mark.parametrize("overwrite", [True, False])
def test_the_output_may_take_the_memory_of_the_base(overwrite: bool) -> None:
    p = parts(40, 5, 6, 3)
    results = []
    for own in (overwrite, False):
        x, d, b = (p[k].clone().requires_grad_() for k in "xdb")
        base = x @ p["W"].t()
        before = base.detach().clone()
        y = expand(base, project(x, p["A"]), d, b, p["B"], 0.5, overwrite=own)
        assert torch.equal(base.detach(), before) is not own
        y.mul_(2)  # it can be changed in place
        y.square().sum().backward()
        results.append([y.detach(), x.grad, d.grad, b.grad])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_fp16_keeps_what_small_vectors_change(as_on_an_accelerator: Callable[[], Any]) -> None:
    """ΔW x and every gradient at r=1024, n=4096, d=0.1 and |b| = 1e-4. With s in C, ΔW x was lost."""
    n, m, r = 4096, 64, 1024
    A, B = (torch.from_numpy(t).half().to(DEVICE) for t in uniform_pair(r, n, m, 0))
    generator = torch.Generator().manual_seed(0)
    W, d, b = torch.randn(m, n, generator=generator).half(), torch.full((r,), 0.1), torch.full((m,), 1e-4)

    def run(x: torch.Tensor, g: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        vectors = torch.promote_types(dtype, torch.float32)
        leaves = [t.to(kind, copy=True).requires_grad_() for t, kind in ((x, dtype), (d, vectors), (b, vectors))]
        own_x, own_d, own_b = leaves
        zeros, z = torch.zeros(len(x), m, dtype=dtype), project(own_x, A.to(dtype))
        change = expand(zeros, z, own_d, own_b, B.to(dtype), vera_scale(r, n))
        return [change, *torch.autograd.grad(change + own_x @ W.to(dtype).t(), leaves, g.to(dtype))]

    for tokens in (8, 64):
        assert few_tokens(tokens, B) is (tokens == 8)
        x, g = (torch.randn(tokens, size, generator=generator).half() for size in (n, m))
        truth = run(x, g, torch.float64)
        for context in (as_on_an_accelerator, nullcontext):
            with context():
                found = run(x, g, torch.float16)
            for name, one, other in zip(("ΔW x", "x", "d", "b"), found, truth, strict=True):
                assert relative(one, other) < 0.01, name


def test_a_kernel_is_launched_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, and a model may be divided over several cards."""
    used: list[torch.device] = []
    monkeypatch.setattr(choice.accelerator, "in_use", lambda device: used.append(device) or nullcontext())
    B = torch.randn(5, 4)
    C = low_rank._combined(B, torch.ones(4), torch.ones(1, 5), 2.0, torch.float32)
    assert torch.equal(C, 2 * B)
    assert used == [B.device]


def test_vectors_that_are_every_second_element_of_another(as_on_an_accelerator: Callable[[], Any]) -> None:
    p = parts(9, 4, 21, 12, groups=3)
    B, d, b, M = p["B"].float(), p["d"].float(), p["b"].float(), torch.randn(21, 12)
    sparse_d, sparse_b = (torch.stack((v, -v), -1)[..., 0] for v in (d, b))

    def found(d: torch.Tensor, b: torch.Tensor) -> list[torch.Tensor | None]:
        gradients = low_rank.vector_gradients(M, B, d, b, 0.5, True, True, 1.0, torch.float32)
        return [
            *gradients,
            low_rank.combined(B, d, b, 0.5, torch.float32),
            low_rank.scaled_columns_backward(M, M, d)[0],
        ]

    with as_on_an_accelerator():
        for one, other in zip(found(sparse_d, sparse_b), found(d, b), strict=True):
            assert one is not None and other is not None and torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_operators_fit_their_fakes(dtype: torch.dtype) -> None:
    p = parts(9, 4, 21, 12, groups=3)
    B, d, b, M = p["B"].to(dtype), p["d"].float(), p["b"].float(), torch.randn(21, 12)
    checks = ("test_schema", "test_faketensor")
    for name, arguments in (
        ("combined", (B, d, b, 0.5, dtype)),
        ("vector_gradients", (M, B, d, b, 0.5, 1.0, dtype)),
        ("vector_gradients", (M, B, d, b, 0.5, 1.0, None)),
        ("wide_product", (B.t(), B)),
        ("scaled_columns_backward", (B, B, torch.randn(12))),
        ("scaled_columns", (B, torch.randn(1, 12), torch.randn(21, 12), None, 0.5)),
        ("scaled_columns", (B, torch.randn(3, 12), None, torch.arange(21) % 3, 0.5)),
    ):
        torch.library.opcheck(getattr(torch.ops.qvera, name).default, arguments, test_utils=checks)
