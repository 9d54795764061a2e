"""The sparse linear against the dense product in double precision, and against numbers of SpIEL's authors."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from qvera.lab import sparse
from qvera.lab.sparse import SparseChange, add_sparse, largest_places, largest_products, sampled_product
from tests.adapters.helpers import relative
from tests.lab.authors import numbers_of
from tests.live_bytes import PeakBytes

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def parts(T: int, n: int, m: int, k: int) -> dict[str, torch.Tensor]:
    """In fp64; half of the rows and columns have no value where there are few values."""
    g = torch.Generator().manual_seed(T + n + m)
    found = {
        name: torch.randn(*shape, generator=g, dtype=torch.float64)
        for name, shape in (("x", (T, n)), ("base", (T, m)), ("g", (T, m)), ("values", (k,)))
    }
    return {**found, "indices": torch.randperm(m * n, generator=g)[:k].sort().values.int()}


def dense_results(p: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """y and the gradients by autograd through a dense ΔW."""
    base, x, values = (p[name].double().clone().requires_grad_() for name in ("base", "x", "values"))
    m, n = base.shape[-1], x.shape[-1]
    delta = torch.zeros(m * n, dtype=torch.float64).index_put((p["indices"].long(),), values)
    y = base + x @ delta.view(m, n).t()
    y.backward(p["g"].double())
    return {
        "y": y.detach(),
        **{k: v.grad for k, v in (("base", base), ("x", x), ("values", values)) if v.grad is not None},
    }


@pytest.mark.parametrize(
    ("elements", "shape", "T", "dtype", "base_dtype"),
    [
        (2**21, (64, 129, 700), 1, torch.float64, torch.float64),
        (256, (33, 17, 100), 257, torch.float64, torch.float32),
        (2**21, (1, 1, 1), 257, torch.float32, torch.float32),
        (256, (64, 129, 700), 257, torch.float32, torch.float32),
        (256, (3, 5, 4), 3, torch.bfloat16, torch.float32),
        (2**21, (64, 129, 700), 257, torch.bfloat16, torch.bfloat16),
        (256, (33, 17, 100), 257, torch.float16, torch.float16),
    ],
)
def test_forward_and_every_gradient(
    monkeypatch: pytest.MonkeyPatch,
    elements: int,
    shape: tuple[int, int, int],
    T: int,
    dtype: torch.dtype,
    base_dtype: torch.dtype,
) -> None:
    """With blocks of few tokens, or one; ``shape`` is n, m and how many values."""
    monkeypatch.setattr(sparse, "_block_elements", lambda on_accelerator: elements)
    p = parts(T, *shape)
    p["base"], p["g"], p["x"] = p["base"].to(base_dtype), p["g"].to(base_dtype), p["x"].to(dtype)
    p["values"] = p["values"].to(torch.promote_types(dtype, torch.float32))
    expected = dense_results(p)
    base, x, values = (p[name].clone().requires_grad_() for name in ("base", "x", "values"))
    y = add_sparse(base, x, values, p["indices"])
    y.backward(p["g"])
    assert (y.dtype, x.grad.dtype, values.grad.dtype) == (base_dtype, dtype, values.dtype)  # type: ignore[union-attr]
    worst = max(TOLERANCE[dtype], TOLERANCE[base_dtype])
    for name, found in {"y": y.detach(), "base": base.grad, "x": x.grad, "values": values.grad}.items():
        assert relative(found, expected[name]) < worst, name
    with torch.no_grad():
        assert torch.equal(add_sparse(base, x, values, p["indices"]), y)
        assert torch.equal(add_sparse(base.clone(), x, values, p["indices"], overwrite=True), y)


def test_like_the_authors_layer() -> None:
    numbers = numbers_of("spiel_linear")
    x, values, bias = (numbers[name].requires_grad_() for name in ("x", "values", "bias"))
    order = numbers["indices"].argsort()
    indices = numbers["indices"][order]
    y = add_sparse(x @ numbers["W"].t() + bias, x, values[order], indices)
    y.backward(numbers["g"])
    dense = SparseChange(values[order], indices, *numbers["W"].shape).delta()
    # x took its share through the base product too
    found = {"y": y, "grad_values": values.grad, "grad_x": x.grad, "grad_bias": bias.grad}
    found["W_merged"] = numbers["W"] + dense
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, numbers[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("elements", [2**21, 100])
def test_largest_products_and_samples(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    monkeypatch.setattr(sparse, "_block_elements", lambda on_accelerator: elements)
    p = parts(20, 33, 17, 40)
    whole = (p["g"].t() @ p["x"]).flatten()
    places, found = largest_products(p["g"], p["x"], 40)
    assert places.tolist() == sorted(whole.abs().topk(40).indices.tolist())
    torch.testing.assert_close(found, whole[places.long()])
    torch.testing.assert_close(sampled_product(p["g"], p["x"], p["indices"]), whole[p["indices"].long()])


def test_places_that_do_not_count_are_skipped() -> None:
    matrix = torch.arange(1.0, 31.0).view(6, 5)
    skip = torch.tensor([0, 13, 28, 29], dtype=torch.int32)
    places, values = largest_places(iter(matrix.split(2)), 3, skip)
    assert (places.tolist(), values.tolist()) == ([25, 26, 27], [26.0, 27.0, 28.0])
    assert len(largest_places(iter(matrix.split(4)), 50, skip)[0]) == 26


def test_rows_and_columns_of_the_dense_weight() -> None:
    p = parts(1, 33, 17, 100)
    p["values"] = p["values"].float()
    dense = torch.zeros(17 * 33).index_put((p["indices"].long(),), p["values"]).view(17, 33)
    change = SparseChange(p["values"], p["indices"], 17, 33)
    assert torch.equal(change.delta(), dense)
    for part in (slice(5, 12), slice(0, 17), slice(30, None), slice(4, 4)):
        assert torch.equal(change.outputs(part).delta(), dense[part])
        assert torch.equal(change.inputs(part).delta(), dense[:, part])


def test_nothing_of_the_weights_size_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "_block_elements", lambda on_accelerator: 2**13)
    p = parts(8, 512, 768, 500)
    x, values = p["x"].float().requires_grad_(), p["values"].float().requires_grad_()
    with PeakBytes() as seen:
        add_sparse(p["base"].float(), x, values, p["indices"]).backward(p["g"].float())
        largest_products(p["g"].float(), p["x"].float(), 500)
    assert 768 * 8 <= seen.largest <= 2**13


def test_on_tensors_without_memory() -> None:
    p = parts(3, 5, 7, 9)
    with FakeTensorMode() as mode:
        base, x, values, indices = (mode.from_tensor(p[name]) for name in ("base", "x", "values", "indices"))
        y = add_sparse(base, x.requires_grad_(), values.requires_grad_(), indices)
        y.sum().backward()
    assert (y.shape, x.grad.shape, values.grad.shape) == ((3, 7), (3, 5), (9,))
