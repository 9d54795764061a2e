"""How many kernels a layer launches: on a fast card, and with short batches, a step waits for the host that launches them.

The figures stand in bench/results/kernel_counts.json, which bench/kernel_counts.py writes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.fake_accelerator import FakeAccelerator
from tests.gpu.kernel_counts import ADAPTERS, CASES, layer_costs
from tests.gpu.own_process import measured

pytestmark = pytest.mark.process

TOLERANCE = 0.05
MANY, LORA, PEFT = "qvera, r=256, 32 adapters", "qvera LoRA, r=16", "PEFT LoRA, r=16"
OURS = ("qvera, r=256", LORA, MANY)


def counts(fake: FakeAccelerator) -> dict[str, Any]:
    """What a layer takes in each case."""
    cases = {name: (name, ADAPTERS.get(name, 1)) for name in (*OURS, PEFT)} | {"4 adapters": (MANY, 4)}
    return {key: layer_costs(fake, CASES[name], adapters=adapters) for key, (name, adapters) in cases.items()}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return measured(counts)


def totals(costs: dict[str, Any]) -> list[int]:
    """Launches without a checkpoint and with one, and bytes kept."""
    return [sum(costs["plain"].values()), sum(costs["checkpointed"].values()), costs["kept_bytes"]]


@pytest.mark.parametrize("name", OURS)
def test_a_layer_launches_and_keeps_what_the_table_says(found: dict[str, Any], name: str) -> None:
    file = Path(__file__).parents[2] / "bench" / "results" / "kernel_counts.json"
    rows = json.loads(file.read_text())["rows"]
    (row,) = (row for row in rows if (row["case"], row["shape"], row["QVERA_KERNELS"]) == (name, "7b", "on"))
    table = [row["plain"]["launches"], row["checkpointed"]["launches"], row["kept_bytes"]]
    assert totals(found[name]) == pytest.approx(table, rel=TOLERANCE)
    # each frozen weight is dequantized once a pass, and nothing is copied
    assert [found[name][key]["qvera.dequantize_4bit"] for key in ("plain", "checkpointed")] == [14, 21]
    assert not {"aten.copy_", "aten.clone", "aten.cat"} & set(found[name]["checkpointed"])


def test_a_pass_of_many_adapters_launches_the_same_kernels_however_many_there_are(found: dict[str, Any]) -> None:
    """One after the other 32 would take 32 times those of one adapter."""
    assert totals(found["4 adapters"])[:2] == totals(found[MANY])[:2]


def test_lora_launches_and_keeps_less_than_half_of_stock_peft_s(found: dict[str, Any]) -> None:
    ours, theirs = totals(found[LORA]), totals(found[PEFT])
    assert all(own < stock / 2 for own, stock in zip(ours, theirs, strict=True))
