"""metrics.jsonl and progress in a log that is no terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from qvera.training import logging
from qvera.training.logging import MetricsLog, ProgressBar, read_records
from qvera.utils import status_line as status_line_module
from qvera.utils.errors import RunFailed
from qvera.utils.status_line import status_line
from tests.disk import fill, small_disk


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (logging, status_line_module):
        monkeypatch.setattr(module, "time", clock)
    return clock


def record(step: int) -> dict[str, float]:
    return {"step": step, "loss": 1.5, "tokens_per_second": 1234.0, "memory_bytes": 999_700}


def test_slow_steps_are_reported_once_a_minute(clock: Clock) -> None:
    console = Console(file=io.StringIO(), width=200)
    with ProgressBar(console, steps=1000, done=0) as bar:
        for step in range(1, 14):
            bar.show(record(step))
            clock.seconds += 10
        for step in range(14, 101):
            bar.show(record(step))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [int(line.split("/")[0].removeprefix("step ")) for line in lines] == [1, 7, 13, 50, 100]
    assert lines[0] == "step 1/1000  loss 1.5000  1,234 tokens/s  1.00 MB"


def test_a_long_stage_is_a_line_a_minute(clock: Clock) -> None:
    console = Console(file=io.StringIO(), width=200)
    with status_line(console, "Loading") as update:
        for percent in range(0, 100, 10):
            update(f"Loading: {percent} %")
            clock.seconds += 25
    assert console.file.getvalue() == "Loading: 30 %\nLoading: 60 %\nLoading: 90 %\n"  # type: ignore[attr-defined]


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
