"""`model.stream` in the plan: what it takes, when `auto` streams, and what it says of the bus."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from bench.plan_table import shapes
from qvera.config.schema import parse_recipe
from qvera.training.plan import Batch, Machine, Plan, PlannedRun, Sharing, gpu_machine, make_plan, plan_memory
from qvera.training.plan.memory import layer_bytes
from qvera.training.plan.show import change_lines, run_lines
from qvera.training.plan.streaming import PCIE_BYTES_PER_SECOND, pass_bytes
from qvera.utils.formatting import size


@pytest.fixture
def planned(tmp_path: Path) -> Any:
    """A plan of Llama-2 13B or 70B on a card, from its config alone."""

    def make(name: str, card_gb: float, sharing: Sharing | None = None, **changes: Any) -> Plan:
        shape = shapes()[name]
        config = LlamaConfig(
            hidden_size=shape.hidden, intermediate_size=shape.ff, num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, vocab_size=shape.vocabulary,
            max_position_embeddings=shape.longest_tokens,
        )  # fmt: skip
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(tmp_path)
        tree = {
            "model": {"path": str(tmp_path), **changes.pop("model", {})},
            "data": {"path": "some/hub-data", "max_length": changes.pop("max_length", 1024)},
            "training": {"per_device_train_batch_size": 1, **changes.pop("training", {})},
        }
        recipe = parse_recipe(tree, "t")
        machine = dataclasses.replace(gpu_machine(recipe.model, int(card_gb * 1e9)), **changes)
        return make_plan(recipe, machine, **({} if sharing is None else {"sharing": sharing}))

    return make


def streamed_rows() -> list[str]:
    """The table of docs/memory.md."""
    rows = []
    for name, shape in shapes().items():
        tree = {
            "model": {"path": "-", "stream": True},
            "data": {"path": "-"},
            "training": {"gradient_checkpointing": True},
        }
        recipe = parse_recipe(tree, "t")
        run = PlannedRun(shape, recipe, Batch(1, 2048, 2048, False, False, "", 2048), gpu_machine(recipe.model, 0))
        copied = pass_bytes(run)
        cells = size(sum(layer_bytes(run))), size(plan_memory(run).total_bytes), size(copied)
        rows.append(f"| {name} | {' | '.join(cells)} | {copied / PCIE_BYTES_PER_SECOND:.1f} s |")
    return rows


def test_the_table_of_the_document_is_the_plan() -> None:
    text = (Path(__file__).parents[3] / "docs" / "memory.md").read_text(encoding="utf-8")
    assert "\n".join(streamed_rows()) in text


@pytest.mark.parametrize(("name", "card_gb", "streams"), [
    ("Llama-2 13B", 6, True), ("Llama-2 70B", 24, True), ("Llama-2 13B", 12, False), ("Llama-2 70B", 80, False),
])  # fmt: skip
def test_auto_streams_where_the_base_does_not_fit_otherwise(
    planned: Any, name: str, card_gb: int, streams: bool
) -> None:
    plan = planned(name, card_gb)
    assert plan.fits and plan.streaming.streams is plan.streams is streams
    assert any("Streaming: on (auto" in line for line in run_lines(plan)) is streams


def test_two_layers_take_the_place_of_all(planned: Any) -> None:
    resident, streamed = (planned("Llama-2 70B", 80, model={"stream": stream}) for stream in (False, True))
    base = [{c.name: c.bytes for c in plan.memory.peak if c.kind == "base"} for plan in (resident, streamed)]
    layers = layer_bytes(streamed)
    assert base[0]["4-bit linears"] == sum(layers)
    assert base[1]["two streamed layers"] == 2 * max(layers) and "4-bit linears" not in base[1]
    assert resident.memory.total_bytes - streamed.memory.total_bytes >= sum(layers) - 2 * max(layers)
    assert pass_bytes(streamed) == 2 * 78 * layers[0] == pytest.approx(68.9e9, rel=1e-3)


def test_streaming_is_among_the_changes_that_make_a_run_fit(planned: Any) -> None:
    plan = planned("Llama-2 70B", 24, model={"stream": False})
    assert not plan.fits
    assert any("model.stream=true" in line for line in change_lines(plan))


def test_a_run_that_does_not_fit_streamed_either_stays_resident(planned: Any) -> None:
    plan = planned("Llama-2 70B", 1)
    assert not plan.fits and not plan.streams


def test_too_little_ram_is_said(planned: Any) -> None:
    assert "read from their file" in str(planned("Llama-2 70B", 24, host_bytes=20 * 10**9).streaming)
    assert "read from their file" not in str(planned("Llama-2 70B", 24, host_bytes=64 * 10**9).streaming)


def test_neither_zero3_nor_int8_nor_a_cpu_streams_by_itself(planned: Any, make_recipe: Any) -> None:
    assert not planned("Llama-2 70B", 24, Sharing(3, None, 1, 2)).streams
    assert not planned("Llama-2 70B", 24, model={"quantization": "int8"}).streams
    recipe = make_recipe()
    cpu = Machine("a CPU", "cpu", gpu_machine(recipe.model, 1).dtype, True, 1000)
    assert not make_plan(recipe, cpu).streams
    forced = make_plan(recipe.replace(model=recipe.model.replace(stream=True)), cpu)
    assert forced.streams and "only adds copies" in str(forced.streaming)


def test_auto_does_not_stream_what_is_compiled_or_not_in_four_bits(planned: Any) -> None:
    for changes in ({"training": {"torch_compile": True}}, {"model": {"quantization": "none"}}):
        plan = planned("Llama-2 70B", 24, **changes)
        assert not plan.streams
        assert not plan.fits
        assert plan.streaming.why == "auto: this run's layers can't be streamed"
        assert not any("model.stream" in change.settings for change in plan.changes)
