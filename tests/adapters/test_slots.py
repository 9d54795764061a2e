"""The products of rows that each have vectors or a pair of their own, against plain code: padded, joined, in any order."""

from __future__ import annotations

import math

import pytest
import torch

from qvera.adapters.products.slots import TokenSlots, expand_slots, pair_slots, scale_slots
from tests.adapters.helpers import relative

ROWS, IN, OUT, RANK = 4, 7, 11, 6
LAYOUTS = {
    "padded": (0,) * 5 + (1,) * 5 + (2,) * 5 + (3,) * 5,
    "joined": (0, 0, 0, 1, 3, 3, 3, 3, 3),  # no token is of row 2
    "one row": (0,) * 7,
    "scattered": (3, 0, 1, 3, 3, 0, 2, 1, 0, 3, 3),
    "equal": (0, 0, 1, 1, 2, 2, 3, 3),
    "uneven": (0, 1, 2, 3, 3, 3, 3, 3, 3, 3),
}
ENDS = {"joined": (0, 3, 4, 9), "equal": (0, 2, 4, 6, 8)}
"""What the host knows of some layouts."""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def _layout(name: str) -> tuple[TokenSlots, torch.Tensor, tuple[int, ...], int]:
    """The row of each token, as the product takes it and plain; the dimensions in front of the last one; the rows."""
    index = torch.tensor(LAYOUTS[name])
    return TokenSlots(index, ROWS), index, (ROWS, 5) if name == "padded" else (1, len(index)), ROWS


