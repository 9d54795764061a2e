"""torch.compile: the adapted layer gives the same numbers, and where the graph breaks is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.adapters.helpers import IN, OUT, relative
from tests.adapters.test_layer import adapted, run

pytestmark = pytest.mark.process


@pytest.mark.parametrize("more", [{}, {"groups": 3, "scaled": True}], ids=["vera", "groups-and-a"])
@pytest.mark.parametrize("kind", ["linear", "nf4+dq-bfloat16", "int8"])
def test_compiled_output_and_gradients(kind: str, more: dict[str, Any]) -> None:
    torch._dynamo.reset()
    layer = adapted(kind, **more)
    torch.manual_seed(5)
    x, upstream = torch.randn(2, 9, IN), torch.randn(2, 9, OUT)
    expected = run(layer, x, upstream)
    compiled = torch.compile(layer, backend="aot_eager")
    layer.zero_grad()
    inner = x.clone().requires_grad_()
    y = compiled(inner)
    y.backward(upstream)
    vectors = [v["default"].grad for v in (layer.qvera_b, layer.qvera_d, layer.qvera_a) if v]
    actual = [y.detach(), inner.grad, *vectors]
    for one, other in zip(actual, expected, strict=True):
        assert one is not None
        assert relative(one, other) < 3e-6


@pytest.mark.parametrize("more", [{}, {"groups": 3, "scaled": True}], ids=["vera", "groups-and-a"])
@pytest.mark.parametrize("kind", ["linear", "nf4+dq-bfloat16", "int8"])
def test_no_graph_break(kind: str, more: dict[str, Any]) -> None:
    torch._dynamo.reset()
    found = torch._dynamo.explain(adapted(kind, **more))(torch.randn(2, 9, IN, requires_grad=True))
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons
