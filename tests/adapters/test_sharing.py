"""Layers that read the same x share z, and never a stale one."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from qvera.adapters.files.save_load import attach
from qvera.adapters.products import functional
from qvera.adapters.projection import SharedProjection
from qvera.config.schema import AdapterSection
from tests.conftest import small_llama


@pytest.fixture
def projection() -> SharedProjection:
    shared = SharedProjection(0, torch.device("cpu"), torch.float32)
    shared.ensure(4, 10, 12)
    return shared


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for every product that is really taken."""
    taken: list[int] = []
    original = functional.project

    def counted(x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        taken.append(1)
        return original(x, A)

    monkeypatch.setattr(functional, "project", counted)
    return taken


def test_the_same_tensor_is_projected_once_and_gradients_add_up(projection: SharedProjection, count: list[int]) -> None:
    x = torch.randn(3, 10, requires_grad=True)
    first, second = (projection.project(x, 4, torch.float32) for _ in range(2))
    assert first is second
    assert len(count) == 1
    (first.sum() + 2 * second.sum()).backward()
    torch.testing.assert_close(x.grad, 3 * projection.A[:4, :10].sum(0).expand(3, 10))


def test_a_shared_core_has_one_z_for_the_linears_that_read_the_same_input(count: list[int]) -> None:
    model = attach(small_llama(), AdapterSection(method="shared-core", rank=4))
    model(input_ids=torch.tensor([[5, 9, 200]])).logits.sum().backward()
    layers = model.config.num_hidden_layers
    assert len(count) == 4 * layers  # q, k and v; o; gate and up; down


def test_the_same_leaf_in_two_steps_gets_a_graph_for_each(projection: SharedProjection, count: list[int]) -> None:
    x = torch.randn(3, 10, requires_grad=True)
    for step in (1, 2):
        projection.project(x, 4, torch.float32).sum().backward()
        assert x.grad is not None
        assert len(count) == step
        torch.testing.assert_close(x.grad, step * projection.A[:4, :10].sum(0).expand(3, 10))


def test_a_change_in_place_is_seen(projection: SharedProjection, count: list[int]) -> None:
    x = torch.randn(3, 10)
    before = projection.project(x, 4, torch.float32).clone()
    x.mul_(2)
    torch.testing.assert_close(projection.project(x, 4, torch.float32), 2 * before)
    assert len(count) == 2


def test_freed_and_allocated_again_at_the_same_address(projection: SharedProjection, count: list[int]) -> None:
    x = torch.randn(3, 10)
    address = x.data_ptr()
    projection.project(x, 4, torch.float32)
    del x
    for _ in range(50):  # the allocator soon gives the same address
        y = torch.randn(3, 10)
        torch.testing.assert_close(projection.project(y, 4, torch.float32), y @ projection.A[:4, :10].t())
        if y.data_ptr() == address:
            break
        del y
    else:
        pytest.fail("the allocator never gave the address again")


def test_no_grad_then_grad(projection: SharedProjection, count: list[int]) -> None:
    x = torch.randn(3, 10, requires_grad=True)
    with torch.no_grad():
        assert not projection.project(x, 4, torch.float32).requires_grad
    assert projection.project(x, 4, torch.float32).requires_grad
    leaf = torch.randn(3, 10)
    assert not projection.project(leaf, 4, torch.float32).requires_grad
    leaf.requires_grad_()
    assert projection.project(leaf, 4, torch.float32).requires_grad


def test_another_rank_or_dtype_is_another_z(projection: SharedProjection) -> None:
    x = torch.randn(3, 10)
    assert projection.project(x, 4, torch.float32).shape == (3, 4)
    assert projection.project(x, 2, torch.float32).shape == (3, 2)
    assert projection.project(x, 2, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_whose_input_is_projected_directly(projection: SharedProjection, reentrant: bool) -> None:
    """The recomputation sees the very tensor object of forward, and must still build its own graph."""
    weight = torch.randn(4, 4, requires_grad=True)

    def block(x: torch.Tensor) -> torch.Tensor:
        z = projection.project(x, 4, torch.float32)
        return torch.tanh(z @ weight) + torch.sin(projection.project(x, 4, torch.float32))

    grads = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        x = torch.randn(3, 10, requires_grad=True)
        y = checkpoint(block, x, use_reentrant=reentrant) if wrapped else block(x)
        grads.append(
            torch.autograd.grad(y.pow(2).sum(), (x, weight)) if not (wrapped and reentrant) else _backward(y, x, weight)
        )
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)


def _backward(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> tuple[Any, Any]:
    x.grad = weight.grad = None
    y.pow(2).sum().backward()
    return x.grad, weight.grad


def test_z_is_let_go_of_with_x(projection: SharedProjection) -> None:
    x = torch.randn(3, 10)
    z = weakref.ref(projection.project(x, 4, torch.float32))
    assert z() is not None
    del x
    gc.collect()
    assert z() is None


def test_it_can_be_copied_and_pickled_while_it_remembers(projection: SharedProjection) -> None:
    x = torch.randn(3, 10)
    z = projection.project(x, 4, torch.float32)
    for twin in (copy.deepcopy(projection), pickle.loads(pickle.dumps(projection))):
        torch.testing.assert_close(twin.project(x, 4, torch.float32), z)


def test_inference_mode(projection: SharedProjection) -> None:
    with torch.inference_mode():
        x = torch.randn(3, 10)
        torch.testing.assert_close(projection.project(x, 4, torch.float32), x @ projection.A[:4, :10].t())