def _plain(
    base: torch.Tensor, z: torch.Tensor, d: torch.Tensor, b: torch.Tensor, B: torch.Tensor, scale: float,
    index: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The product token by token, in fp64."""
    base, z, d, b, B = (t.double() for t in (base, z, d, b, B))
    outputs = []
    for t, row in enumerate(index.tolist()):
        inner, own = scale * d[row] * z.reshape(-1, z.shape[-1])[t], b[row].reshape(-1, b.shape[-1])
        groups = zip(own, inner.chunk(len(own)), B.chunk(len(own), 1), strict=True)
        outputs.append(base.reshape(-1, base.shape[-1])[t] + sum(o * (columns @ part) for o, part, columns in groups))
    return torch.stack(outputs).view(base.shape)


def _drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


DTYPES = [*((t, t) for t in TOLERANCE), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(
    ("layout", "groups", "dtype", "base_dtype"),
    [
        (layout, groups, *DTYPES[(i + 2 * groups) % 6])
        for groups in (0, 1, 3)
        for i, layout in enumerate((*LAYOUTS, *LAYOUTS))
    ],
)
def test_every_token_gets_the_product_and_every_vector_the_gradient_of_its_row(
    layout: str, groups: int, dtype: torch.dtype, base_dtype: torch.dtype
) -> None:
    tokens, index, front, rows = _layout(layout)
    vectors = torch.promote_types(dtype, torch.float32)
    B = torch.randn(OUT, RANK, generator=torch.Generator().manual_seed(9))
    inputs = [
        _drawn((*front, OUT), base_dtype, 0),
        _drawn((*front, RANK), dtype, 1),
        _drawn((rows, RANK), vectors, 2),
        _drawn((rows, *[groups][:groups], OUT), vectors, 3),
    ]
    base, z, d, b = inputs
    found, expected = expand_slots(base, z, d, b, B, 0.7, tokens), _plain(base, z, d, b, B, 0.7, index)
    g = torch.randn(found.shape, generator=torch.Generator().manual_seed(4)).to(base_dtype)
    found_gradients = torch.autograd.grad(found, inputs, g)
    tolerance = max(TOLERANCE[dtype], TOLERANCE[base_dtype])
    assert found.dtype == base_dtype and relative(found, expected) < tolerance
    expected_gradients = torch.autograd.grad(expected, inputs, g.double())
    for one, other, of in zip(found_gradients, expected_gradients, inputs, strict=True):
        assert one.dtype == of.dtype and relative(one, other) < tolerance


@pytest.mark.parametrize(("layout", "dtype"), list(zip(LAYOUTS, TOLERANCE, strict=False)))
def test_every_token_is_scaled_with_the_vector_of_its_row(layout: str, dtype: torch.dtype) -> None:
    tokens, index, front, rows = _layout(layout)
    x, a = _drawn((*front, IN), dtype, 0), _drawn((rows, IN), torch.promote_types(dtype, torch.float32), 1)
    found, expected = scale_slots(x, a, tokens), x.double() * a.double()[index].view(x.shape)
    g = torch.randn(found.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    pairs = zip(
        (found, *torch.autograd.grad(found, (x, a), g)),
        (expected, *torch.autograd.grad(expected, (x, a), g.double())),
        strict=True,
    )
    assert found.dtype == dtype and all(relative(one, other) < TOLERANCE[dtype] for one, other in pairs)


def _present(name: str) -> tuple[TokenSlots, torch.Tensor, tuple[int, ...], int]:
    """As `_layout`, with slots that all have tokens."""
    _, index, front, _ = _layout(name)
    present, index = index.unique(return_inverse=True)
    return TokenSlots(index, len(present), ENDS.get(name, ())), index, front, len(present)


@pytest.mark.parametrize(
    ("layout", "rank", "dtype", "base_dtype"),
    [(layout, rank, *DTYPES[(i + rank) % 6]) for rank in (1, 4) for i, layout in enumerate((*LAYOUTS, *LAYOUTS))],
)
def test_every_token_gets_the_pair_of_its_row_and_the_pair_its_gradient(
    layout: str, rank: int, dtype: torch.dtype, base_dtype: torch.dtype
) -> None:
    tokens, index, front, rows = _present(layout)
    wide = torch.promote_types(dtype, torch.float32)
    shapes = ((*front, OUT), base_dtype), ((*front, IN), dtype), ((rows, rank, IN), wide), ((rows, OUT, rank), wide)
    inputs = [_drawn(shape, of, seed) for seed, (shape, of) in enumerate(shapes)]
    base, x, A, B = inputs
    found = pair_slots(base, x, A, B, 0.7, tokens)
    each = x.double().reshape(-1, IN, 1)
    added = B.double()[index] @ (A.double()[index] @ each)
    expected = base.double() + 0.7 * added.view(base.shape)
    g = torch.randn(found.shape, generator=torch.Generator().manual_seed(4)).to(base_dtype)
    pairs = zip(
        (found, *torch.autograd.grad(found, inputs, g)),
        (expected, *torch.autograd.grad(expected, inputs, g.double())),
        (base, *inputs),
        strict=True,
    )
    tolerance = max(TOLERANCE[dtype], TOLERANCE[base_dtype])
    assert all(one.dtype == of.dtype and relative(one, other) < tolerance for one, other, of in pairs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_the_product_of_pairs_in_float64(layout: str) -> None:
    tokens, _, front, rows = _present(layout)
    shapes = ((*front, 5), (*front, 4), (rows, 3, 4), (rows, 5, 3))
    inputs = [_drawn(shape, torch.float64, seed) for seed, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(lambda base, x, A, B: pair_slots(base, x, A, B, 1.3, tokens), inputs)


@pytest.mark.parametrize(("layout", "groups"), [("padded", 2), ("joined", 1), ("one row", 2), ("scattered", 1)])
def test_gradients_of_the_row_product_in_float64(layout: str, groups: int) -> None:
    tokens, _, front, rows = _layout(layout)
    shapes = ((*front, 5), (*front, 4), (rows, 4), (rows, groups, 5))
    inputs = [_drawn(shape, torch.float64, seed) for seed, shape in enumerate(shapes)]
    B = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    assert torch.autograd.gradcheck(lambda base, z, d, b: expand_slots(base, z, d, b, B, 1.3, tokens), inputs)
    assert torch.autograd.gradcheck(lambda x, a: scale_slots(x, a, tokens), (inputs[1], inputs[2]))


@pytest.mark.parametrize(("layout", "broken"), [("padded", "tokens"), ("joined", "vectors"), ("scattered", "tokens")])
def test_a_row_that_is_not_finite_leaves_the_others_as_they_are_to_the_bit(layout: str, broken: str) -> None:
    tokens, index, front, _ = _layout(layout)
    B = torch.randn(OUT, RANK, generator=torch.Generator().manual_seed(9))
    others, others_tokens = torch.arange(ROWS) != 3, (index != 3).view(front)
    results = []
    for value in (None, math.nan, math.inf):
        shapes = ((*front, OUT), (*front, RANK), (ROWS, RANK), (ROWS, OUT))
        inputs = [_drawn(shape, torch.float32, seed).detach() for seed, shape in enumerate(shapes)]
        if value is not None:
            if broken == "tokens":
                inputs[0][~others_tokens] = inputs[1][~others_tokens] = value
            else:
                inputs[2][~others] = inputs[3][~others] = value
        base, z, d, b = (t.requires_grad_() for t in inputs)
        y = expand_slots(base, scale_slots(z, d, tokens), d, b, B, 0.7, tokens)
        gradients = torch.autograd.grad(y.square().sum(), (base, z, d, b))
        kept = (others_tokens, others_tokens, others, others)
        results.append([y[others_tokens], *(g[keep] for g, keep in zip(gradients, kept, strict=True))])
        assert value is None or not y[~others_tokens].isfinite().any()
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], result, strict=True))


def test_a_pair_that_is_not_finite_leaves_the_other_rows_as_they_are_to_the_bit() -> None:
    tokens, index, front, rows = _present("scattered")
    results = []
    for value in (None, math.nan):
        shapes = ((*front, 5), (*front, 4), (rows, 3, 4), (rows, 5, 3))
        base, x, A, B = (_drawn(shape, torch.float32, seed) for seed, shape in enumerate(shapes))
        if value is not None:
            with torch.no_grad():
                A[3] = value
        y = pair_slots(base, x, A, B, 0.7, tokens)
        x, A, B = torch.autograd.grad(y.square().sum(), (x, A, B))
        results.append([y[0, index != 3], x[0, index != 3], A[:3], B[:3]])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_many_tokens_are_added_up_in_fp32() -> None:
    """In bf16 a sum of ones would stop at 256."""
    count = 3001
    tokens = TokenSlots(torch.zeros(count, dtype=torch.int64), 1)
    z = torch.ones(1, count, 1, dtype=torch.bfloat16)
    d, b = torch.ones(1, 1, requires_grad=True), torch.ones(1, 1, requires_grad=True)
    y = expand_slots(torch.zeros_like(z), z, d, b, torch.ones(1, 1), 1.0, tokens)
    assert [g.item() for g in torch.autograd.grad(y.sum(), (d, b))] == [count, count]
