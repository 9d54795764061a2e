"""bench/limits.py, which every figure of memory comes from: what a command held is counted, and counted once."""

from __future__ import annotations

import os
import sys
import time

import pytest

from bench.limits import Cgroup, measured

_HELD = 200_000_000
_FORKS = f"""
import os, time
held = bytearray(os.urandom(1000)) * {_HELD // 1000}
if os.fork() == 0:  # what subprocess does before exec, only slower
    time.sleep(0.3)
    os.execvp("sleep", ["sleep", "0.1"])
os.wait()
"""


@pytest.fixture(autouse=True)
def _cgroup() -> None:
    try:
        Cgroup(None).remove()
    except RuntimeError as error:
        pytest.skip(str(error))


def test_a_fork_before_its_exec_is_not_a_second_process() -> None:
    found = measured([sys.executable, "-c", _FORKS])
    assert found.returncode == 0
    assert _HELD < found.peak_bytes < 1.3 * _HELD


def test_what_the_measuring_process_holds_is_not_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    held = bytearray(os.urandom(1000)) * (_HELD // 1000)
    enter = Cgroup.enter

    def slowly(group: Cgroup) -> None:  # between the fork and the exec of the command
        enter(group)
        time.sleep(0.3)

    monkeypatch.setattr(Cgroup, "enter", slowly)
    found = measured([sys.executable, "-c", "import time; time.sleep(0.1)"])
    assert len(held) == _HELD
    assert found.returncode == 0
    assert 0 < found.peak_bytes < 0.5 * _HELD


def test_two_processes_are_two() -> None:
    held = f"held = bytearray(b'x' * 1000) * {_HELD // 1000}; import time; time.sleep(0.5)"
    both = f"import subprocess, sys; other = subprocess.Popen([sys.executable, '-c', {held!r}]); {held}; other.wait()"
    found = measured([sys.executable, "-c", both])
    assert found.returncode == 0
    assert 2 * _HELD < found.peak_bytes < 2.6 * _HELD
