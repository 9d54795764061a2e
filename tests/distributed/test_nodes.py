"""`qvera launch` over two nodes: an agent on each, and from one of them by a host file, with the real pdsh, ssh and sshd."""

from __future__ import annotations

import json
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
from tests.distributed.ranks import free_port

pytestmark = pytest.mark.matrix
LIMIT_SECONDS = 240

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


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[Node, Node]]:
    with two_nodes() as made:
        yield made


def wait(processes: list[Any], directory: Path) -> list[int]:
    try:
        return [process.wait(LIMIT_SECONDS) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
        for log in sorted(directory.glob("*.log")):
            print(f"--- {log.name}\n{log.read_text()[-4000:]}")


def on_both_nodes(out: Path, log: Path, stage: str | None) -> None:
    run = json.loads((out / "run.json").read_text())
    assert run["status"] == "done"
    assert run["processes"]["deepspeed"] == stage
    assert [rank["host"] for rank in run["processes"]["ranks"]] == ["node0", "node1"]
    said = " ".join(log.read_text().split())
    assert "2 processes on 2 nodes (node0, node1) with the same versions, recipe and base model" in said
    assert run["plan"]["processes"]["nodes"] == 2
    assert "Plan: peak of each of 2 ranks" in said


@pytest.mark.parametrize("stage", [None, "zero3"])
def test_an_agent_on_each_node(nodes: tuple[Node, Node], write_recipe: Any, tmp_path: Path, stage: str | None) -> None:
    recipe, out, port = write_recipe(training={"max_steps": 2}), tmp_path / "out", free_port()
    more = ["--set", f"training.output_dir={out}", *(["--set", f"deepspeed={stage}"] if stage else [])]
    processes = []
    for node in nodes:
        place = ["--gpus", "1", "--nnodes", "2", "--node-rank", str(node.number), "--rdzv", f"node0:{port}"]
        command = [sys.executable, "-m", "qvera", "launch", str(recipe), *place, *more]
        processes.append(node.start(command, tmp_path / f"{node.name}.log"))
    assert wait(processes, tmp_path) == [0, 0]
    on_both_nodes(out, tmp_path / "node0.log", stage)


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

            until(answers, 30, f"sshd on {node.name} answers (its log: {log})")
        yield nodes[0]


def test_from_one_node_by_a_host_file(by_ssh: Node, write_recipe: Any, tmp_path: Path) -> None:
    recipe, out = write_recipe(training={"max_steps": 2}), tmp_path / "out"
    (tmp_path / "hosts").write_text("node0 slots=1\nnode1 slots=1\n")
    command = [sys.executable, "-m", "qvera", "launch", str(recipe), "--hostfile", str(tmp_path / "hosts")]
    command += ["--set", f"training.output_dir={out}", "--set", "deepspeed=zero2"]
    process = by_ssh.start(command, tmp_path / "launch.log", QVERA_CACHE=os.environ["QVERA_CACHE"])
    assert wait([process], tmp_path) == [0]
    on_both_nodes(out, tmp_path / "launch.log", "zero2")
    assert "deepspeed.launcher.runner --hostfile" in (tmp_path / "launch.log").read_text()


def test_a_host_that_does_not_answer_is_named_and_nothing_starts(
    by_ssh: Node, write_recipe: Any, tmp_path: Path
) -> None:
    (tmp_path / "hosts").write_text("# the first is this one\nnode0 slots=1\nnode7 slots=1\n")
    command = [sys.executable, "-m", "qvera", "launch", str(write_recipe()), "--hostfile", str(tmp_path / "hosts")]
    began = time.monotonic()
    assert wait([by_ssh.start(command, tmp_path / "launch.log")], tmp_path) == [2]
    said = (tmp_path / "launch.log").read_text()
    assert "hosts, line 3: node7 does not answer to ssh: ssh: Could not resolve hostname node7" in said
    assert "deepspeed.launcher" not in said
    assert time.monotonic() - began < 60
