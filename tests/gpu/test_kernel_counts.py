"""How many kernels a layer launches: on a fast card, and with short batches, a step waits for the host that launches them.

The figures stand in bench/results/kernel_counts.json, which bench/kernel_counts.py writes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.fake_accelerator import FakeAccelerator
from tests.gpu.kernel_counts import ADAPTERS, CASES, dequantized_weights, layer_kept_bytes, layer_kernels
from tests.gpu.own_process import measured

pytestmark = pytest.mark.process

TOLERANCE = 0.05
MANY, LORA, PEFT = "qvera, r=256, 32 adapters", "qvera LoRA, r=16", "PEFT LoRA, r=16"
OURS = ("qvera, r=256", LORA, MANY)


def counts(fake: FakeAccelerator) -> dict[str, Any]:
    """Launches by name, without a checkpoint and with one; and bytes kept for backward."""
    cases = {name: (name, ADAPTERS.get(name, 1)) for name in (*OURS, PEFT)} | {"4 adapters": (MANY, 4)}
    passes = {
        key: [
            dict(layer_kernels(fake, CASES[name], checkpointing=checkpointing, adapters=adapters))
            for checkpointing in (False, True)
        ]
        for key, (name, adapters) in cases.items()
    }
    kept = {name: layer_kept_bytes(fake, CASES[name], adapters=ADAPTERS.get(name, 1)) for name in (*OURS, PEFT)}
    return passes | {"dequantized weights": dequantized_weights(fake), "kept": kept}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return measured(counts)


def test_a_layer_launches_and_keeps_what_the_table_says(found: dict[str, Any]) -> None:
    file = Path(__file__).parents[2] / "bench" / "results" / "kernel_counts.json"
    table_rows = json.loads(file.read_text())["rows"]
    rows = [row for row in table_rows if (row["shape"], row["QVERA_KERNELS"]) == ("7b", "on") and row["case"] in OURS]
    assert len(rows) == len(OURS)
    for row in rows:
        table = [row["plain"]["launches"], row["checkpointed"]["launches"], row["kept_bytes"]]
        counted = [sum(launched.values()) for launched in found[row["case"]]] + [found["kept"][row["case"]]]
        assert counted == pytest.approx(table, rel=TOLERANCE), row["case"]


@pytest.mark.parametrize("name", OURS)
def test_each_frozen_weight_is_dequantized_once_a_pass_and_nothing_is_copied(found: dict[str, Any], name: str) -> None:
    assert [launched["qvera.dequantize_4bit"] for launched in found[name]] == [14, 21]
    assert not {"aten.copy_", "aten.clone", "aten.cat"} & set(found[name][1])


def test_a_pass_of_many_adapters_launches_the_same_kernels_however_many_there_are(found: dict[str, Any]) -> None:
    """One after the other 32 would take 32 times those of one adapter."""
    assert found["4 adapters"] == found[MANY]


def test_lora_launches_and_keeps_less_than_half_of_stock_peft_s(found: dict[str, Any]) -> None:
    ours, theirs = ([sum(one.values()) for one in found[name]] + [found["kept"][name]] for name in (LORA, PEFT))
    assert all(own < stock / 2 for own, stock in zip(ours, theirs, strict=True))


def test_one_dequantized_weight_is_in_memory_at_a_time(found: dict[str, Any]) -> None:
    """So the allocator gives each the memory of the last, and a buffer kept for them would save nothing."""
    assert found["dequantized weights"] == [1, 21]
