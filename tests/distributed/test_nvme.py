"""A base whose shares lie in files: the numbers of one process, little of it in RAM, and nothing left behind.

By hand only: DeepSpeed's async_io is compiled for it, which takes minutes, and a share has to be of a MB before it goes
to a file at all.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qvera.distributed.zero import IN_RAM_BELOW_BYTES, nvme_problem
from tests.distributed.ranks import clean_environment, run_worker
from tests.distributed.runs import BARE, LAYERS, TinyRuns
from tests.training.runs import losses, run_json

pytestmark = pytest.mark.matrix
STAGE = "zero3-offload-nvme"
HIDDEN, FF = 1024, 4096
WIDE = HIDDEN * FF // 2 // 2  # bytes of one of two shares of a linear of the MLP: exactly what goes to a file
NARROW = HIDDEN * HIDDEN // 2 // 2  # of an attention projection, which stays
KINDS: dict[str, dict[str, Any]] = {"scored": {}, "whole-graph": {"gradient_checkpointing": False, **BARE}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_rows: Path) -> TinyRuns:
    problem = nvme_problem()
    if problem is not None:
        pytest.skip(f"DeepSpeed's async_io can't be used here: {problem}")
    # once, and not by both ranks at a time
    build = "from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load()"
    subprocess.run([sys.executable, "-c", build], env=clean_environment(), check=True, timeout=1200)
    size: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": FF, "num_attention_heads": 8, "head_dim": 128}
    place = TinyRuns(tmp_path_factory.mktemp("nvme"), tiny_rows, num_key_value_heads=8, **size)
    for kind, training in KINDS.items():
        place.alone(f"{kind}-alone", place.recipe(**training))
        place.task(kind, place.recipe(STAGE, **training))
        place.task(f"{kind}-in-ram", place.recipe("zero3", **training))
    place.cut_and_resumed("scored", place.recipe(STAGE))
    # what a file of the user's own says holds
    zero = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": str(place.root / "disk"), "buffer_count": 20}}
    (place.root / "mine.json").write_text(json.dumps({"zero_optimization": zero}))
    place.task("mine", place.recipe(str(place.root / "mine.json"), **BARE))
    bytewise = place.recipe(STAGE)
    bytewise["model"]["quant_storage"] = "uint8"
    place.task("bytewise", bytewise, fails=True)
    place.found = run_worker(place.tasks, 2, place.root / "spawn", limit_seconds=900)
    return place


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_those_of_zero3_to_the_bit_and_of_one_process_in_order(place: TinyRuns, kind: str) -> None:
    place.same_to_the_bit(kind, f"{kind}-in-ram")
    run, alone = place.root / kind, place.root / f"{kind}-alone"
    assert losses(run) == pytest.approx(losses(alone), rel=1e-5)
    assert run_json(run)["samples"] == run_json(alone)["samples"]


def test_shares_of_a_megabyte_lie_in_files_and_the_others_in_ram_as_planned(place: TinyRuns) -> None:
    assert WIDE == IN_RAM_BELOW_BYTES > NARROW
    for found in (rank["scored"] for rank in place.found):
        assert found["packed_whole_bytes"] == 2 * LAYERS * (3 * WIDE + 4 * NARROW)
        in_files = 3 * LAYERS  # of which nothing but DeepSpeed's placeholder of one element is in RAM
        assert found["packed_held_bytes"] == LAYERS * 4 * NARROW + 2 * in_files
    parts = run_json(place.root / "scored")["plan"]["memory"]["moments"]["backward"]
    planned = {part["name"]: part["bytes"] for part in parts}
    assert planned["shares too small for NVMe"] == LAYERS * 4 * NARROW
    assert planned["buffers between NVMe and RAM"] == (7 + 4) * WIDE
    assert "a share of the base" not in planned


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(place: TinyRuns) -> None:
    place.same_to_the_bit("scored-resumed", "scored")


def test_a_file_of_ones_own_is_followed_and_nothing_of_the_base_is_left_on_the_disk(place: TinyRuns) -> None:
    assert losses(place.root / "mine") == pytest.approx(losses(place.root / "scored"), rel=1e-5)
    assert not list(place.root.glob("*/offload"))
    assert list((place.root / "disk").iterdir()) == []


def test_a_base_in_another_storage_dtype_is_refused_with_the_way_out(place: TinyRuns) -> None:
    for found in (rank["bytewise"] for rank in place.found):
        assert found["error"] == "InputError"
        assert "are uint8. Set model.quant_storage: bfloat16" in found["text"]
    assert not (place.root / "bytewise").exists()
