"""Two nodes on this machine: network namespaces with a link between them that can be cut, and a host name for each."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.distributed.ranks import clean_environment


class Node:
    """One of the two. ``address``: its own, which the other reaches."""

    def __init__(self, name: str, address: str, device: str) -> None:
        self.name, self.address, self.device = name, address, device
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, command: list[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Start a command there, in a session of its own."""
        inside = [
            "ip",
            "netns",
            "exec",
            self.name,
            "unshare",
            "--uts",
            "sh",
            "-c",
            'hostname "$0" && exec "$@"',
            self.name,
        ]
        env = clean_environment() | {"GLOO_SOCKET_IFNAME": self.device} | environment
        with open(log, "w") as handle:
            process = subprocess.Popen(
                [*inside, *command], env=env, cwd=log.parent, stdout=handle, stderr=handle, start_new_session=True
            )
        self.started.append(process)
        return process

    def processes(self) -> list[psutil.Process]:
        """All processes in this namespace."""
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True).stdout.split()
        return [psutil.Process(int(pid)) for pid in found if psutil.pid_exists(int(pid))]

    def cut(self) -> None:
        """Cut the link: no packet passes, and nobody is told."""
        subprocess.run(["ip", "-n", self.name, "link", "set", self.device, "down"], check=True)

    def kill(self) -> None:
        """The node goes down: SIGKILL to all of it."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        for child in self.started:
            child.wait(10)


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Made for the block and removed after it; the test is skipped, with the reason, where the right or a tool is missing."""
    for tool in ("ip", "unshare"):
        if shutil.which(tool) is None:
            pytest.skip(f"no `{tool}` command, so no second node on this machine")
    number = os.getpid() % 60_000
    nodes = [Node(f"qvera{number}-{i}", f"10.77.{number % 250}.{i + 1}", f"qv{number}-{i}") for i in (0, 1)]
    try:
        for node in nodes:
            made = subprocess.run(["ip", "netns", "add", node.name], capture_output=True, text=True)
            if made.returncode:
                pytest.skip(f"no network namespace can be made ({made.stderr.strip()}); run as root")
        first, second = nodes
        pair = ["ip", "link", "add", first.device, "netns", first.name, "type", "veth", "peer", "name", second.device]
        made = subprocess.run([*pair, "netns", second.name], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"no veth pair can be made ({made.stderr.strip()})")
        for node in nodes:
            run = ["ip", "-n", node.name]
            subprocess.run([*run, "addr", "add", f"{node.address}/24", "dev", node.device], check=True)
            subprocess.run([*run, "link", "set", node.device, "up"], check=True)
            subprocess.run([*run, "link", "set", "lo", "up"], check=True)
        yield first, second
    finally:
        for node in nodes:
            with contextlib.suppress(Exception):
                node.kill()
            subprocess.run(["ip", "netns", "delete", node.name], capture_output=True)


def until(ready: object, limit_seconds: float, what: str) -> float:
    """Wait for ``ready()`` to be true; the seconds that it took, or an AssertionError."""
    began = time.monotonic()
    while not ready():  # type: ignore[operator]
        assert time.monotonic() - began < limit_seconds, f"not within {limit_seconds:.0f} s: {what}"
        time.sleep(0.05)
    return time.monotonic() - began
