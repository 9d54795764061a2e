"""What the plan decides: gradient checkpointing, streaming, and how many adapters are in flight; and that a run keeps it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig

from bench.plan_table import shapes
from qvera.cli.main import main
from qvera.config.schema import Recipe, parse_recipe
from qvera.data import build_datasets
from qvera.models.checkpointing import Mode
from qvera.models.tokenizer import load_tokenizer
from qvera.training.plan import (
    ALONE,
    Batch,
    Machine,
    Plan,
    PlannedRun,
    Sharing,
    decisions,
    gpu_machine,
    make_plan,
    plan_memory,
    shape_of,
)
from qvera.training.plan.activations import offloaded_bytes
from qvera.training.plan.decisions import PCIE_BYTES_PER_SECOND, mode_word, wanted_slots
from qvera.training.plan.decisions import decide_checkpointing as decide
from qvera.training.plan.memory import layer_bytes, pinned_layer_bytes, resident_bytes, slot_bytes, stream_bytes
from qvera.training.plan.plan import change_lines, print_plan, run_lines
from qvera.training.plan.run import Shape, changed
from qvera.training.trainer import train
from qvera.utils.errors import InputError
from qvera.utils.formatting import size
from tests.conftest import small_llama
from tests.training.runs import cut_off, run_json

TREE = {"model": "-", "data": {"path": "-"}}
LONG = Batch(1, 200, 200, False, False, "", 200)


@pytest.fixture(scope="module")
def shape() -> Shape:
    return shape_of(small_llama(num_hidden_layers=8))


def card(size_bytes: float, host_bytes: int | None = None) -> Machine:
    return Machine("a GPU", "cuda", torch.bfloat16, False, int(size_bytes), host_bytes=host_bytes)


def planned(shape: Shape, mode: Mode, machine: Machine) -> PlannedRun:
    return PlannedRun(shape, changed(parse_recipe(TREE, "t"), {"training.gradient_checkpointing": mode}), LONG, machine)


def test_auto_is_the_fastest_that_fits_with_a_margin(shape: Shape) -> None:
    needed = {mode: plan_memory(planned(shape, mode, card(1e9))).total_bytes for mode in (False, True, "offload")}  # type: dict[Mode, int]
    assert needed[False] > needed[True] > needed["offload"]
    expected: list[tuple[Machine, Mode]] = [
        (card(needed[False] / 0.84), False),
        (card(needed[False] / 0.86), True),
        (card(needed[True] / 0.91), True),
        (card(needed[True] / 0.93), "offload"),
        (card(needed[True] / 0.93, host_bytes=10**6), True),  # the RAM is not there
        (card(needed[True] / 0.93, host_bytes=10**9), "offload"),
        (card(1), "offload"),  # nothing fits
    ]
    auto = parse_recipe(TREE, "t")
    for machine, mode in expected:
        decided = decide(PlannedRun(shape, auto, LONG, machine))
        assert decided.mode == mode, machine
        assert decided.needed_bytes == {mode_word(mode): count for mode, count in needed.items()}
        assert "auto" in str(decided)
    assert decide(planned(shape, "offload", card(1e12))).mode == "offload"  # as the recipe says


def test_a_streamed_base_is_locked_in_ram_before_layer_inputs(shape: Shape) -> None:
    offload = planned(shape, "offload", card(1e9)).changed({"model.stream": True})
    layers, inputs = sum(layer_bytes(offload)), offloaded_bytes(offload)
    needed = plan_memory(planned(shape, True, card(1e9)).changed({"model.stream": True})).total_bytes / 0.93
    auto = parse_recipe({**TREE, "model": {"path": "-", "stream": True}}, "t")
    for free, mode in ((inputs + layers, "offload"), (inputs + layers - 1, True)):
        decided = decide(PlannedRun(shape, auto, LONG, card(needed, free)))
        assert decided.mode == mode
        assert ("beside the streamed layers" in decided.why) is (mode is True)
    two = Sharing(per_node=2)  # each of which locks its own
    assert decide(PlannedRun(shape, auto, LONG, card(needed, inputs + layers), sharing=two)).mode is True
    assert decide(PlannedRun(shape, auto, LONG, card(needed, 2 * (inputs + layers)), sharing=two)).mode == "offload"
    # too little RAM to lock the layers: they stay in the file
    huge = dataclasses.replace(offload, machine=card(needed, layers))
    assert pinned_layer_bytes(huge) == 0


def test_on_a_cpu_auto_leaves_half_of_the_free_memory_and_ranks_share_it(shape: Shape) -> None:
    auto = parse_recipe(TREE, "t")
    machine = Machine("a CPU", "cpu", torch.float32, False, 10**12)
    needed = plan_memory(planned(shape, False, machine)).total_bytes
    enough = dataclasses.replace(machine, available_bytes=int(needed / 0.49))
    assert decide(PlannedRun(shape, auto, LONG, enough)).mode is False
    assert decide(PlannedRun(shape, auto, LONG, enough, sharing=Sharing(per_node=2))).mode is True
    little = dataclasses.replace(machine, available_bytes=needed)
    assert decide(PlannedRun(shape, auto, LONG, little)).mode is True
    asked = planned(shape, "offload", machine)
    assert decide(asked).mode is True  # a CPU has nowhere to move them to
    assert offloaded_bytes(asked) == 0


def test_plan_and_run_say_what_was_decided(write_recipe: Any, tmp_path: Path, capsys: Any) -> None:
    recipe = str(write_recipe(training={"max_steps": 1, "output_dir": str(tmp_path / "run")}))
    assert main(["plan", recipe, "--no-timing"]) == 0
    assert "Gradient checkpointing: off (auto: without it the run takes" in " ".join(capsys.readouterr().out.split())
    assert main(["train", recipe]) == 0
    assert "Gradient checkpointing: off (auto" in " ".join(capsys.readouterr().err.split())
    run = run_json(tmp_path / "run")
    assert run["gradient_checkpointing"] is False
    assert run["plan"]["gradient_checkpointing"]["asked"] == "auto"
    assert run["plan"]["gradient_checkpointing"]["why"].startswith("auto: without it the run takes")


def test_a_resumed_run_keeps_what_was_decided_where_that_still_fits(
    make_recipe: Any, tmp_path: Path, plan_on: Any
) -> None:
    recipe = make_recipe(training={"max_steps": 2, "save_steps": 1})
    whole = tmp_path / "whole"
    train(recipe, whole)
    for share, kept, said in ((1.5, False, "Gradient checkpointing stays off"), (0.9, True, "was off when the run")):
        plan_on(Machine("a CPU", "cpu", torch.float32, True, int(share * 1e9), runtime_bytes=10**9))
        console = Console(record=True, width=1000)
        again = train(recipe, cut_off(whole, tmp_path / str(share), after=1), resume=True, console=console)
        assert again is not None and again.run["gradient_checkpointing"] is kept
        assert said in console.export_text()
    asked = recipe.replace(training=recipe.training.replace(gradient_checkpointing=True))
    again = train(asked, cut_off(whole, tmp_path / "asked", after=1), resume=True)
    assert again is not None and again.run["gradient_checkpointing"] is True  # it may say another when a run goes on


@pytest.fixture
def plan_of(tmp_path: Path) -> Any:
    """A plan of Llama-2 13B or 70B on a card, from its config alone."""

    def make(name: str, card_gb: float, sharing: Sharing = ALONE, layers: int | None = None, **changes: Any) -> Plan:
        shape = shapes()[name]
        config = LlamaConfig(
            hidden_size=shape.hidden, intermediate_size=shape.ff, num_hidden_layers=layers or shape.layers,
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
        return make_plan(recipe, machine, sharing=sharing)

    return make


def test_the_table_of_the_document_is_the_plan() -> None:
    text = (Path(__file__).parents[3] / "docs" / "memory.md").read_text(encoding="utf-8")
    keys = {"model": {"path": "-", "stream": True}, "training": {"gradient_checkpointing": True}}
    recipe, rows = parse_recipe({**TREE, **keys}, "t"), []
    for name, shape in shapes().items():
        run = PlannedRun(shape, recipe, Batch(1, 2048, 2048, False, False, "", 2048), gpu_machine(recipe.model, 0))
        copied = stream_bytes(run)
        cells = size(sum(layer_bytes(run))), size(plan_memory(run).total_bytes), size(copied)
        rows.append(f"| {name} | {' | '.join(cells)} | {copied / PCIE_BYTES_PER_SECOND:.1f} s |")
    assert "\n".join(rows) in text


NOT_STREAMED = "auto: this run's layers can't be streamed"


@pytest.mark.parametrize(("name", "card_gb", "changes", "why"), [
    ("Llama-2 13B", 6, {}, "auto: with the base on the device the run takes"),
    ("Llama-2 70B", 24, {}, "auto: with the base on the device the run takes"),
    ("Llama-2 13B", 12, {}, "auto: the run fits without it"),
    ("Llama-2 70B", 80, {}, "auto: the run fits without it"),
    ("Llama-2 70B", 1, {"layers": 4}, "auto: the run does not fit with it either"),
    ("Llama-2 70B", 5, {"layers": 10, "sharing": Sharing(3, None, 1, 2)}, NOT_STREAMED),
    ("Llama-2 70B", 5, {"layers": 10, "training": {"torch_compile": True}}, NOT_STREAMED),
    ("Llama-2 70B", 5, {"layers": 10, "model": {"quantization": "int8"}}, NOT_STREAMED),
    ("Llama-2 70B", 5, {"layers": 10, "model": {"quantization": "none"}}, NOT_STREAMED),
])  # fmt: skip
def test_auto_streams_where_the_base_does_not_fit_otherwise(
    plan_of: Any, name: str, card_gb: int, changes: dict[str, Any], why: str
) -> None:
    plan = plan_of(name, card_gb, **changes)
    streams = "with the base on the device" in why
    assert plan.streaming.why.startswith(why) and plan.streaming.streams is streams
    assert plan.fits is (streams or "fits without" in why)
    assert any("Streaming: on (auto" in line for line in run_lines(plan)) is streams
    if why == NOT_STREAMED:
        assert not any("model.stream" in change.settings for change in plan.changes)


def test_streaming_is_among_the_changes_that_make_a_run_fit_and_too_little_ram_is_said(plan_of: Any) -> None:
    plan = plan_of("Llama-2 70B", 4, layers=12, model={"stream": False})
    assert not plan.fits
    assert any("model.stream=true" in line for line in change_lines(plan))
    resident = plan_of("Llama-2 70B", 8, layers=4, model={"resident": True})
    assert not resident.fits and {"model.resident": False} in [change.settings for change in resident.changes]
    (last,) = plan_of("Llama-2 70B", 1, layers=4, model={"resident": True}).changes
    assert last.settings["model.resident"] is False and last.settings["model.stream"] is True
    for host_gb, short in ((20, True), (64, False)):
        streaming = plan_of("Llama-2 70B", 24, host_bytes=host_gb * 10**9).streaming
        assert ("read from their file" in str(streaming)) is short


def test_a_cpu_does_not_stream_by_itself(make_recipe: Any) -> None:
    recipe = make_recipe()
    cpu = Machine("a CPU", "cpu", gpu_machine(recipe.model, 1).dtype, True, 1000)
    assert not make_plan(recipe, cpu).streaming.streams
    forced = make_plan(recipe.replace(model=recipe.model.replace(stream=True)), cpu)
    assert forced.streaming.streams and "only adds copies" in str(forced.streaming)


@pytest.fixture
def customers(tiny_model_dir: Path, tmp_path: Path) -> Recipe:
    rows = [{"customer": f"c{i % 5}", "text": "a few words " * (1 + i % 3)} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "model": {"path": str(tiny_model_dir)},
        "data": {"path": str(tmp_path / "rows.jsonl"), "adapter_column": "customer", "max_length": 64},
        "adapter": {"rank": 8},
        "training": {"global_batch_size": 4, "per_device_train_batch_size": 12, "output_dir": str(tmp_path / "o")},
    }
    return parse_recipe(tree, "test")


CARD = Machine("t", "cuda", torch.float32, False, 10**10)


def with_training(recipe: Recipe, **training: object) -> Recipe:
    return recipe.replace(training=recipe.training.replace(**training))


def test_as_many_adapters_are_in_flight_as_fill_a_pass(customers: Recipe) -> None:
    assert wanted_slots(customers) == 3
    assert wanted_slots(customers, [50, 50, 50, 50]) == 3
    assert wanted_slots(customers, [1, 1, 2, 50, 3, 9]) == 5  # 1 + 1 + 2 + 3 + 4 rows
    assert wanted_slots(with_training(customers, per_device_train_batch_size=2), [9, 9]) == 1
    assert wanted_slots(with_training(customers, adapters_at_once=7), [9] * 4) == 4
    assert wanted_slots(parse_recipe(TREE, "t")) == 0


def test_memory_limits_the_adapters_in_flight_only_where_auto_chose_them(customers: Recipe) -> None:
    def slots(recipe: Recipe, available_bytes: int) -> int:
        return make_plan(recipe, dataclasses.replace(CARD, available_bytes=available_bytes)).slots

    wide = with_training(customers, per_device_train_batch_size=40, gradient_checkpointing=True)
    whole = make_plan(wide, CARD)
    assert whole.slots == 10
    assert slots(wide, whole.needed_bytes - 3 * slot_bytes(whole) + 5) == 7
    assert slots(wide, 1000) == 1
    assert slots(with_training(wide, adapters_at_once=10), 1000) == 10


def test_a_pass_is_planned_with_no_more_rows_than_the_adapters_in_flight_have(customers: Recipe) -> None:
    """Whether the rows are known or not."""
    for rows in (build_datasets(customers.data, load_tokenizer(customers.model)).train, None):
        for adapters_at_once, pass_rows, planned_rows in ((2, 12, 8), (2, 7, 7), (5, 12, 12)):
            sizes = {"adapters_at_once": adapters_at_once, "per_device_train_batch_size": pass_rows}
            plan = make_plan(with_training(customers, **sizes), CARD, rows, adapter_rows=[8] * 5)
            assert plan.batch.rows == planned_rows


def test_fewer_rows_a_pass_need_not_divide_a_step_of_many_adapters(customers: Recipe) -> None:
    """Their rows are cut into passes together."""
    sizes = {"global_batch_size": 8, "per_device_train_batch_size": 8, "adapters_at_once": 4}
    wide = with_training(customers, **sizes, gradient_checkpointing=False)
    five = make_plan(with_training(wide, per_device_train_batch_size=5), CARD)
    small = dataclasses.replace(CARD, available_bytes=five.needed_bytes)
    found = [change.settings for change in make_plan(wide, small).changes]
    assert {"training.per_device_train_batch_size": 5} in found


def test_the_plan_counts_16_bytes_a_number_and_adapter(customers: Recipe) -> None:
    full = with_training(customers, per_device_train_batch_size=8)  # so many adapters may be in it
    totals = [make_plan(with_training(full, adapters_at_once=n), CARD).memory.total_bytes for n in (8, 9)]
    plan = make_plan(full, CARD)
    assert totals[1] - totals[0] == 16 * plan.trained_parameters == slot_bytes(plan)
    frozen = make_plan(full.replace(adapter=customers.adapter.replace(train_d=False)), CARD)
    assert slot_bytes(frozen) == 4 * plan.trained_parameters + 12 * frozen.trained_parameters


def test_a_single_slot_is_planned_as_one_adapter(customers: Recipe) -> None:
    """Every pass is of one adapter then, and takes the path of an adapter alone."""
    single = with_training(customers, per_device_train_batch_size=4)
    one = single.replace(data=single.data.replace(adapter_column=None, prefix_once=False))
    many, alone = (make_plan(each, dataclasses.replace(CARD, available_bytes=10**12)) for each in (single, one))
    assert many.holds_weights == alone.holds_weights
    extra = 2 * sum(t.size_bytes for t in many.tensors())  # the ordinary adapter's, and what each begins with
    answers = [{name: m for name, m in plan.memory.moments.items() if name != "answers"} for plan in (many, alone)]
    assert answers[0] == answers[1]
    assert sum(c.bytes for c in many.memory.standing) - sum(c.bytes for c in alone.memory.standing) == extra


def test_the_plan_says_how_many_are_trained_at_once_and_how_long_all_take(
    customers: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan(customers, CARD)
    print_plan(plan, Console(width=200))
    assert "At most 3 adapters are trained at the same time" in capsys.readouterr().out
    assert plan.to_dict()["adapters_at_once"] == 3
    (tmp_path / "recipe.yaml").write_text(json.dumps(customers.to_dict()))
    assert main(["plan", str(tmp_path / "recipe.yaml")]) == 0
    assert " optimizer steps in all, at most about " in capsys.readouterr().out


def test_copies_of_the_weights_are_resident_where_a_gpu_has_room_beside_all_else(shape: Shape) -> None:
    auto = parse_recipe(TREE, "t")
    size = resident_bytes(planned(shape, False, card(1e9)))
    assert size == 2 * sum(x.n * x.m for x in shape.linears if x.quantizable) > 0
    needed = plan_memory(planned(shape, False, card(1e9))).total_bytes
    for machine, resident in (
        (card((needed + size) / 0.84), True),
        (card((needed + size) / 0.86), False),
        (Machine("a CPU", "cpu", torch.bfloat16, False, 10**12), False),
        (dataclasses.replace(card(1e12), dtype=torch.float32), False),
    ):
        run, *_ = decisions.decide(PlannedRun(shape, auto, LONG, machine))
        assert run.recipe.model.resident is resident, machine
        names = [c.name for c in plan_memory(run).standing]
        assert ("16-bit copies of 4-bit linears" in names) is resident
    for wrong in ({"stream": True}, {"compute_dtype": "float32"}, {"quantization": "int8"}):
        with pytest.raises(InputError, match="model.resident"):
            parse_recipe({**TREE, "model": {"path": "-", "resident": True, **wrong}}, "t")
