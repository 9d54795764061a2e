"""The wider matrix, slow: three ranks (which divide nothing evenly), no checkpointing, dropout, b alone, 16 bits."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.distributed.ranks import clean_environment, run_worker
from tests.distributed.runs import BARE, CUT, STEPS, UNEVEN, TinyRuns, close, losses, vectors

pytestmark = pytest.mark.matrix
STAGED = [None, "zero1", "zero2", "zero3", "zero3-offload-cpu"]
FOUR_TIMES_TWO = [*((stage, False) for stage in STAGED), (None, True), ("zero3", True)]
KINDS: dict[str, dict[str, Any]] = {
    "scored": {},
    "no-checkpointing": {"gradient_checkpointing": False, **BARE},
    "no-clipping": {"max_grad_norm": 0.0, **BARE},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_rows: Path) -> TinyRuns:
    # neither 64, 32 nor 8 divides by 3: partitions of these vectors are padded
    place = TinyRuns(tmp_path_factory.mktemp("matrix"), tiny_rows)
    tasks: list[dict[str, Any]] = []

    def task(name: str, recipe: dict[str, Any], **more: Any) -> None:
        tasks.append({"name": name, "recipe": recipe, "run_dir": str(place.root / more.pop("of", name)), **more})

    for kind, training in KINDS.items():
        place.alone(f"alone-{kind}", **training)
        for stage in STAGED:
            task(f"{stage}-{kind}", place.recipe(stage, **training))
    for stage in STAGED:
        recipe = place.recipe(stage, **BARE)
        recipe["adapter"] |= {"dropout": 0.2, "train_d": False, "input_scale": False}
        task(f"{stage}-dropout", recipe)
        task(f"{stage}-dropout-cut", recipe, stop_after=CUT)
        task(f"{stage}-dropout-resumed", recipe, of=f"{stage}-dropout-cut", resume=True)
        narrow = place.recipe(stage, **BARE)
        narrow["model"] |= {"compute_dtype": "bfloat16"}
        task(f"{stage}-bf16", narrow)
    place.found = run_worker(tasks, 3, place.root / "spawn", limit_seconds=900)
    return place


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGED)
def test_three_ranks_give_the_numbers_of_one(place: TinyRuns, stage: str | None, kind: str) -> None:
    close(place.root / f"{stage}-{kind}", place.root / f"alone-{kind}")


@pytest.mark.parametrize("stage", STAGED)
def test_with_dropout_a_resumed_run_is_the_uninterrupted_one_to_the_bit(place: TinyRuns, stage: str | None) -> None:
    whole, cut = place.root / f"{stage}-dropout", place.root / f"{stage}-dropout-cut"
    assert len(losses(cut)) == STEPS
    assert losses(cut) == losses(whole)
    mine, theirs = vectors(cut), vectors(whole)
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())
    assert all(bool((t == 0.1).all()) for name, t in mine.items() if name.endswith("_d")), "d was not to be trained"


@pytest.mark.parametrize("stage", STAGED[1:])
def test_in_16_bits_the_stages_agree(place: TinyRuns, stage: str) -> None:
    """Only the order of additions differs; stated for the loss, of which bf16 keeps two to three digits."""
    assert losses(place.root / f"{stage}-bf16") == pytest.approx(losses(place.root / "None-bf16"), rel=2e-3)


# Going on with another number of processes, under every stage, in uneven batches: seven rows a step, the fifth step has
# four.


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory, tiny_rows: Path) -> TinyRuns:
    """Runs cut after step 4 and gone on with: 1 → 2, 2 → 1 and 2 → 4 processes."""
    place = TinyRuns(tmp_path_factory.mktemp("moved"), tiny_rows)
    root, found = place.root, {}
    place.alone("alone", **UNEVEN)
    place.alone("from-1", **UNEVEN, save_steps=CUT)
    shutil.rmtree(root / "from-1" / "checkpoints" / f"step-{STEPS:08d}")

    def tasks(how: str, source: Callable[[str | None], str], **more: Any) -> list[dict[str, Any]]:
        planned = []
        for stage in STAGED:
            name = f"{stage}-{how}"
            if source(stage):
                shutil.copytree(root / source(stage), root / name)
            training = {**UNEVEN, "save_steps": CUT} if how == "1-to-2" else UNEVEN
            planned.append(
                {"name": name, "recipe": place.recipe(stage, **training), "run_dir": str(root / name), **more}
            )
        return planned

    grown = tasks("1-to-2", lambda _: "from-1", resume=True)
    two = run_worker([*grown, *tasks("from-2", lambda _: "", stop_after=CUT)], 2, root / "two", limit_seconds=400)
    to_four = tasks("2-to-4", lambda stage: f"{stage}-from-2", resume=True)
    place.alone("alone-8", **BARE)
    for stage, packing in FOUR_TIMES_TWO:
        recipe = place.recipe(stage, **BARE)
        recipe["data"]["packing"] = packing
        name = f"{stage}-packed" if packing else f"{stage}-padded"
        to_four.append({"name": name, "recipe": recipe, "run_dir": str(root / name)})
    four = run_worker(to_four, 4, root / "four", limit_seconds=900)
    for stage in STAGED:
        shutil.copytree(root / f"{stage}-from-2", root / f"{stage}-2-to-1")
        place.alone(f"{stage}-2-to-1", resume=True, **UNEVEN)
    for ranks in (two, four):
        for name in ranks[0]:
            found[name] = [
                sorted(row for rank in ranks for row in rank[name]["rows"][i])
                for i in range(len(ranks[0][name]["rows"]))
            ]
    place.found = [found]
    return place


@pytest.mark.parametrize("how", ["1-to-2", "2-to-1", "2-to-4"])
@pytest.mark.parametrize("stage", STAGED)
def test_a_run_goes_on_with_another_number_of_processes(moved: TinyRuns, stage: str | None, how: str) -> None:
    assert len(losses(moved.root / f"{stage}-{how}")) == STEPS
    close(moved.root / f"{stage}-{how}", moved.root / "alone")


@pytest.mark.parametrize(("stage", "packing"), FOUR_TIMES_TWO)
def test_four_times_two_rows_are_eight(moved: TinyRuns, stage: str | None, packing: bool) -> None:
    close(moved.root / (f"{stage}-packed" if packing else f"{stage}-padded"), moved.root / "alone-8")


@pytest.mark.parametrize("stage", STAGED)
def test_no_row_comes_twice_and_none_is_missed_when_ranks_are_added(moved: TinyRuns, stage: str | None) -> None:
    (found,) = moved.found
    before, after = found[f"{stage}-from-2"], found[f"{stage}-2-to-4"]
    assert [len(rows) for rows in (*before, *after)] == [7, 7, 7, 7, 4, 7]
    epoch = [row for rows in (*before, *after[:1]) for row in rows]
    assert sorted(epoch) == list(range(32))


_TWICE = """
import sys
from pathlib import Path
from qvera.config.load import load_recipe
from qvera.training.trainer import train
for name in ("first", "second"):
    train(load_recipe(sys.argv[1]), Path(name))
"""


def test_one_process_can_run_under_zero3_and_again(place: TinyRuns, tmp_path: Path) -> None:
    (tmp_path / "twice.py").write_text(_TWICE)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(place.recipe("zero3")))
    command = [sys.executable, "twice.py", "recipe.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=clean_environment(), capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    for name in ("first", "second"):
        close(tmp_path / name, place.root / "alone-scored")
