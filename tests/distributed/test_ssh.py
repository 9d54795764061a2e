"""`qvera launch --hostfile` by the real pdsh, ssh and sshd, between two network namespaces."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.namespaces import Nodes, problem
from tests.distributed.nodes import until
from tests.distributed.test_nodes import on_both_nodes, start, wait

pytestmark = pytest.mark.matrix

_SERVER = """Port 22
HostKey {keys}/host
AuthorizedKeysFile {keys}/user.pub
StrictModes no
PidFile {keys}/sshd-{number}.pid
PermitRootLogin yes
PasswordAuthentication no
UsePAM no
"""
_CLIENT = """Host node0 node1
  IdentityFile {keys}/user
  StrictHostKeyChecking no
  UserKnownHostsFile {keys}/known
  LogLevel ERROR
"""


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    """Two nodes, each with an sshd of its own; a client's configuration for both lies over /etc/ssh there."""
    for tool in ("pdsh", "ssh", "/usr/sbin/sshd", "ssh-keygen"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} here (Debian and Ubuntu: openssh-server, pdsh)")
    missing = problem()
    if missing is not None:
        pytest.skip(missing)
    keys = tmp_path / "keys"
    keys.mkdir(mode=0o700)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd's own, which its service would make
    servers = []
    with Nodes() as made:
        try:
            for number, name in enumerate(made.names):
                etc = Path("/etc/netns") / name / "ssh"
                etc.mkdir()
                (etc / "ssh_config").write_text(_CLIENT.format(keys=keys))
                config = keys / f"sshd-{number}.conf"
                config.write_text(_SERVER.format(keys=keys, number=number))
                # in the foreground: a session that it opens has the namespaces and the host name of its node
                command = ["/usr/sbin/sshd", "-D", "-e", "-f", str(config)]
                servers.append(start(made, number, command, tmp_path, f"sshd-{number}.txt"))
            for number in range(2):
                _until_it_answers(made, number, tmp_path)
            yield made
        finally:
            for server in servers:
                server.terminate()
                server.wait(10)


def _until_it_answers(nodes: Nodes, number: int, directory: Path) -> None:
    asked = nodes.command(0, ["ssh", f"node{number}", "hostname"])

    def answers() -> bool:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20)
        return done.stdout.strip() == f"node{number}"

    try:
        until(answers, 30, f"sshd on node{number} answers")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{(directory / f'sshd-{number}.txt').read_text()}") from None


def test_from_one_node_by_a_host_file(nodes: Nodes, write_recipe: Any, tmp_path: Path) -> None:
    recipe, out = write_recipe(training={"max_steps": 2}), tmp_path / "out"
    (tmp_path / "hosts").write_text("node0 slots=1\nnode1 slots=1\n")
    command = [sys.executable, "-m", "qvera", "launch", str(recipe), "--hostfile", str(tmp_path / "hosts")]
    command += ["--set", f"training.output_dir={out}", "--set", "deepspeed=zero2"]
    kept = {"QVERA_CACHE": os.environ["QVERA_CACHE"]}
    assert wait([start(nodes, 0, command, tmp_path, "launch.log", **kept)], tmp_path) == [0]
    on_both_nodes(out, tmp_path / "launch.log", "zero2")


def test_a_host_that_does_not_answer_is_named_and_nothing_starts(
    nodes: Nodes, write_recipe: Any, tmp_path: Path
) -> None:
    (tmp_path / "hosts").write_text("# the first is this one\nnode0 slots=1\nnode7 slots=1\n")
    command = [sys.executable, "-m", "qvera", "launch", str(write_recipe()), "--hostfile", str(tmp_path / "hosts")]
    began = time.monotonic()
    assert wait([start(nodes, 0, command, tmp_path, "launch.log")], tmp_path) == [2]
    said = (tmp_path / "launch.log").read_text()
    assert "hosts, line 3: node7 does not answer to ssh: ssh: Could not resolve hostname node7" in said
    assert "deepspeed.launcher" not in said
    assert time.monotonic() - began < 60
