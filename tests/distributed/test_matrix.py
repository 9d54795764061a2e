"""The wider matrix, slow: three ranks (which divide nothing evenly), a tied head, no checkpointing, dropout, b alone, 16 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from .ranks import run_worker
from .test_stages import CUT, STEPS, Place, close, losses, vectors

pytestmark = pytest.mark.slow
STAGED = [None, "zero1", "zero2", "zero3"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-checkpointing": {"gradient_checkpointing": False},
    "no-clipping": {"max_grad_norm": 0.0},
}


@pytest.fixture(scope="module", params=[False, True], ids=["head", "tied head"])
def place(request: Any, tmp_path_factory: pytest.TempPathFactory, tiny_rows: Path) -> Place:
    # neither 64, 32 nor 8 divides by 3: partitions of these vectors are padded
    place = Place(tmp_path_factory.mktemp("matrix"), tiny_rows, tie_word_embeddings=request.param)
    tasks: list[dict[str, Any]] = []

    def task(name: str, recipe: dict[str, Any], **more: Any) -> None:
        tasks.append({"name": name, "recipe": recipe, "run_dir": str(place.root / more.pop("of", name)), **more})

    for kind, training in KINDS.items():
        place.alone(f"alone-{kind}", **training)
        for stage in STAGED:
            task(f"{stage}-{kind}", place.recipe(stage, **training))
    for stage in STAGED:
        recipe = place.recipe(stage)
        recipe["adapter"] |= {"dropout": 0.2, "train_d": False}
        task(f"{stage}-dropout", recipe)
        task(f"{stage}-dropout-cut", recipe, stop_after=CUT)
        task(f"{stage}-dropout-resumed", recipe, of=f"{stage}-dropout-cut", resume=True)
        narrow = place.recipe(stage)
        narrow["model"] |= {"compute_dtype": "bfloat16"}
        task(f"{stage}-bf16", narrow)
    place.found = run_worker(tasks, 3, place.root / "spawn", limit_seconds=240)
    return place


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGED)
def test_three_ranks_give_the_numbers_of_one(place: Place, stage: str | None, kind: str) -> None:
    close(place.root / f"{stage}-{kind}", place.root / f"alone-{kind}")


@pytest.mark.parametrize("stage", STAGED)
def test_with_dropout_a_resumed_run_is_the_uninterrupted_one_to_the_bit(place: Place, stage: str | None) -> None:
    whole, cut = place.root / f"{stage}-dropout", place.root / f"{stage}-dropout-cut"
    assert len(losses(cut)) == STEPS and losses(cut) == losses(whole)
    mine, theirs = vectors(cut), vectors(whole)
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())
    assert all(bool((t == 0.1).all()) for name, t in mine.items() if name.endswith("_d")), "d was not to be trained"


@pytest.mark.parametrize("stage", STAGED[1:])
def test_in_16_bits_the_stages_agree(place: Place, stage: str) -> None:
    """Only the order of additions differs; stated for the loss, of which bf16 keeps two to three digits."""
    assert losses(place.root / f"{stage}-bf16") == pytest.approx(losses(place.root / "None-bf16"), rel=2e-3)
