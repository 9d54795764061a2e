"""Measures the cores that this process may use, and how many of them others use. Imports no torch."""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

_WINDOW_SECONDS = 0.25
_FEW = 0.25
"""Up to so many cores in use by others change nothing."""
_SET_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
"""Threads of GNU's and LLVM's OpenMP that wait for others sleep, where they would take time from them."""


class Cores(NamedTuple):
    """The cores ``allowed`` by a process's affinity and the CPU quota of its cgroups; ``others`` use some of them."""

    allowed: float
    others: float

    @property
    def are_shared(self) -> bool:
        """Whether others use so much of them that it matters."""
        return self.others > _FEW

    @property
    def free_threads(self) -> int:
        """The number of threads that find a core of their own, at least one."""
        return max(1, round(self.allowed - self.others))

    def __str__(self) -> str:
        text = f"{self.allowed:g} core{'s' * (self.allowed != 1)}"
        return text + (f", {self.others:.1f} of them used by others" if self.are_shared else "")


def core_ids() -> Sequence[int]:
    """The cores that this process may run on; all of them where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def measure(seconds: float = _WINDOW_SECONDS) -> Cores:
    """Watch for ``seconds`` what runs beside this process, which sleeps meanwhile."""
    ids = core_ids()
    quotas = dict(_quotas())

    def readings() -> tuple[float, float, dict[Path, float]]:
        """Seconds since an early moment, seconds that the cores were idle in all, and those that each cgroup used."""
        each = psutil.cpu_times(percpu=True)
        # a system container (lxcfs) shows its own cores alone, numbered anew; so does a machine whose others are off
        own = each if ids[-1] >= len(each) else [each[i] for i in ids]
        idle, now = sum(one.idle + getattr(one, "iowait", 0.0) for one in own), time.monotonic()
        if not any(map(sum, own)):  # gVisor counts nothing, and others may as well be idle
            idle = now * len(ids)
        return now, idle, {group: _used_seconds(group) for group in quotas}

    began, idle_before, used_before = readings()
    time.sleep(seconds)
    ended, idle, used = readings()
    passed = ended - began
    busy = min(max(len(ids) - (idle - idle_before) / passed, 0.0), len(ids))
    found = [Cores(len(ids), busy)]
    found += [Cores(quota, min((used[group] - used_before[group]) / passed, quota)) for group, quota in quotas.items()]
    # The tightest of all limits decides.
    return min(found, key=lambda cores: cores.allowed - cores.others)


def cgroups(controller: str) -> Iterator[tuple[Path, bool]]:
    """Yield the cgroups of this process for ``cpu`` or ``memory`` and those above, and whether each is of version 1."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or controller in controllers.split(","):
                group = Path("/sys/fs/cgroup", controller if controllers else "", path.lstrip("/"))
                yield from ((directory, bool(controllers)) for directory in (group, *group.parents))


def _quotas() -> Iterator[tuple[Path, float]]:
    """Yield the cgroups of this process that limit its CPU time, each with its limit in cores."""
    for directory, is_first in cgroups("cpu"):
        with contextlib.suppress(OSError, ValueError):  # "max" and -1: no limit here
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if is_first else ("cpu.max",)
            quota, period = map(int, " ".join((directory / name).read_text() for name in names).split())
            if quota > 0:
                yield directory, quota / period


def _used_seconds(group: Path) -> float:
    """Return the CPU seconds that a cgroup has used; 0 where it does not say."""
    with contextlib.suppress(OSError, ValueError):
        return int((group / "cpuacct.usage").read_text()) / 1e9  # v1
    with contextlib.suppress(OSError, ValueError, LookupError):
        stat = dict(line.split() for line in (group / "cpu.stat").read_text().splitlines())
        return int(stat["usage_usec"]) / 1e6
    return 0.0


@contextlib.contextmanager
def fitting_threads() -> Iterator[None]:
    """Before torch is imported: where others use cores, give it the free ones, and let its threads wait asleep.

    What the environment says already stays as it is; a value without a number says nothing.
    """
    is_set = any(any(map(str.isdigit, os.environ.get(name, ""))) for name in _SET_BY_USER)
    if not is_set and (cores := measure()).are_shared:
        os.environ["OMP_NUM_THREADS"] = str(cores.free_threads)
        for name, value in _WAITING.items():
            os.environ.setdefault(name, value)
    yield
