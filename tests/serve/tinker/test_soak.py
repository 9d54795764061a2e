"""A thousand tenants for an hour (tests/stress/tinker_soak.py), in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.process]
pytest.importorskip("tinker")


def test_nothing_is_lost_or_leaked_under_kills_bad_calls_and_strangers(tiny_model_dir: Path, tmp_path: Path) -> None:
    from tests.stress import tinker_soak

    out = tmp_path / "soak.json"
    sizes = ["--tenants", "12", "--minutes", "0.5", "--kill-seconds", "6", "--replays", "6"]
    code = tinker_soak.main(["--base", str(tiny_model_dir), *sizes, "--directory", str(tmp_path), "--out", str(out)])
    document = json.loads(out.read_text())
    assert document["faults"] == []
    assert code == 0
    assert document["restart_seconds"]
    assert min(document["done"].get(part, 0) for part in ("train", "sample", "be_wrong", "be_foreign")) > 0
    assert max(one["moved_by_the_last_step"] for one in document["replays"]) > 0.01
