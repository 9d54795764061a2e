"""Killed by SIGKILL at every boundary of a checkpoint's write and inside steps, a training ends as if nothing had been.

`tests/stress/chaos.py` in small. The long form, a hundred kills: bench/results/chaos.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
def test_a_training_killed_everywhere_is_the_one_never_killed(tmp_path: Path) -> None:
    out = tmp_path / "chaos.json"
    options = ["--kills", "14", "--scratch", str(tmp_path), "--out", str(out)]
    command = [sys.executable, "-m", "tests.stress.chaos", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    if done.stderr.startswith("nothing was killed") or "\nnothing was killed" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found["sigkills"] == 14
    assert all(life["newest_verified_after"] is not None for life in found["lives"])
    places = {place for place, count in found["histogram"].items() if count}
    assert places >= {"open", "partial write", "fsync", "manifest", "rename", "recipe.yaml", "final adapter"}
    assert found["inside_steps"] == 4
    assert found["inside_checkpoint_writes"] == 5
    for life in found["lives"]:
        # a life that was killed while it read its checkpoint had not said yet where it goes on
        assert life["went_on_from"] in (life["newest_verified_before"], None), life
        assert life["went_on_from"] is not None or life["place"] == "reading a checkpoint", life
        assert life["newest_verified_after"] >= life["newest_verified_before"], life
    assert found["train_losses_compared"] == found["steps"]
    assert found["evaluations_compared"] > 2
    assert found["records_equal_to_the_bit"]
    assert found["adapter_equal_to_the_bit"]
    assert found["files_left_over"] == [], "what killed processes left behind is cleared away"
