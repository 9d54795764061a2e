"""The wider matrix, slow: three ranks (which divide nothing evenly), no checkpointing, dropout, b alone, 16 bits."""

from __future__ import annotations

import shutil
import subprocess
import sys
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

    for kind, training in KINDS.items():
        place.alone(f"alone-{kind}", **training)
        for stage in STAGED:
            tasks.append(place.task(f"{stage}-{kind}", stage, **training))
    for stage in STAGED:
        recipe = place.recipe(stage, **BARE)
        recipe["adapter"] |= {"dropout": 0.2, "train_d": False, "input_scale": False}
        name = f"{stage}-dropout"
        tasks.append(place.task(name, stage, {"recipe": recipe}))
        tasks.append(place.task(f"{name}-cut", stage, {"recipe": recipe, "stop_after": CUT}))
        tasks.append(place.task(f"{name}-on", stage, {"recipe": recipe, "of": f"{name}-cut", "resume": True}))
        narrow = place.recipe(stage, **BARE)
        narrow["model"] |= {"compute_dtype": "bfloat16"}
        tasks.append(place.task(f"{stage}-bf16", stage, {"recipe": narrow}))
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


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory, tiny_rows: Path) -> TinyRuns:
    """Runs of two processes, cut after step 4 and gone on with by four. Seven rows a step; the fifth step has four."""
    place = TinyRuns(tmp_path_factory.mktemp("moved"), tiny_rows)
    root, found = place.root, {}
    place.alone("alone", **UNEVEN)
    place.alone("alone-8", **BARE)
    cut = [place.task(f"{stage}-from-2", stage, {"stop_after": CUT}, **UNEVEN) for stage in STAGED]
    two = run_worker(cut, 2, root / "two", limit_seconds=400)
    tasks = []
    for stage in STAGED:
        shutil.copytree(root / f"{stage}-from-2", root / f"{stage}-2-to-4")
        tasks.append(place.task(f"{stage}-2-to-4", stage, {"resume": True}, **UNEVEN))
    for stage, packing in FOUR_TIMES_TWO:
        recipe = place.recipe(stage, **BARE)
        recipe["data"]["packing"] = packing
        tasks.append(place.task(f"{stage}-packed" if packing else f"{stage}-padded", stage, {"recipe": recipe}))
    for ranks in (two, run_worker(tasks, 4, root / "four", limit_seconds=900)):
        for name, first in ranks[0].items():
            steps = range(len(first["rows"]))
            found[name] = [sorted(row for rank in ranks for row in rank[name]["rows"][i]) for i in steps]
    place.found = [found]
    return place


@pytest.mark.parametrize("stage", STAGED)
def test_a_run_goes_on_with_more_processes_and_trains_each_row_once(moved: TinyRuns, stage: str | None) -> None:
    assert len(losses(moved.root / f"{stage}-2-to-4")) == STEPS
    close(moved.root / f"{stage}-2-to-4", moved.root / "alone")
    before, after = moved.found[0][f"{stage}-from-2"], moved.found[0][f"{stage}-2-to-4"]
    assert [len(rows) for rows in (*before, *after)] == [7, 7, 7, 7, 4, 7]
    assert sorted(row for rows in (*before, *after[:1]) for row in rows) == list(range(32))


@pytest.mark.parametrize(("stage", "packing"), FOUR_TIMES_TWO)
def test_four_times_two_rows_are_eight(moved: TinyRuns, stage: str | None, packing: bool) -> None:
    close(moved.root / (f"{stage}-packed" if packing else f"{stage}-padded"), moved.root / "alone-8")


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
