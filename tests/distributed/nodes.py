"""Two nodes on this machine (`bench.namespaces`): commands start there, the cable can be cut, and a node can go down."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from bench.namespaces import DEVICE, Nodes, problem
from tests.distributed.ranks import clean_environment


class Node:
    """One of the two. ``address``: its own, which the other reaches."""

    def __init__(self, nodes: Nodes, number: int) -> None:
        self.nodes, self.number, self.name = nodes, number, f"node{number}"
        self.namespace, self.address = nodes.names[number], nodes.address(number)
        self.started: list[subprocess.Popen[bytes]] = []

    def command(self, command: list[str]) -> list[str]:
        """That command as it is started there."""
        return self.nodes.command(self.number, command)

    def start(self, command: list[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Start a command there, in a session of its own."""
        env = clean_environment() | {"GLOO_SOCKET_IFNAME": DEVICE} | environment
        with open(log, "w") as handle:
            process = subprocess.Popen(
                self.command(command), env=env, cwd=log.parent, stdout=handle, stderr=handle, start_new_session=True
            )
        self.started.append(process)
        return process

    def processes(self) -> list[psutil.Process]:
        """All processes in this namespace."""
        found = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True).stdout.split()
        return [psutil.Process(int(pid)) for pid in found if psutil.pid_exists(int(pid))]

    def cut(self) -> None:
        """Cut the link: no packet passes, and nobody is told."""
        subprocess.run(["ip", "-n", self.namespace, "link", "set", DEVICE, "down"], check=True)

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
    missing = problem()
    if missing is not None:
        pytest.skip(missing)
    with Nodes() as made:
        nodes = Node(made, 0), Node(made, 1)
        try:
            yield nodes
        finally:
            for node in nodes:
                with contextlib.suppress(Exception):
                    node.kill()


def until(ready: Callable[[], object], limit_seconds: float, said: Callable[[], str]) -> float:
    """Wait for ``ready()`` to be true; the seconds that it took, or an AssertionError with what was ``said``."""
    began = time.monotonic()
    while not ready():
        assert time.monotonic() - began < limit_seconds, f"not within {limit_seconds:.0f} s:\n{said()}"
        time.sleep(0.05)
    return time.monotonic() - began
