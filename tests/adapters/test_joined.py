"""On an accelerator, layers that read the same x are one autograd node each, whose products add up the gradient of x."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qvera.adapters import QveraConfig, QveraLinear, SharedProjection
from qvera.utils import accelerator
from tests.adapters.helpers import IN, OUT, TOLERANCE, base_layer, perturb, reference, relative
from tests.device import DEVICE

pytestmark = pytest.mark.usefixtures("_as_on_an_accelerator")


@pytest.fixture
def _as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "is_accelerator", lambda device: True)


def layers(dtype: torch.dtype, count: int = 3, groups: int = 1) -> list[QveraLinear]:
    """Layers as q, k and v: of one input, over one pair."""
    pair = SharedProjection(3, DEVICE, dtype)
    pair.ensure(12, IN, OUT)
    config = QveraConfig(rank=12, b_groups=groups, projection_seed=3)
    kinds = ("nf4+dq-bfloat16", "nf4-uint8", "linear")[:count]
    made = [QveraLinear(base_layer(kind, dtype, seed), "default", pair, config) for seed, kind in enumerate(kinds)]
    return [perturb(layer, seed) for seed, layer in enumerate(made)]


@pytest.mark.parametrize("tokens", [1, 37])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_and_gradients_against_the_formula_in_fp64(dtype: torch.dtype, groups: int, tokens: int) -> None:
    torch.manual_seed(1)
    leaf, upstream = torch.randn(1, tokens, IN).to(dtype).requires_grad_(), torch.randn(3, 1, tokens, OUT).to(dtype)
    several = layers(dtype, groups=groups)
    x = leaf * 1
    outputs = [layer(x) for layer in several]
    # of z, d and b: no node has W x
    assert [sum(node is not None for node, _ in y.grad_fn.next_functions) for y in outputs if y.grad_fn] == [3, 3, 3]
    torch.autograd.backward(outputs, list(upstream))
    grad_x = torch.zeros_like(x, dtype=torch.float64)
    for layer, y, g in zip(several, outputs, upstream, strict=True):
        expected = reference(layer, x[0], g[0], dtype)
        vectors = layer.vectors("default")
        found = [y[0], vectors["qvera_b"].grad, vectors["qvera_d"].grad]
        for one, other in zip(found, (expected[0], *expected[2:]), strict=True):
            assert one is not None and relative(one, other) < TOLERANCE[dtype]
        grad_x += expected[1]
    assert leaf.grad is not None and relative(leaf.grad, grad_x) < TOLERANCE[dtype]


def test_passes_through_one_graph_do_not_add_to_each_other() -> None:
    one, two = layers(torch.bfloat16, 2)
    leaf = torch.randn(1, 9, IN, dtype=torch.bfloat16).requires_grad_()
    x = leaf * 1
    first, second = one(x), two(x)
    g = torch.ones_like(first)

    def gradient(*outputs: Tensor) -> Tensor:
        return torch.autograd.grad(outputs, leaf, [g] * len(outputs), retain_graph=True)[0]

    both, alone = gradient(first, second), gradient(first)
    assert torch.equal(gradient(first, second), both) and torch.equal(gradient(first), alone)
    assert relative(both, alone + gradient(second)) < TOLERANCE[torch.bfloat16]
    # of the vectors alone nothing is left behind either
    torch.autograd.grad(second, two.vectors("default")["qvera_b"], g, retain_graph=True)
    assert torch.equal(gradient(first), alone)


def test_a_checkpoint_gives_the_same_bits() -> None:
    several = layers(torch.bfloat16)

    def block(x: Tensor) -> Tensor:
        x = torch.tanh(x)
        return sum((layer(x) for layer in several), start=torch.zeros((), dtype=x.dtype))

    def gradients(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        x = torch.linspace(-1, 1, 7 * IN).view(1, 7, IN).bfloat16().requires_grad_()
        run(x).sum().backward()
        found = [x.grad]
        for layer in several:
            found += [v.grad for v in layer.vectors("default").values()]
            layer.zero_grad()
        return [g for g in found if g is not None]

    plain, recomputed = gradients(block), gradients(lambda x: checkpoint(block, x, use_reentrant=False))
    assert len(plain) == 7 and all(torch.equal(one, other) for one, other in zip(plain, recomputed, strict=True))


def test_an_input_without_a_gradient_trains_the_vectors_alone() -> None:
    (layer,) = layers(torch.bfloat16, 1)
    x, g = torch.randn(5, IN).bfloat16(), torch.randn(5, OUT).bfloat16()
    layer(x).backward(g)
    expected = reference(layer, x, g, torch.bfloat16)
    for name, other in zip(("qvera_b", "qvera_d"), expected[2:], strict=True):
        found = layer.vectors("default")[name].grad
        assert found is not None and relative(found, other) < TOLERANCE[torch.bfloat16]
