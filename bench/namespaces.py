"""Two machines and a cable, on one machine: network namespaces joined by a veth pair, each with a host name of its own.

For the bench of bandwidth and the tests of launching on nodes. Needs root, iproute2 and veth; `problem` says what is
missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

_ETC = Path("/etc/netns")
DEVICE = "eth0"
"""The cable's end in each node."""


def problem() -> str | None:
    """Why there can be no such nodes here; None where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "tc", "unshare"):
        if shutil.which(tool) is None:
            return f"network namespaces need {tool}, which is not installed"
    name = f"qvera-probe-{os.getpid()}"
    try:
        _ip("netns", "add", name)
        try:
            _ip("link", "add", "dev", "probe", "netns", name, "type", "veth", "peer", "name", "other")
        finally:
            _ip("netns", "delete", name)
    except RuntimeError as error:
        return f"no network namespaces with veth here: {error}"
    return None


class Nodes:
    """For the time of a with-block two nodes, ``node0`` at 10.77.0.1 and ``node1`` at 10.77.0.2, that know each other by name."""

    def __init__(self) -> None:
        self.names = [f"qvera-{os.getpid()}-{number}" for number in range(2)]

    def __enter__(self) -> Nodes:
        try:
            for name in self.names:
                _ip("netns", "add", name)
                etc = _ETC / name  # what `ip netns exec` lays over /etc
                etc.mkdir(parents=True)
                known = "".join(f"{self.address(number)} node{number}\n" for number in range(2))
                (etc / "hosts").write_text(f"127.0.0.1 localhost\n{known}")
            one, other = self.names
            _ip("link", "add", DEVICE, "netns", one, "type", "veth", "peer", "name", DEVICE, "netns", other)
            for number, name in enumerate(self.names):
                _ip("-n", name, "address", "add", f"{self.address(number)}/24", "dev", DEVICE)
                for device in ("lo", DEVICE):
                    _ip("-n", name, "link", "set", device, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
            shutil.rmtree(_ETC / name, ignore_errors=True)
        if _ETC.is_dir() and not any(_ETC.iterdir()):
            _ETC.rmdir()

    @staticmethod
    def address(number: int) -> str:
        return f"10.77.0.{number + 1}"

    def command(self, number: int, command: list[str]) -> list[str]:
        """That command as it is started on a node, under its host name."""
        named = f'hostname node{number}; exec "$@"'
        return ["ip", "netns", "exec", self.names[number], "unshare", "--uts", "sh", "-c", named, "sh", *command]

    def limit(self, rate: str | None) -> None:
        """Let each node send at most ``rate`` (as tc writes it: ``1gbit``); None: as fast as the machine can."""
        for name in self.names:
            tc = ["tc", "-n", name, "qdisc"]
            subprocess.run([*tc, "del", "dev", DEVICE, "root"], capture_output=True)
            if rate is not None:
                how = ["tbf", "rate", rate, "burst", "1mb", "latency", "50ms"]
                _run([*tc, "add", "dev", DEVICE, "root", *how])

    def delay_problem(self) -> str | None:
        """Why packets can't be delayed here (`tc` netem); None where they can."""
        tc = ["tc", "-n", self.names[0], "qdisc"]
        try:
            _run([*tc, "add", "dev", DEVICE, "root", "netem", "delay", "1ms"])
        except RuntimeError as error:
            return f"netem: {error}"
        _run([*tc, "del", "dev", DEVICE, "root"])
        return None

    def received_bytes(self, number: int) -> int:
        """Bytes that have come to a node over the cable, headers included."""
        path = f"/sys/class/net/{DEVICE}/statistics/rx_bytes"
        return int(_run(["ip", "netns", "exec", self.names[number], "cat", path]))


def _ip(*arguments: str) -> str:
    return _run(["ip", *arguments])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise RuntimeError(f"{' '.join(command)}: {said[0] if said else done.returncode}")
    return done.stdout
