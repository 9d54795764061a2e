"""metrics.jsonl: what a run writes while it goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qvera.training.logging import MetricsLog, read_records
from qvera.utils.errors import RunFailed
from tests.disk import fill, small_disk


def test_damaged_lines_of_the_log_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n7\n{"loss": 2}\n[]\n{"step": 2}\n{"step": 3}\n{"ste')
    MetricsLog(path, last_step=2).write({"step": 3, "loss": 0.5})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5},
    ]  # fmt: skip
    assert list(read_records(tmp_path / "nothing")) == []


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 400_000) as disk:
        log = MetricsLog(disk / "metrics.jsonl", last_step=0)
        fill(disk)
        with pytest.raises(RunFailed, match=r"metrics\.jsonl: the disk is full.*--resume"):
            for step in range(1000):
                log.write({"step": step})
