"""`qvera launch` over two nodes from one of them, by a host file, with the real pdsh, ssh and sshd. (An agent on each:
`test_faults.py`.)
"""

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

from tests.distributed.nodes import Node, two_nodes, until
from tests.training.runs import run_json

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
def by_ssh(tmp_path: Path) -> Iterator[Node]:
    """The first of two nodes, each with an sshd; a client's configuration for both lies over /etc/ssh there."""
    for tool in ("pdsh", "ssh", "/usr/sbin/sshd", "ssh-keygen"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} here (Debian and Ubuntu: openssh-server, pdsh)")
    keys = tmp_path / "keys"
    keys.mkdir(mode=0o700)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd's own, which its service would make
    with two_nodes() as nodes:
        for node in nodes:
            etc = Path("/etc/netns") / node.namespace / "ssh"
            etc.mkdir()
            (etc / "ssh_config").write_text(_CLIENT.format(keys=keys))
            config, log = keys / f"sshd-{node.number}.conf", tmp_path / f"sshd-{node.number}.txt"
            config.write_text(_SERVER.format(keys=keys, number=node.number))
            # in the foreground: a session that it opens has the namespaces and the host name of its node
            node.start(["/usr/sbin/sshd", "-D", "-e", "-f", str(config)], log)
            asked = nodes[0].command(["ssh", node.name, "hostname"])

            def answers(asked: list[str] = asked, name: str = node.name) -> bool:
                done = subprocess.run(asked, capture_output=True, text=True, timeout=20)
                return done.stdout.strip() == name

            until(answers, 30, log.read_text)
        yield nodes[0]


def launch(node: Node, directory: Path, recipe: Path, hosts: str, *more: str) -> tuple[int, str]:
    """The exit code of `qvera launch` there, and what it said."""
    hostfile, log = directory / "hosts", directory / "launch.log"
    hostfile.write_text(hosts)
    command = [sys.executable, "-m", "qvera", "launch", str(recipe), "--hostfile", str(hostfile), *more]
    process = node.start(command, log, QVERA_CACHE=os.environ["QVERA_CACHE"])
    return process.wait(240), " ".join(log.read_text().split())


def test_from_one_node_by_a_host_file(by_ssh: Node, write_recipe: Any, tmp_path: Path) -> None:
    recipe, out = write_recipe(training={"max_steps": 2}), tmp_path / "out"
    more = ["--set", f"training.output_dir={out}", "--set", "deepspeed=zero3"]
    code, said = launch(by_ssh, tmp_path, recipe, "node0 slots=1\nnode1 slots=1\n", *more)
    assert code == 0, said[-4000:]
    run = run_json(out)
    assert run["status"] == "done"
    assert run["processes"]["deepspeed"] == "zero3"
    assert [rank["host"] for rank in run["processes"]["ranks"]] == ["node0", "node1"]
    assert run["plan"]["processes"]["nodes"] == 2
    assert "2 processes on 2 nodes (node0, node1) with the same versions, recipe and base model" in said
    assert "Plan: peak of each of 2 ranks" in said
    assert "deepspeed.launcher.runner --hostfile" in said


def test_a_host_that_does_not_answer_is_named_and_nothing_starts(
    by_ssh: Node, write_recipe: Any, tmp_path: Path
) -> None:
    began = time.monotonic()
    hosts = "# the first is this one\nnode0 slots=1\nnode7 slots=1\n"
    code, said = launch(by_ssh, tmp_path, write_recipe(), hosts)
    assert code == 2, said[-4000:]
    assert "hosts, line 3: node7 does not answer to ssh: ssh: Could not resolve hostname node7" in said
    assert "deepspeed.launcher" not in said
    assert time.monotonic() - began < 60
