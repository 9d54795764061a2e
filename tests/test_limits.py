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
_TWO = f"""
import subprocess, sys, time
hold = "held = bytearray(b'x' * 1000) * {_HELD // 1000}"
command = [sys.executable, "-c", hold + "; print(); input()"]
other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
exec(hold)
other.stdout.readline()  # both hold theirs from here until the line below, however slow the machine is
time.sleep(0.3)
other.communicate("\\n")
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
    two = measured([sys.executable, "-c", _TWO])
    assert two.returncode == 0
    assert 2 * _HELD < two.peak_bytes < 2.6 * _HELD
