"""Methods that hold more than vectors of one linear, and LoRA+, in two processes: the numbers of one process, and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.ranks import run_worker
from tests.distributed.runs import BARE, CUT, LAYERS, STEPS, TinyRuns, close
from tests.models.experts import write
from tests.training.runs import losses

pytestmark = [pytest.mark.process, pytest.mark.slow]

SARA: dict[str, Any] = {"method": "sara", "rank": 16, "singular_share": 0.3}
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"rank": 8, "magnitude": True},
    "lora": {"method": "lora", "rank": 4},
    "lora+": {"method": "lora", "rank": 4, "alpha": 10, "loraplus_lr_ratio": 4},  # groups with rates of their own
    "lora-xs": {"method": "lora-xs", "rank": 4},
    "shared-core": {"method": "shared-core", "rank": 4},
    "lorta": {"method": "lorta", "rank": 4},
    "uni-lora": {"method": "uni-lora", "rank": 4, "theta_length": 500},
    "sara": SARA,
    "mo-sara of the svd": {**SARA, "frozen_pair": "svd", "mixed_vectors": 3},
    "lora-sb": {"method": "lora-sb", "rank": 4, "gradient_rows": 9},
    "each expert": {"rank": 8, "experts": "each", "b_groups": 2},
    "shared vectors of experts": {"rank": 8, "experts": "shared"},
}
SPIEL: dict[str, Any] = {"method": "spiel", "rank": 2, "accumulate_steps": 2, "reselect_every": 2}
# ZeRO-3 first: its ranks decompose gathered weights, and nothing is cached for them
CASES = [
    *((name, "zero3") for name in METHODS if name != "lora-sb"),
    *((name, "zero2") for name in ("lora+", "lora-sb")),  # its flat partitions do not know what they hold
    ("lora+", "zero1"),
]
RESUMED = [("magnitude", "zero3"), ("lora+", "zero2")]
RTOL = {"lora": 1e-4, "lora+": 1e-4, "lora-sb": 1e-4, "each expert": 1e-4}
"""Where a gradient nearly cancels, AdamW magnifies its rounding."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_rows: Path) -> TinyRuns:
    place = TinyRuns(tmp_path_factory.mktemp("methods"), tiny_rows)
    mixture = write("mixtral", place.root / "mixtral")

    def recipe(name: str, stage: str | None = None, **training: Any) -> dict[str, Any]:
        found = {**place.recipe(stage, **BARE, **training), "adapter": METHODS[name]}
        if "experts" in METHODS[name]:
            found["model"]["path"] = str(mixture)
        return found

    for name in METHODS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("QVERA_CACHE", str(place.root / "cache-alone"))
            place.alone(name, recipe(name))
    for name, stage in CASES:
        place.task(f"{name}-{stage}", recipe(name, stage))
    for name, stage in RESUMED:
        place.cut_and_resumed(f"{name}-{stage}", recipe(name, stage))
    place.task("kept", recipe("lora", "zero3", gradient_checkpointing=False))
    place.task("refused", recipe("lora-sb", "zero3"), fails=True)
    sparse = {**place.recipe(max_steps=5, save_total_limit=9, **BARE), "adapter": SPIEL}
    place.alone("spiel-alone", sparse)
    place.task("spiel", sparse)
    place.found = run_worker(place.tasks, 2, place.root / "spawn", limit_seconds=600)
    return place


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_two_processes_give_the_numbers_of_one(place: TinyRuns, name: str, stage: str) -> None:
    run = place.root / f"{name}-{stage}"
    assert len(losses(run)) == STEPS
    close(run, place.root / name, rtol=RTOL.get(name, 1e-5))


@pytest.mark.parametrize(("name", "stage"), RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(place: TinyRuns, name: str, stage: str) -> None:
    place.same_to_the_bit(f"{name}-{stage}-resumed", f"{name}-{stage}")


def test_two_ranks_move_sparse_values_to_the_same_places(place: TinyRuns) -> None:
    """To those of rank 0's first micro-batch after step 2, which are the ones of a process alone; and again after step 4."""
    first, second = (rank["spiel"]["digest"] for rank in place.found)
    assert first == second
    file = f"checkpoints/step-{CUT:08d}/vectors.safetensors"
    mine, alone = (load_file(place.root / name / file) for name in ("spiel", "spiel-alone"))
    places = [key for key, tensor in alone.items() if tensor.dtype == torch.int32]
    assert len(places) == 7 * LAYERS
    assert all(torch.equal(mine[key], alone[key]) for key in places)


def test_lora_trains_under_zero3_without_checkpointing(place: TinyRuns) -> None:
    """Its trial of the longest batch meets q, k and v in another order than a step does."""
    close(place.root / "kept", place.root / "lora", rtol=RTOL["lora"])


def test_a_start_from_whole_gradients_is_refused_where_weights_are_sharded(place: TinyRuns) -> None:
    words = "adapter.method lora-sb starts from gradients of whole weights. Use zero1, zero2 or none"
    for found in (rank["refused"] for rank in place.found):
        assert found["error"] == "InputError" and words in found["text"]
