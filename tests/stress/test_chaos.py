"""Killed by SIGKILL at boundaries of a checkpoint's write and in steps, a training ends as if nothing had been.

`tests/stress/chaos.py` in small. The long form, a hundred kills: bench/results/chaos.json.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers import start_process
from tests.stress import chaos

pytestmark = [pytest.mark.process, pytest.mark.slow]


def test_a_training_killed_everywhere_is_the_one_never_killed(tmp_path: Path) -> None:
    process = start_process(chaos.main, ["--kills", "12", "--steps", "24", "--out", str(tmp_path / "chaos.json")])
    process.join(240)
    process.kill()
    assert process.exitcode == 0
    found = json.loads((tmp_path / "chaos.json").read_text())
    assert found["sigkills"] == 12
    assert all(found["histogram"].values())
    for life in found["lives"]:
        # a life that was killed while it read its checkpoint had not said yet where it goes on
        unsaid = life["place"] in ("reading a checkpoint", "recipe.yaml")
        assert life["went_on_from"] == life["newest_verified_before"] or (unsaid and life["went_on_from"] is None), life
        assert life["newest_verified_after"] >= life["newest_verified_before"], life
    assert found["train_losses_compared"] == found["steps"] == 24
    assert found["evaluations_compared"] > 2
    assert found["records_equal_to_the_bit"]
    assert found["adapter_equal_to_the_bit"]
    assert found["files_left_over"] == [], "what killed processes left behind is cleared away"
