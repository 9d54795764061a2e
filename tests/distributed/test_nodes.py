"""`qvera launch` over two nodes: network namespaces joined by a cable, with ssh and pdsh replaced by scripts that go there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.namespaces import Nodes, problem
from tests.distributed.ranks import clean_environment, free_port

pytestmark = pytest.mark.matrix
LIMIT_SECONDS = 240


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    missing = problem()
    if missing is not None:
        pytest.skip(missing)
    with Nodes() as made:
        yield made


def start(nodes: Nodes, number: int, command: list[str], directory: Path, log: str, **more: str) -> Any:
    with open(directory / log, "w") as handle:
        return subprocess.Popen(
            nodes.command(number, command), env=clean_environment() | more, cwd=directory, stdout=handle, stderr=handle
        )


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
def test_an_agent_on_each_node(nodes: Nodes, write_recipe: Any, tmp_path: Path, stage: str | None) -> None:
    recipe, out, port = write_recipe(training={"max_steps": 2}), tmp_path / "out", free_port()
    more = ["--set", f"training.output_dir={out}", *(["--set", f"deepspeed={stage}"] if stage else [])]
    processes = []
    for number in range(2):
        place = ["--gpus", "1", "--nnodes", "2", "--node-rank", str(number), "--rdzv", f"node0:{port}"]
        command = [sys.executable, "-m", "qvera", "launch", str(recipe), *place, *more]
        processes.append(start(nodes, number, command, tmp_path, f"node{number}.log"))
    assert wait(processes, tmp_path) == [0, 0]
    on_both_nodes(out, tmp_path / "node0.log", stage)


_SSH = """#!/bin/sh
# what DeepSpeed's launcher asks of ssh: whether a host is there, and its addresses
while [ "${1#-}" != "$1" ]; do case "$1" in -o|-p) shift 2;; *) shift;; esac; done
echo "ssh $*" >> CALLED
case "$1" in node0) echo 10.77.0.1;; node1) echo 10.77.0.2;; *) exit 255;; esac
"""
_PDSH = """#!PYTHON
# pdsh -S -f N -w HOST,HOST COMMAND: the command on each host, its %n the host's number, the worst exit code
import subprocess, sys
arguments = sys.argv[1:]
at = arguments.index("-w")
hosts, command = arguments[at + 1].split(","), " ".join(arguments[at + 2:])
open("CALLED", "a").write("pdsh " + ",".join(hosts) + "\\n")
names = NAMES
def there(number, host):
    command_there = command.replace("%n", str(number))
    shell = ["env", "-i", "PATH=/usr/bin:/bin", "HOME=/root", "bash", "-c", command_there]  # as ssh: nothing of ours
    named = f'hostname {host}; exec "$@"'
    return subprocess.Popen(["ip", "netns", "exec", names[host], "unshare", "--uts", "sh", "-c", named, "sh", *shell])
sys.exit(max(p.wait() for p in [there(number, host) for number, host in enumerate(hosts)]))
"""


def test_from_one_node_by_a_host_file(nodes: Nodes, write_recipe: Any, tmp_path: Path) -> None:
    recipe, out, tools = write_recipe(training={"max_steps": 2}), tmp_path / "out", tmp_path / "bin"
    (tmp_path / "hosts").write_text("node0 slots=1\nnode1 slots=1\n")
    tools.mkdir()
    names = {f"node{number}": name for number, name in enumerate(nodes.names)}
    for name, text in (("ssh", _SSH), ("pdsh", _PDSH)):
        text = text.replace("PYTHON", sys.executable).replace("NAMES", repr(names))
        (tools / name).write_text(text.replace("CALLED", str(tmp_path / "called")))
        (tools / name).chmod(0o755)
    command = [sys.executable, "-m", "qvera", "launch", str(recipe), "--hostfile", str(tmp_path / "hosts")]
    command += ["--set", f"training.output_dir={out}", "--set", "deepspeed=zero2"]
    path = f"{tools}:{os.environ['PATH']}"
    more = {"PATH": path, "QVERA_CACHE": os.environ["QVERA_CACHE"]}
    assert wait([start(nodes, 0, command, tmp_path, "launch.log", **more)], tmp_path) == [0]
    on_both_nodes(out, tmp_path / "launch.log", "zero2")
    called = (tmp_path / "called").read_text().splitlines()
    assert "pdsh node0,node1" in called
    assert any(line.startswith("ssh node0 hostname") for line in called)
    assert "deepspeed.launcher.runner --hostfile" in (tmp_path / "launch.log").read_text()
