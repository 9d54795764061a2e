"""Run a command in a memory cgroup of its own and watch its memory from outside.

Peak memory is the maximum of RssAnon + RssShmem + VmSwap, summed over all processes of the command
(`/proc/PID/status`): what can't be given back without losing it. Pages of mapped files are not in it; they count
towards the cgroup's limit, and are dropped when it is reached.

    python bench/limits.py --limit 2.5GB -- qvera train recipe.yaml
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

INTERVAL_SECONDS = 0.008
_FIELDS = ("RssAnon", "RssShmem", "VmSwap")


@dataclasses.dataclass
class Measured:
    """What a command did and held."""

    command: list[str]
    returncode: int
    seconds: float
    peak_bytes: int
    """Maximum of RssAnon + RssShmem + VmSwap over all processes of the command, a fork that has not called exec yet left out."""
    peak_mapped_bytes: int
    """Maximum of RssFile: mapped file pages resident at one time (shared pages are counted in each process)."""
    longest_gap_seconds: float
    """The longest time between two samples."""
    limit_bytes: int | None
    killed_for_memory: bool
    read_bytes: int
    """Bytes read from the block device by processes that were still seen alive (`/proc/PID/io`)."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Cgroup:
    """A memory cgroup, v1 (`memory.limit_in_bytes`) or v2 (`memory.max`), whichever is mounted.

    Raises:
        RuntimeError: neither is mounted, or this user may not make one.
    """

    def __init__(self, limit_bytes: int | None) -> None:
        v1, v2 = Path("/sys/fs/cgroup/memory"), _cgroup2_mount()
        name = f"qvera-bench-{os.getpid()}-{time.monotonic_ns()}"
        try:
            if (v1 / "memory.limit_in_bytes").is_file():
                self.path, knob, self._events = v1 / name, "memory.limit_in_bytes", "memory.oom_control"
            elif v2 is not None and "memory" in (v2 / "cgroup.controllers").read_text().split():
                self.path, knob, self._events = v2 / name, "memory.max", "memory.events"
            else:
                raise RuntimeError("no memory cgroup is mounted (v1 or v2), so no limit can be enforced")
            self.path.mkdir()
            if limit_bytes is not None:
                (self.path / knob).write_text(str(limit_bytes))
        except OSError as error:
            raise RuntimeError(f"no memory cgroup can be made ({error}); run as root") from None

    def enter(self) -> None:
        """Put the calling process into the group (for preexec_fn)."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def pids(self) -> list[int]:
        return [int(line) for line in (self.path / "cgroup.procs").read_text().split()]

    def oom_kills(self) -> int:
        for line in (self.path / self._events).read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == "oom_kill":
                return int(value)
        return 0

    def remove(self) -> None:
        for _ in range(100):
            for pid in self.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(OSError):
                self.path.rmdir()
                return
            time.sleep(0.05)


def _cgroup2_mount() -> Path | None:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    return None


@dataclasses.dataclass
class _Status:
    parent: int = 0
    held: int = 0
    mapped: int = 0


def _status(pid: int) -> _Status:
    found = _Status()
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            key, _, value = line.partition(":")
            if key in _FIELDS:
                found.held += int(value.split()[0]) * 1024
            elif key == "RssFile":
                found.mapped += int(value.split()[0]) * 1024
            elif key == "PPid":
                found.parent = int(value)
    return found


def _command_line(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _held_and_mapped(pids: list[int]) -> tuple[int, int]:
    """Sums over processes. Between fork and exec a child's pages are its parent's, and they are counted once: a compiler that
    a process with 3 GB calls is no second 3 GB. Nor are the pages of the process that measures, which are those of the
    command until its exec. (A worker that a process forks to keep is not told from that; there are none here.)
    """
    # first: a child that calls exec meanwhile counts as a fork
    commands = {pid: _command_line(pid) for pid in [*pids, os.getpid()]}
    found = {pid: _status(pid) for pid in pids}
    for pid, one in list(found.items()):
        if one.parent in commands and one.held > 2**24 and commands[pid] == commands[one.parent]:
            del found[pid]
    return sum(one.held for one in found.values()), sum(one.mapped for one in found.values())


def _read_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/io").read_text().splitlines():
            if line.startswith("read_bytes"):
                return int(line.split()[1])
    return 0


@contextlib.contextmanager
def _sampling(group: Cgroup) -> Iterator[dict[str, Any]]:
    found: dict[str, Any] = {"peak": 0, "mapped": 0, "gap": 0.0, "since": 0.0, "read": {}}
    done = threading.Event()

    def sample() -> None:
        with contextlib.suppress(OSError):  # ahead of what it watches, or it would wait for a turn like everyone else
            os.sched_setscheduler(threading.get_native_id(), os.SCHED_FIFO, os.sched_param(1))
        last, turn = time.perf_counter(), 0
        while not done.is_set():
            pids = group.pids()
            held, mapped = _held_and_mapped(pids)
            if turn % 20 == 0:
                found["read"].update({pid: _read_bytes(pid) or found["read"].get(pid, 0) for pid in pids})
            found["peak"], found["mapped"] = max(found["peak"], held), max(found["mapped"], mapped)
            turn += 1
            time.sleep(INTERVAL_SECONDS)
            now = time.perf_counter()
            if found["since"]:
                found["gap"] = max(found["gap"], now - max(last, found["since"]))
            last = now

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def measured(
    command: list[str], limit_bytes: int | None = None, *, stdout: IO[Any] | int | None = None, **popen: Any
) -> Measured:
    """Run ``command`` under a limit (None: watched only) and return what it held.

    Raises:
        RuntimeError: there is no memory cgroup to use.
    """
    group = Cgroup(limit_bytes)
    try:
        with _sampling(group) as found:
            began = time.perf_counter()
            process = subprocess.Popen(command, preexec_fn=group.enter, stdout=stdout, **popen)
            found["since"] = time.perf_counter()  # the fork itself held the sampler up; nothing of the command had run
            returncode = process.wait()
            seconds = time.perf_counter() - began
        kills = group.oom_kills()
    finally:
        group.remove()
    return Measured(
        command, returncode, seconds, found["peak"], found["mapped"], found["gap"], limit_bytes, kills > 0,
        sum(found["read"].values()),
    )  # fmt: skip


def parse_bytes(text: str) -> int:
    """ "2.5GB" → 2500000000; plain numbers are bytes; KiB, MiB, GiB are powers of 1024."""
    for suffix, factor in (("KiB", 2**10), ("MiB", 2**20), ("GiB", 2**30), ("KB", 10**3), ("MB", 10**6), ("GB", 10**9)):
        if text.endswith(suffix):
            return int(float(text.removesuffix(suffix)) * factor)
    return int(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=parse_bytes, metavar="BYTES", help="memory limit, such as 2.5GB or 6GiB")
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    result = measured(args.command, args.limit)
    print(json.dumps(result.to_dict(), indent=1), file=sys.stderr)
    sys.exit(result.returncode)
