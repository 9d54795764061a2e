"""bench/limits.py, which every figure of memory comes from: what a command held is counted, and counted once."""

from __future__ import annotations

import sys

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


def test_what_a_command_held_is_counted_once() -> None:
    """A fork before its exec is no second process; two processes that hold as much are two."""
    try:
        Cgroup(None).remove()
    except RuntimeError as error:
        pytest.skip(str(error))
    forked = measured([sys.executable, "-c", _FORKS])
    assert forked.returncode == 0
    assert _HELD < forked.peak_bytes < 1.3 * _HELD
    one = f"held = bytearray(b'x' * 1000) * {_HELD // 1000}; import time; time.sleep(0.3)"
    two = f"import subprocess, sys; other = subprocess.Popen([sys.executable, '-c', {one!r}]); {one}; other.wait()"
    assert 2 * _HELD < measured([sys.executable, "-c", two]).peak_bytes < 2.6 * _HELD
