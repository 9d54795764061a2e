"""torch.compile: the adapted layer gives the same numbers, and where the graph breaks is known."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qvera.adapters.save_load import attach
from qvera.config.sections import AdapterSection
from qvera.data import Example
from qvera.models.checkpointing import compile_layers, enable_checkpointing
from qvera.models.forward import batch_nll, make_batch
from qvera.training import session
from qvera.training.trainer import train
from qvera.utils.errors import InputError
from tests.adapters.helpers import IN, OUT, adapted, relative, run
from tests.conftest import small_llama

pytestmark = pytest.mark.process
COMPILED: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}), ("nf4+dq-bfloat16", {"groups": 3, "scaled": True}), ("int8", {}),
]  # fmt: skip


IN_ONE_GRAPH = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
"""torch 2.9 and 2.10 compile the same layer in four or five parts."""


@pytest.mark.parametrize(("kind", "more"), COMPILED)
def test_compiled_output_and_gradients_without_a_graph_break(kind: str, more: dict[str, Any]) -> None:
    torch._dynamo.reset()
    layer = adapted(kind, **more)
    torch.manual_seed(5)
    x, upstream = torch.randn(2, 9, IN), torch.randn(2, 9, OUT)
    expected = run(layer, x, upstream)
    layer.zero_grad()
    inner = x.clone().requires_grad_()
    y = torch.compile(layer, backend="aot_eager", fullgraph=IN_ONE_GRAPH)(inner)
    y.backward(upstream)
    actual = [y.detach(), inner.grad, *(v.grad for v in layer.vectors("default").values())]
    for one, other in zip(actual, expected, strict=True):
        assert one is not None and relative(one, other) < 3e-6


@pytest.mark.slow
def test_a_training_step_through_compiled_layers(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    eager = functools.partial(compile_layers, backend="aot_eager")  # inductor would need a minute
    monkeypatch.setattr(session, "compile_layers", eager)
    found = {}
    for compiled in (False, True):
        training = {"max_steps": 2, "torch_compile": compiled, "gradient_checkpointing": True, "sample_count": 0,
                    "global_batch_size": 4, "try_longest_batch": False}  # fmt: skip
        run = tmp_path / str(compiled)
        adapter = {"targets": ["q_proj", "down_proj"]}
        train(make_recipe(training={**training, "output_dir": str(run)}, adapter=adapter), run)
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
    count = compile_layers(model)
    model.train()
    assert torch.equal(model(ids).logits, wanted)
    assert len(calls) == count == 2
    with torch.no_grad():
        model(ids)
    model.eval()
    assert torch.equal(model(ids).logits, wanted)
    model.generate(ids, max_new_tokens=2, do_sample=False)  # type: ignore[operator]
    assert len(calls) == count


@pytest.mark.slow
def test_the_number_of_tokens_needs_no_version_of_its_own() -> None:
    """torch compiles 8 versions of a layer at most; packed passes without checkpointing have any number of tokens."""
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    model: Any = attach(small_llama(num_hidden_layers=1), AdapterSection(rank=64))
    enable_checkpointing(model, False)
    expected: list[torch.Tensor] = []
    lengths = ([40, 30, 20], [5, 4], [64], [300, 200], [12])  # many rows in a pass, or one
    for compiled in (False, True):
        if compiled:
            compile_layers(model, backend="eager")
        model.train()
        before = graphs["unique_graphs"]
        for each in lengths:
            batch = make_batch(model, [packable(n) for n in each], 0, packing=True)
            loss = batch_nll(model, batch, 512)[0]
            loss.backward()
            expected.append(loss.detach())
        made = graphs["unique_graphs"] - before
        assert made == (2 if compiled else 0)  # with a mask that tells rows apart, and without one
    for one, other in zip(expected[: len(lengths)], expected[len(lengths) :], strict=True):
        assert relative(one, other) < 1e-5


def packable(tokens: int) -> Example:
    ids = np.arange(tokens, dtype=np.int32) % 50 + 3
    return Example(ids, np.arange(tokens) > 0, "a row", ids[:0], "", None)


def test_compiling_is_refused_where_layers_are_streamed(make_recipe: Any) -> None:
    with pytest.raises(InputError, match="training.torch_compile: compiled code does not wait for streamed layers"):
        make_recipe(training={"torch_compile": True}, model={"stream": True})
