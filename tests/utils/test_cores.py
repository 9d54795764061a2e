"""Threads that fit the cores that others leave free."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from qvera.utils import cores
from qvera.utils.cores import Cores, fitting_threads, measure

NAMES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")


class Idle(NamedTuple):
    idle: float


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back
        del os.environ[name]
    return monkeypatch


def threads_beside(allowed: float, others: float, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setattr(cores, "measure", lambda: Cores(allowed, others))
    with fitting_threads():
        return {name: os.environ[name] for name in NAMES if name in os.environ}


def test_a_run_takes_the_cores_that_others_leave_and_waits_asleep(clean: pytest.MonkeyPatch) -> None:
    asleep = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
    assert threads_beside(8, 0.1, clean) == {}, "on free cores torch decides"
    for (allowed, others), threads in {(2, 1.9): "1", (8, 2.8): "5", (64, 64): "1", (1.5, 1.4): "1"}.items():
        assert threads_beside(allowed, others, clean) == {"OMP_NUM_THREADS": threads, **asleep}
        for name in NAMES:
            os.environ.pop(name, None)
    clean.setenv("OMP_NUM_THREADS", "many")
    assert threads_beside(2, 1.9, clean) == {"OMP_NUM_THREADS": "1", **asleep}, "what is no number sets nothing"
    for name in NAMES:
        os.environ.pop(name, None)
    clean.setenv("OMP_NUM_THREADS", "7")
    assert threads_beside(2, 2, clean) == {"OMP_NUM_THREADS": "7"}, "what a person has set stays"
    assert str(Cores(2, 1.94)) == "2 cores, 1.9 of them used by others" and str(Cores(1, 0)) == "1 core"


def test_a_command_has_taken_the_free_cores_when_torch_comes(clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os; print(os.environ['OMP_NUM_THREADS'])")
    script = (
        "from qvera.cli.main import main; from qvera.utils import cores; cores.measure = lambda: cores.Cores(8, 2.8); "
        "main(['--version']); import torch"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    said = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[-1] == "5"


def test_busy_processes_are_measured() -> None:
    """On whatever machine: with one process for each core that does nothing but count, hardly any core is free."""
    allowed = len(os.sched_getaffinity(0))
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(allowed)]
    try:
        found = measure(0.5)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert found.allowed <= allowed
    assert found.others > 0.6 * found.allowed and found.free_threads <= max(1, round(0.4 * allowed))


def test_the_quota_of_a_cgroup_counts_and_what_else_runs_in_it(tmp_path: Path, clean: pytest.MonkeyPatch) -> None:
    used, clock = iter([0.0, 0.3]), iter([0.0, 1.0])  # nothing else runs on the cores themselves
    clean.setattr(cores, "_quotas", lambda: iter([(tmp_path, 0.5)]))
    clean.setattr(cores, "_used_seconds", lambda group: next(used))
    clean.setattr(cores.time, "sleep", lambda seconds: None)
    clean.setattr(cores.time, "monotonic", iter([0.0, 1.0]).__next__)
    clean.setattr(cores.psutil, "cpu_times", lambda percpu: [Idle(next(clock))] * 4096)
    found = measure()
    assert (found.allowed, round(found.others, 6), found.free_threads) == (0.5, 0.3, 1)


def test_a_system_container_shows_its_own_cores_numbered_anew(clean: pytest.MonkeyPatch) -> None:
    idle = iter([[Idle(0.0), Idle(0.0)], [Idle(0.5), Idle(1.0)]])
    clean.setattr(cores, "core_ids", lambda: [8, 9])
    clean.setattr(cores, "_quotas", lambda: iter(()))
    clean.setattr(cores.time, "sleep", lambda seconds: None)
    clean.setattr(cores.time, "monotonic", iter([0.0, 1.0]).__next__)
    clean.setattr(cores.psutil, "cpu_times", lambda percpu: next(idle))
    assert measure() == (2, 0.5)


def test_where_no_time_is_counted_all_cores_are_taken_to_be_free(clean: pytest.MonkeyPatch) -> None:
    clean.setattr(cores, "_quotas", lambda: iter(()))
    clean.setattr(cores.psutil, "cpu_times", lambda percpu: [Idle(0.0)] * 4096)
    assert measure(0.01).others == pytest.approx(0, abs=1e-6)
