"""torch.compile: the adapted layer gives the same numbers, and where the graph breaks is known."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qvera.models import compile
from qvera.training import session
from qvera.training.trainer import train
from qvera.utils.errors import InputError
from tests.adapters.helpers import IN, OUT, relative
from tests.adapters.test_layer import adapted, run
from tests.conftest import small_llama

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
    vectors = [v.grad for v in layer.vectors("default").values()]
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


@pytest.mark.slow
def test_a_training_step_through_compiled_layers(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    eager = functools.partial(compile.compile_layers, backend="aot_eager")  # inductor would need a minute
    monkeypatch.setattr(session, "compile_layers", eager)
    found = {}
    for compiled in (False, True):
        training = {"max_steps": 2, "torch_compile": compiled, "gradient_checkpointing": True, "sample_count": 0}
        run = tmp_path / str(compiled)
        train(make_recipe(training={**training, "output_dir": str(run)}), run)
        found[compiled] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert not counters["graph_break"]
    for one, other in zip(found[False], found[True], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_only_training_passes_run_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps a few versions of a layer's code; evaluations and answers must not use them up."""
    calls: list[bool] = []

    def compiling(plain: Any, **_: Any) -> Any:
        return lambda *args, **kwargs: (calls.append(True), plain(*args, **kwargs))[1]

    monkeypatch.setattr(torch, "compile", compiling)
    model = small_llama()
    ids = torch.arange(3, 20)[None]
    wanted = model(ids).logits
    count = compile.compile_layers(model)
    model.train()
    assert torch.equal(model(ids).logits, wanted)
    assert len(calls) == count == 2
    with torch.no_grad():
        model(ids)
    model.eval()
    assert torch.equal(model(ids).logits, wanted)
    model.generate(ids, max_new_tokens=2, do_sample=False)  # type: ignore[operator]
    assert len(calls) == count


def test_a_layer_after_answers_is_the_one_that_was_compiled() -> None:
    layer = adapted("linear")
    before = set(vars(layer))
    layer.hold_inference_weight(True)
    layer.hold_inference_weight(False)
    assert not layer.holds_inference_weight
    assert "_inference_weight" not in set(vars(layer)) - before


def test_compiling_is_refused_where_layers_are_streamed(make_recipe: Any) -> None:
    with pytest.raises(InputError, match="training.torch_compile: compiled code does not wait for streamed layers"):
        make_recipe(training={"torch_compile": True}, model={"stream": True})
