"""The wider matrix: all stages on three ranks (which divide nothing evenly), packing, dropout, b alone, 16 bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qvera.config.schema import parse_recipe
from qvera.training.trainer import train
from tests.distributed.ranks import run_worker
from tests.distributed.runs import BARE, CUT, STEPS, TinyRuns, close, name_of
from tests.helpers import start_process
from tests.training.runs import losses, vectors

pytestmark = pytest.mark.matrix
STAGES = (None, "zero1", "zero2", "zero3", "zero3-offload-cpu")
KINDS: dict[str, dict[str, Any]] = {
    "scored": {},
    "bare": {"gradient_checkpointing": False, "max_grad_norm": 0.0, **BARE},
    "packed": BARE,
}
THIRTEEN = {"global_batch_size": 13, "per_device_train_batch_size": 13, **BARE}
every_stage = pytest.mark.parametrize("stage", STAGES, ids=name_of)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_rows: Path) -> TinyRuns:
    # neither 64, 32 nor 8 divides by 3: partitions of these vectors are padded
    place = TinyRuns(tmp_path_factory.mktemp("matrix"), tiny_rows)

    def recipe(stage: str | None, kind: str) -> dict[str, Any]:
        made = place.recipe(stage, **KINDS[kind])
        made["data"]["packing"] = kind == "packed"
        return made

    for kind in KINDS:
        place.alone(f"alone-{kind}", recipe(None, kind))
    for stage in STAGES:
        for kind in KINDS:
            place.task(f"{stage}-{kind}", recipe(stage, kind))
        dropout = place.recipe(stage, **BARE)
        dropout["adapter"] |= {"dropout": 0.2, "train_d": False, "input_scale": False}
        place.task(f"{stage}-dropout", dropout)
        place.cut_and_resumed(f"{stage}-dropout", dropout)
        place.task(f"{stage}-bf16", place.recipe(stage, "bfloat16", **BARE))
    ahead = place.root / "ahead.json"  # as on a GPU
    zero = {"stage": 3, "stage3_prefetch_bucket_size": 10**6, "stage3_max_live_parameters": 10**6}
    ahead.write_text(json.dumps({"zero_optimization": zero}))
    place.task("ahead", place.recipe(str(ahead), **BARE))
    place.found = run_worker(place.tasks, 3, place.root / "spawn", limit_seconds=900)
    return place


@pytest.mark.parametrize("kind", KINDS)
@every_stage
def test_three_ranks_give_the_numbers_of_one(place: TinyRuns, stage: str | None, kind: str) -> None:
    close(place.root / f"{stage}-{kind}", place.root / f"alone-{kind}")


@every_stage
def test_three_ranks_share_what_the_stage_says(place: TinyRuns, stage: str | None) -> None:
    moments = 2 * 4 * sum(t.numel() for t in vectors(place.root / "alone-scored").values())
    for found in (rank[f"{stage}-scored"] for rank in place.found):
        assert found["optimizer_bytes"] == pytest.approx(moments / (1 if stage is None else 3), rel=0.05)
        share = 3 if name_of(stage).startswith("zero3") else 1
        assert found["packed_held_bytes"] == pytest.approx(found["packed_whole_bytes"] / share, rel=0.01)


def test_layers_gathered_ahead_change_nothing(place: TinyRuns) -> None:
    close(place.root / "ahead", place.root / "alone-scored")


@every_stage
def test_with_dropout_a_resumed_run_is_the_uninterrupted_one_to_the_bit(place: TinyRuns, stage: str | None) -> None:
    assert len(losses(place.root / f"{stage}-dropout")) == STEPS
    place.same_to_the_bit(f"{stage}-dropout-resumed", f"{stage}-dropout")
    fixed = [t for name, t in vectors(place.root / f"{stage}-dropout").items() if name.endswith("_d")]
    assert all(bool((t == 0.1).all()) for t in fixed), "d was not to be trained"


@pytest.mark.parametrize("stage", STAGES[1:])
def test_in_16_bits_the_stages_agree(place: TinyRuns, stage: str) -> None:
    """Only the order of additions differs; stated for the loss, of which bf16 keeps two to three digits."""
    assert losses(place.root / f"{stage}-bf16") == pytest.approx(losses(place.root / "None-bf16"), rel=2e-3)


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory, tiny_rows: Path) -> TinyRuns:
    """Runs of two processes, cut after step 2 and gone on with by four. Of 32 rows the steps have 13, 13, 6."""
    place = TinyRuns(tmp_path_factory.mktemp("moved"), tiny_rows)
    place.alone("alone", place.recipe(**THIRTEEN))
    for stage in STAGES:
        place.task(f"{stage}-from-2", place.recipe(stage, **THIRTEEN), stop_after=CUT)
    two = run_worker(place.tasks, 2, place.root / "two", limit_seconds=400)
    place.tasks.clear()
    for stage in STAGES:
        shutil.copytree(place.root / f"{stage}-from-2", place.root / f"{stage}-2-to-4")
        place.task(f"{stage}-2-to-4", place.recipe(stage, **THIRTEEN), resume=True)
    four = run_worker(place.tasks, 4, place.root / "four", limit_seconds=900)
    rows: dict[str, Any] = {}
    for stage in STAGES:
        found = ([rank[f"{stage}-from-2"] for rank in two], [rank[f"{stage}-2-to-4"] for rank in four])
        by_step = [step for ranks in found for step in zip(*(rank["rows"] for rank in ranks), strict=True)]
        rows[name_of(stage)] = [[row for of_rank in step for row in of_rank] for step in by_step]
    place.found = [rows]
    return place


@every_stage
def test_a_run_goes_on_with_more_processes_and_trains_each_row_once(moved: TinyRuns, stage: str | None) -> None:
    close(moved.root / f"{stage}-2-to-4", moved.root / "alone")
    steps = moved.found[0][name_of(stage)]
    assert [len(rows) for rows in steps] == [13, 13, 6, 13]
    assert sorted(row for rows in steps[:3] for row in rows) == list(range(32))


def train_twice(recipe: dict[str, Any], root: Path) -> None:
    for name in ("first", "second"):
        train(parse_recipe(recipe, name), root / name)


def test_one_process_can_run_under_zero3_and_again(place: TinyRuns, tmp_path: Path) -> None:
    process = start_process(train_twice, place.recipe("zero3"), tmp_path)
    process.join(120)
    assert process.exitcode == 0
    for name in ("first", "second"):
        close(tmp_path / name, place.root / "alone-scored")
