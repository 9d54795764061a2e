"""Columns times a vector: the kernel in Triton's interpreter against plain code in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qvera.adapters.products.functional import scale_input
from qvera.kernels.low_rank import scaled_columns
from tests.adapters.helpers import relative
from tests.kernels.conftest import Calls

SETTINGS = [  # shape, shape of the vectors, dtype, the base's dtype: odd widths, several blocks of columns, mixed batches
    ((3, 7, 45), (45,), torch.bfloat16, torch.bfloat16), ((2, 1500), (1500,), torch.float16, None),
    ((3, 4, 1030), (1030,), torch.float16, torch.float32), ((5, 9), (9,), torch.float32, torch.bfloat16),
    ((1, 1), (1,), torch.float32, None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "vector_shape", "dtype", "base_dtype", "strided"),
    [(*setting, (i + j) % 2 == 0) for i, setting in enumerate(SETTINGS) for j in range(1 if i else 2)],
)
def test_against_plain_code(
    shape: tuple[int, ...], vector_shape: tuple[int, ...], dtype: torch.dtype, base_dtype: torch.dtype | None,
    strided: bool, as_on_an_accelerator: Callable[[], Any],
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape[:-1], shape[-1] + 2 * strided, generator=generator).to(dtype)[..., : shape[-1]]
    vector = torch.randn(vector_shape, generator=generator)
    base = None if base_dtype is None else torch.randn(shape, generator=generator).to(base_dtype)
    expected = 0.3 * x.double() * vector.double() + (0 if base is None else base.double())
    with as_on_an_accelerator():
        found = scaled_columns(x, vector, 0.3, base)
    assert found.dtype == (base_dtype or dtype) and found.shape == x.shape
    # the interpreter cuts fp32 to bf16 where a card rounds
    tolerance = {torch.bfloat16: 6e-3, torch.float16: 5e-4, torch.float32: 1e-6}
    assert relative(found, expected) < tolerance[found.dtype]
    assert relative(scaled_columns(x, vector, 0.3, base), expected) < 2 * tolerance[dtype] + tolerance[found.dtype]


@pytest.mark.parametrize("base_dtype", [None, torch.float32])
def test_every_row_takes_the_vector_of_its_index(
    base_dtype: torch.dtype | None, as_on_an_accelerator: Callable[[], Any]
) -> None:
    generator = torch.Generator().manual_seed(0)
    index = torch.tensor([2, 0, 2, 4, 1])
    x, vectors = (torch.randn(5, 1030, generator=generator) for _ in range(2))
    base = None if base_dtype is None else torch.randn(1, 5, 1030, generator=generator)
    expected = 0.3 * x.double() * vectors.double()[index] + (0 if base is None else base.double())
    with as_on_an_accelerator():
        found = scaled_columns(x.view(1, 5, -1), vectors, 0.3, base, index)
    assert relative(found, expected.view(1, 5, -1)) < 1e-6
    assert relative(scaled_columns(x.view(1, 5, -1), vectors, 0.3, base, index), expected.view(1, 5, -1)) < 1e-6


@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 45), torch.float32), ((2, 65, 130), torch.bfloat16), ((66, 257), torch.float16)]
)
def test_gradients_of_a_scaled_input(
    shape: tuple[int, ...], dtype: torch.dtype, as_on_an_accelerator: Callable[[], Any]
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    a = torch.randn(shape[-1], generator=generator)
    own_x, own_a = x.clone().requires_grad_(), a.clone().requires_grad_()
    with as_on_an_accelerator(), Calls() as calls:
        torch.autograd.backward(scale_input(own_x, own_a), g)
    assert calls.names == ["qvera::scaled_columns", "qvera::scaled_columns_backward"]
    assert own_x.grad is not None and own_a.grad is not None and own_a.grad.dtype == torch.float32
    tolerance = {torch.bfloat16: 6e-3, torch.float16: 5e-4, torch.float32: 1e-6}[dtype]
    assert relative(own_x.grad, g.double() * a.double()) < tolerance
    assert relative(own_a.grad, (g.double() * x.double()).reshape(-1, shape[-1]).sum(0)) < 1e-6
