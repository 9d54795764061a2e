"""Steps of answers on the fake accelerator: no keys are copied together, nothing waits, and a repeated step is one launch."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any
from unittest import mock

import pytest
import torch

from qvera.adapters.bank import AdapterShape
from qvera.evaluation.generate import generating
from qvera.models.loader import Base
from qvera.serve import batches, sampling
from qvera.serve.engine import Engine
from qvera.serve.paged import PagedKernel
from qvera.serve.requests import EngineSettings, GenerationRequest, ResolvedAdapter, Sampling
from qvera.serve.slots import HostVectors
from qvera.utils import accelerator
from tests.gpu.fake_accelerator import FakeAccelerator, FakeTokenizer
from tests.gpu.own_process import measured

pytestmark = pytest.mark.process

LAYERS = 2
LINEARS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


def both(fake: FakeAccelerator) -> list[list[dict[str, Any]]]:
    return [steps(fake, has_kernel) for has_kernel in (True, False)] + [steps(fake, True, batch_invariant=True)]


def steps(fake: FakeAccelerator, has_kernel: bool, **settings: Any) -> list[dict[str, Any]]:
    """What each step takes in which three prompts, and then their answers, are computed."""
    tokenizer: Any = FakeTokenizer()
    base = Base(fake.model("8b", LAYERS), tokenizer, {"dense_matrices": {}})
    linears = tuple(sorted(f"model.layers.{layer}.{name}" for layer in range(LAYERS) for name in LINEARS))
    shapes = {name: AdapterShape(name, 0, 16, 1, False, "none", linears) for name in ("vera", "lora")}
    recordings: list[list[int]] = []

    def record(_: object, run: Any) -> Any:
        output = run()
        recordings.append(list(output.shape))
        return lambda: None, output

    kernel, found = PagedKernel(256, is_flash=True) if has_kernel else None, []
    with (
        mock.patch.object(batches, "choose_kernel", return_value=kernel),  # a trial needs values
        mock.patch.object(accelerator.GraphRecorder, "record", record),
        mock.patch.multiple(accelerator, records_graphs=lambda _: True, multiplies_groups=lambda _: True),
        torch.no_grad(),
    ):
        engine = Engine(base, EngineSettings(max_running=4, cache_tokens=4096, step_tokens=600, slots=3, **settings))
        engine._layout.enter_context(generating(engine.model, True, engine.settings.batch_invariant))
        for number, (name, length) in enumerate((("vera", 300), ("lora", 520), ("vera", 5))):
            packed = torch.zeros(shapes[name].layout(engine.bank._specs).numbers)
            vectors = HostVectors(f"{name} {number}", shapes[name], packed)
            adapter = ResolvedAdapter(name, vectors.identity, ())
            request = GenerationRequest(str(number), (7,) * length, adapter, Sampling(max_tokens=99, temperature=0.0))
            with mock.patch.object(engine.bank, "read", return_value=vectors):
                engine.submit(request, lambda _: None)
        engine._admit()
        for _ in range(5 if has_kernel else 4):
            with fake.record() as seen:
                engine._try_step()
            found.append({**seen.to_dict(), "recordings": list(recordings)})
    return found


def drawn(fake: FakeAccelerator) -> list[dict[str, int]]:
    """What the host waits for in a step that draws tokens, for each kind of request."""
    found, device = [], torch.device(fake.device)
    one, change = Sampling(max_tokens=9, temperature=0.7), dataclasses.replace
    kinds = one, change(one, top_p=0.9, top_k=40), change(one, logit_bias=((5, 1.0),), frequency_penalty=0.5)
    with mock.patch.object(sampling, "generator_of", return_value=None):  # a generator needs a real device
        for kind in kinds:
            choosers = [sampling.TokenChooser(kind, device, [3, 4]) for _ in range(4)]
            for _ in range(2):  # in the first one, what is a request's own is sent
                with fake.record() as seen:
                    sampling.choose_tokens(torch.empty(4, 1000, dtype=torch.bfloat16, device=device), choosers)
            found.append(seen.to_dict()["syncs"])
    return found


@pytest.fixture(scope="module")
def found() -> list[list[dict[str, Any]]]:
    """With torch's kernel and graphs, without, and in passes of fixed shapes."""
    return measured(both)


def attention_of(step: dict[str, Any]) -> dict[str, int]:
    return {name: count for name, count in step["kernels"].items() if "attn" in name or "attention" in name}


def test_a_step_waits_for_the_drawn_tokens_alone(found: list[list[dict[str, Any]]]) -> None:
    for step in itertools.chain(*found[:2]):
        assert step["syncs"] == {"serve.sampling.choose_tokens: list": 1}
        assert step["copies"]["to device"] <= 4  # the step's numbers, those of two banks, and now and then new blocks


def test_settings_of_drawn_answers_cost_no_wait() -> None:
    assert measured(drawn) == [{"serve.sampling.choose_tokens: list": 1}] * 3


def test_attention_takes_the_blocks_as_they_are(found: list[list[dict[str, Any]]]) -> None:
    for one, other in zip(found[0], found[1], strict=False):
        assert attention_of(one) == {"torch_attn._varlen_attn": LAYERS}
        # requests of other lengths attend apart there, and keys and values are copied for each
        groups = attention_of(other)["aten._scaled_dot_product_efficient_attention"] // LAYERS
        assert other["kernels"]["aten.index_select"] == 2 * LAYERS * groups  # the slots of its LoRAs are a view
        assert one["launches"] < other["launches"]


def test_a_repeated_step_is_one_launch_of_fixed_shapes(found: list[list[dict[str, Any]]]) -> None:
    """Three requests, filled up to four, of VeRA and LoRA adapters; two prompts' steps come before."""
    assert [step["recordings"] for step in found[0]] == [[]] * 3 + [[[4, 128256]]] * 2
    assert found[0][4]["launches"] < 12  # beside the graph: all of it is the choice of tokens
    assert "aten.mm" not in found[0][4]["kernels"]


def test_all_passes_of_batch_invariant_answers_have_one_shape(found: list[list[dict[str, Any]]]) -> None:
    """Of 64 tokens, prompts' or answers'. The host waits for each drawn token."""
    shapes = [shape for step in found[2] for shape in step["recordings"]]
    assert shapes and all(shape == [64, 128256] for shape in shapes)
    first, *_, last = found[2]
    assert attention_of(first).keys() == {"torch_attn._varlen_attn"}
    assert last["syncs"] == {"serve.sampling.choose_tokens: list": 3} and "aten.mm" not in last["kernels"]
