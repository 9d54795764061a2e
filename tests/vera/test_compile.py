"""torch.compile: the adapted layer gives the same numbers, and where the graph breaks is known."""

from __future__ import annotations

import pytest
import torch

from .helpers import IN, OUT, relative
from .test_layer import adapted, run


@pytest.mark.parametrize("kind", ["linear", "nf4+dq-bfloat16", "int8"])
def test_compiled_output_and_gradients(kind: str) -> None:
    torch._dynamo.reset()
    layer = adapted(kind)
    torch.manual_seed(5)
    x, upstream = torch.randn(2, 9, IN), torch.randn(2, 9, OUT)
    expected = run(layer, x, upstream)
    compiled = torch.compile(layer, backend="aot_eager")
    layer.zero_grad()
    inner = x.clone().requires_grad_()
    y = compiled(inner)
    y.backward(upstream)
    actual = [y.detach(), inner.grad, layer.qvera_b["default"].grad, layer.qvera_d["default"].grad]
    for one, other in zip(actual, expected, strict=True):
        assert one is not None and relative(one, other) < 3e-6


@pytest.mark.parametrize("kind", ["linear", "nf4+dq-bfloat16", "int8"])
def test_no_graph_break(kind: str) -> None:
    torch._dynamo.reset()
    found = torch._dynamo.explain(adapted(kind))(torch.randn(2, 9, IN, requires_grad=True))
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons
