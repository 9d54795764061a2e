"""Phases of work: what a log, a terminal and `qvera ui` hear of them."""

from __future__ import annotations

import io
import json
import re
import time
from pathlib import Path

import pytest
from rich.console import Console

from qvera.utils import progress
from qvera.utils.formatting import size
from qvera.utils.progress import Phase


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def log() -> Console:
    return Console(file=io.StringIO(), width=200)


def lines_of(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined, no-any-return]


def test_a_log_has_the_name_the_count_and_from_the_second_step_on_the_time_left(clock: Clock, log: Console) -> None:
    with Phase(log, "answering 48 prompts with the base", 48) as show:
        for done in range(1, 49):
            clock.seconds += 20 if done == 1 else 10  # the first one loads what the others have
            show(done)
    lines = lines_of(log)
    assert lines[:3] == [
        "answering 48 prompts with the base: 1/48, 20 s so far",
        "answering 48 prompts with the base: 3/48, 7 min 30 s left",
        "answering 48 prompts with the base: 7/48, 6 min 50 s left",
    ]
    assert lines[-1] == "answering 48 prompts with the base: 48/48, 8 min 10 s"
    assert len(lines) <= 12, "at most a line a minute, after the first few"


def test_what_takes_less_than_five_seconds_says_nothing_in_a_log(clock: Clock, log: Console) -> None:
    with Phase(log, "merging", 100) as show:
        for done in range(100):
            clock.seconds += 0.04
            show(done)
    assert lines_of(log) == []


def test_a_long_step_is_no_silence(monkeypatch: pytest.MonkeyPatch, log: Console) -> None:
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.1)
    monkeypatch.setattr(progress, "_LOOK_SECONDS", 0.02)
    with Phase(log, "loading a model"):
        deadline = time.monotonic() + 10
        while not lines_of(log) and time.monotonic() < deadline:
            time.sleep(0.02)
    assert re.fullmatch(r"loading a model, [\d.]+ s so far", lines_of(log)[0])


def test_an_evaluation_between_two_steps_has_its_own_count_and_takes_no_step_time(clock: Clock, log: Console) -> None:
    with Phase(log, "training", 10, done=2) as show:
        for step in (3, 4):
            clock.seconds += 2
            show(step, facts="loss 1.5000")
        with show.within("held-out loss", 8):
            clock.seconds += 60
            show(2)
            show(0, 4, "answering 4 prompts")  # another phase, in the same break
            clock.seconds += 30
        clock.seconds += 2
        show(5, facts="loss 1.4000")
    assert lines_of(log)[:2] == ["held-out loss: 2/8, 1 min 00 s so far", "training: 5/10, loss 1.4000, 10 s left"]


def test_a_terminal_has_one_bar_and_keeps_the_last_line_of_a_long_phase(clock: Clock) -> None:
    terminal = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    with Phase(terminal, "quantizing my/model", text=size) as show:
        show(2_000_000, 8_000_000)
        clock.seconds += 9
        show(8_000_000, 8_000_000)
    shown = terminal.file.getvalue()  # type: ignore[attr-defined]
    assert "quantizing my/model" in shown
    assert shown.splitlines()[-1].endswith("quantizing my/model: 8.00 MB/8.00 MB, 9.0 s")


def test_the_file_says_where_it_is_and_goes_at_the_end(
    monkeypatch: pytest.MonkeyPatch, log: Console, tmp_path: Path
) -> None:
    monkeypatch.setattr(progress, "_LOOK_SECONDS", 0.02)
    file = tmp_path / "progress"
    with Phase(log, "training", 10, file=file) as show:
        show(1)
        time.sleep(0.01)
        show(2, facts="loss 0.5")
        deadline = time.monotonic() + 10
        while not (file.exists() and json.loads(file.read_text())["done"] == 2) and time.monotonic() < deadline:
            time.sleep(0.02)
        found = json.loads(file.read_text())
    assert (found["name"], found["done"], found["total"], found["facts"]) == ("training", 2, 10, "loss 0.5")
    assert 0 < found["left_seconds"] < 10
    assert not list(tmp_path.iterdir())
