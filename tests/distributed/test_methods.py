"""Methods that hold more than vectors of one linear, and LoRA+, in two processes under ZeRO: the numbers of one process, and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qvera.config.schema import parse_recipe
from qvera.training.trainer import train
from tests.distributed.ranks import run_worker
from tests.distributed.runs import BARE, CUT, STEPS, TinyRuns, close, losses, vectors

pytestmark = [pytest.mark.process, pytest.mark.slow]

METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"rank": 8, "magnitude": True},
    "lora+": {"method": "lora", "rank": 4, "alpha": 10, "loraplus_lr_ratio": 4},  # groups with rates of their own
}
STAGES = ("zero1", "zero2", "zero3")
SARA: dict[str, Any] = {"method": "sara", "rank": 16, "singular_share": 0.3}
SHORT_METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 4},
    "lora-xs": {"method": "lora-xs", "rank": 4},
    "shared-core": {"method": "shared-core", "rank": 4},
    "lorta": {"method": "lorta", "rank": 4},
    "sara": SARA,
    "mo-sara of the svd": {**SARA, "frozen_pair": "svd", "experts": 3},
}
SHORT_STAGES = ("zero3", "zero2")  # ZeRO-3 first: its ranks decompose gathered weights, and nothing is cached for them
LORA_SB: dict[str, Any] = {"method": "lora-sb", "rank": 4, "gradient_rows": 9}
SHORT = {"max_steps": 3, **BARE}
KEPT = "lora-zero3-kept"
"""A run that keeps its activations: its trial of the longest batch meets q, k and v in another order than a step does."""
RTOL = {"lora": 1e-4, "lora+": 1e-4}  # where an element of a gradient nearly cancels, AdamW magnifies its rounding


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_rows: Path) -> TinyRuns:
    place = TinyRuns(tmp_path_factory.mktemp("methods"), tiny_rows)
    tasks: list[dict[str, Any]] = []
    for name, adapter in METHODS.items():
        train(parse_recipe({**place.recipe(**BARE), "adapter": adapter}, name), place.root / f"alone-{name}")
        for stage in STAGES:
            recipe = {**place.recipe(stage, **BARE), "adapter": adapter}
            tasks.append(place.task(f"{name}-{stage}", stage, {"recipe": recipe}))
            cut = f"{name}-{stage}-cut"
            tasks.append(place.task(cut, stage, {"recipe": recipe, "stop_after": CUT}))
            tasks.append(place.task(f"{cut}-on", stage, {"recipe": recipe, "of": cut, "resume": True}))
    for name, adapter in (*SHORT_METHODS.items(), ("lora-sb", LORA_SB)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("QVERA_CACHE", str(place.root / "cache-alone"))
            train(parse_recipe({**place.recipe(**SHORT), "adapter": adapter}, name), place.root / f"alone-{name}")
        for stage in SHORT_STAGES if name in SHORT_METHODS else STAGES:
            recipe = {**place.recipe(stage, **SHORT), "adapter": adapter}
            refused = name == "lora-sb" and stage == "zero3"
            tasks.append(place.task(f"{name}-{stage}", stage, {"recipe": recipe, "fails": refused}))
    kept = {**SHORT, "gradient_checkpointing": False}
    recipe = {**place.recipe("zero3", **kept), "adapter": {"method": "lora", "rank": 4}}
    tasks.append(place.task(KEPT, "zero3", {"recipe": recipe}))
    place.found = run_worker(tasks, 2, place.root / "spawn", limit_seconds=600)
    return place


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_give_the_numbers_of_one(place: TinyRuns, name: str, stage: str) -> None:
    assert len(losses(place.root / f"{name}-{stage}")) == STEPS
    close(place.root / f"{name}-{stage}", place.root / f"alone-{name}", rtol=RTOL.get(name, 1e-5))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(place: TinyRuns, name: str, stage: str) -> None:
    mine, theirs = vectors(place.root / f"{name}-{stage}-cut"), vectors(place.root / f"{name}-{stage}")
    assert all(torch.equal(mine[key], tensor) for key, tensor in theirs.items())


def test_lora_trains_under_zero3_without_checkpointing(place: TinyRuns) -> None:
    close(place.root / KEPT, place.root / "alone-lora", rtol=RTOL["lora"])


@pytest.mark.parametrize("stage", SHORT_STAGES)
@pytest.mark.parametrize("name", SHORT_METHODS)
def test_two_processes_train_other_methods_as_one_does(place: TinyRuns, name: str, stage: str) -> None:
    run, alone = place.root / f"{name}-{stage}", place.root / f"alone-{name}"
    assert len(losses(run)) == SHORT["max_steps"]
    close(run, alone, rtol=RTOL.get(name, 1e-5))


@pytest.mark.parametrize("stage", ["zero1", "zero2"])
def test_the_start_from_the_first_gradient_is_that_of_one_process(place: TinyRuns, stage: str) -> None:
    run = place.root / f"lora-sb-{stage}"
    assert len(losses(run)) == SHORT["max_steps"]
    close(run, place.root / "alone-lora-sb", rtol=1e-4)


def test_a_start_from_whole_gradients_is_refused_where_weights_are_sharded(place: TinyRuns) -> None:
    for found in place.found:
        assert found["lora-sb-zero3"]["error"] == "InputError"
        assert (
            "adapter.method lora-sb starts from gradients of whole weights. Use zero1, zero2 or none"
            in found["lora-sb-zero3"]["text"]
        )
