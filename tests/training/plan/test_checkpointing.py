"""What `gradient_checkpointing: auto` comes to, and that a run keeps it."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from qvera.cli.main import main
from qvera.config.schema import parse_recipe
from qvera.models.checkpointing import Mode
from qvera.training.plan import Batch, Machine, PlannedRun, Sharing, make_plan, plan_memory, shape_of
from qvera.training.plan.activations import offloaded_bytes
from qvera.training.plan.checkpointing import decide, with_mode
from qvera.training.plan.memory import layer_bytes, pinned_layer_bytes
from qvera.training.plan.shape import Shape
from qvera.training.trainer import train
from tests.conftest import small_llama
from tests.training.runs import cut_off

TREE = {"model": "-", "data": {"path": "-"}}
LONG = Batch(1, 200, 200, False, False, "", 200)


@pytest.fixture(scope="module")
def shape() -> Shape:
    return shape_of(small_llama(num_hidden_layers=8))


def card(size_bytes: float, host_bytes: int | None = None) -> Machine:
    return Machine("a GPU", "cuda", torch.bfloat16, False, int(size_bytes), host_bytes=host_bytes)


def planned(shape: Shape, mode: Mode, machine: Machine) -> PlannedRun:
    return PlannedRun(shape, with_mode(parse_recipe(TREE, "t"), mode), LONG, machine)


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
        assert decided.needed_bytes == needed
        assert "auto" in str(decided)
    assert decide(planned(shape, "offload", card(1e12))).mode == "offload"  # as the recipe says


def test_a_streamed_base_is_locked_in_ram_before_layer_inputs(shape: Shape) -> None:
    offload = planned(shape, "offload", card(1e9)).with_stream(True)
    layers, inputs = sum(layer_bytes(offload)), offloaded_bytes(offload)
    needed = plan_memory(planned(shape, True, card(1e9)).with_stream(True)).total_bytes / 0.93
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


def test_offloaded_inputs_leave_two_on_the_device_and_fill_chunks_of_ram(shape: Shape) -> None:
    kept, offloaded = (plan_memory(planned(shape, mode, card(1e9))) for mode in (True, "offload"))
    one = 200 * shape.hidden * 2
    assert kept.total_bytes - offloaded.total_bytes == (shape.layers - 2) * one
    assert offloaded_bytes(planned(shape, "offload", card(1e9))) == shape.layers * 2**24


def test_plan_and_run_say_what_was_decided(write_recipe: Any, tmp_path: Path, capsys: Any) -> None:
    recipe = str(write_recipe(training={"max_steps": 1, "output_dir": str(tmp_path / "run")}))
    assert main(["plan", recipe, "--no-timing"]) == 0
    assert "Gradient checkpointing: off (auto: without it the run takes" in " ".join(capsys.readouterr().out.split())
    assert main(["train", recipe]) == 0
    assert "Gradient checkpointing: off (auto" in " ".join(capsys.readouterr().err.split())
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["gradient_checkpointing"] is False
    assert run["plan"]["gradient_checkpointing"]["asked"] == "auto"
    assert run["plan"]["gradient_checkpointing"]["why"].startswith("auto: without it the run takes")


def test_a_resumed_run_keeps_what_was_decided_where_that_still_fits(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(training={"max_steps": 2, "save_steps": 1})
    whole = tmp_path / "whole"
    train(recipe, whole)
    for share, kept, said in ((1.5, False, "Gradient checkpointing stays off"), (0.9, True, "was off when the run")):
        machine = Machine("a CPU", "cpu", torch.float32, True, int(share * 1e9), runtime_bytes=10**9)
        monkeypatch.setattr(
            "qvera.training.session.make_plan",
            lambda recipe, _, *a, **k: make_plan(recipe, machine, *a, **k),  # noqa: B023
        )
        console = Console(file=io.StringIO(), width=1000)
        again = train(recipe, cut_off(whole, tmp_path / str(share), after=1), resume=True, console=console)
        assert again is not None
        assert again.run["gradient_checkpointing"] is kept
        assert said in console.file.getvalue()  # type: ignore[attr-defined]
    asked = recipe.replace(training=recipe.training.replace(gradient_checkpointing=True))
    again = train(asked, cut_off(whole, tmp_path / "asked", after=1), resume=True)
    assert again is not None
    assert again.run["gradient_checkpointing"] is True  # a recipe may say another one when a run goes on
