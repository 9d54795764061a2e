"""docs/slurm.sh under a real Slurm: its controller and two node daemons, each in a network namespace of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.nodes import Node, two_nodes, until
from tests.distributed.ranks import ROOT, clean_environment

pytestmark = pytest.mark.matrix
LIMIT_SECONDS = 420  # a requeued job waits two minutes for its node

_CONF = """ClusterName=qvera
SlurmctldHost=node0
AuthInfo=socket={place}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool-%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
ReturnToService=2
MpiDefault=none
SlurmdParameters=config_overrides
NodeName=node0 NodeAddr=10.77.0.1 CPUs=1 State=UNKNOWN
NodeName=node1 NodeAddr=10.77.0.2 CPUs=1 State=UNKNOWN
PartitionName=all Nodes=node0,node1 Default=YES MaxTime=INFINITE State=UP
"""
_DAEMONS = ("munged", "slurmctld", "slurmd")


class Cluster:
    """Two nodes under Slurm. ``tell`` runs one of its commands on the first."""

    def __init__(self, first: Node, place: Path) -> None:
        self.first, self.place = first, place
        self.environment = {"SLURM_CONF": str(place / "slurm.conf"), "QVERA_CACHE": os.environ["QVERA_CACHE"]}
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # for `qvera`

    def tell(self, *command: str) -> str:
        environment = clean_environment() | self.environment
        asked = self.first.command(list(command))
        return subprocess.run(
            asked, env=environment, cwd=self.place, capture_output=True, text=True, timeout=60
        ).stdout.strip()

    def state(self, job: str) -> str:
        return dict(
            word.split("=", 1) for word in self.tell("scontrol", "show", "job", job).split() if "=" in word
        ).get("JobState", "gone")

    def until(self, ready: Callable[[], bool], what: str) -> None:
        try:
            until(ready, LIMIT_SECONDS, what)
        except AssertionError as error:
            logs = (f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted(self.place.glob("*.log")))
            raise AssertionError("\n".join([str(error), self.tell("sinfo"), *logs])) from None


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    search = f"/usr/sbin:{os.environ['PATH']}"
    for tool in (*_DAEMONS, "sbatch", "srun", "scontrol"):
        if shutil.which(tool, path=search) is None:
            pytest.skip(f"no {tool} here (Debian and Ubuntu: slurmctld slurmd slurm-client munge)")
    place = tmp_path_factory.mktemp("slurm")
    (place / "slurm.conf").write_text(_CONF.format(place=place))
    (place / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
    key = place / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    for name in ("state", "spool-node0", "spool-node1"):
        (place / name).mkdir()
    with two_nodes() as nodes:
        cluster = Cluster(nodes[0], place)

        started = []

        def run(number: int, name: str, *arguments: str) -> None:
            command = [str(shutil.which(name, path=search)), *arguments]
            started.append(nodes[number].start(command, place / f"{name}-{number}.log", **cluster.environment))

        try:
            files = {"socket": "socket", "pid-file": "pid", "log-file": "txt", "seed-file": "seed"}
            named = [f"--{option}={place / f'munge.{end}'}" for option, end in files.items()]
            run(0, "munged", "--foreground", "--force", f"--key-file={key}", *named)
            cluster.until((place / "munge.socket").exists, "munged answers")
            run(0, "slurmctld", "-D")
            for number in range(2):
                run(number, "slurmd", "-D", "-N", f"node{number}")
            cluster.until(lambda: cluster.tell("sinfo", "-h", "-o", "%D %T") == "2 idle", "both nodes are idle")
            yield cluster
        finally:
            for process in reversed(started):
                process.terminate()
                process.wait(30)


def submit(cluster: Cluster, recipe: Path, run: Path, *options: str) -> str:
    # this machine has no GPU that Slurm could give
    given = ["--parsable", "--gpus-per-node=0", f"--output={cluster.place / 'job-%j.log'}", *options]
    return cluster.tell("sbatch", *given, str(ROOT / "docs" / "slurm.sh"), str(recipe), str(run))


def hosts(run: Path) -> list[str]:
    return [rank["host"] for rank in json.loads((run / "run.json").read_text())["processes"]["ranks"]]


def test_a_job_on_two_nodes(cluster: Cluster, write_recipe: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(cluster, write_recipe(training={"max_steps": 2}), run)
    cluster.until(lambda: cluster.state(job) not in ("PENDING", "RUNNING", "COMPLETING"), "the job ends")
    said = (cluster.place / f"job-{job}.log").read_text()
    assert cluster.state(job) == "COMPLETED", said
    assert hosts(run) == ["node0", "node1"]
    assert "2 processes on 2 nodes (node0, node1)" in " ".join(said.split())


def test_a_preempted_job_saves_goes_back_into_the_queue_and_on_from_there(
    cluster: Cluster, write_recipe: Any, tmp_path: Path
) -> None:
    run, steps = tmp_path / "run", 400
    job = submit(cluster, write_recipe(training={"max_steps": steps, "save_steps": steps, "eval_steps": 0}), run)
    metrics = run / "metrics.jsonl"
    cluster.until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 20, "it trains")
    cluster.tell("scancel", "--signal=TERM", job)  # what --signal=TERM@120 sends: to the steps, not to the script
    cluster.until(lambda: any((run / "checkpoints").glob("step-*/manifest.json")), "it has saved")
    cluster.until(lambda: cluster.state(job) == "PENDING", "it is in the queue again")
    stopped = len([line for line in metrics.read_text().splitlines() if json.loads(line)["kind"] == "train"])
    assert 20 <= stopped < steps
    cluster.until(lambda: cluster.state(job) in ("COMPLETED", "FAILED"), "it ends")
    said = (cluster.place / f"job-{job}.log").read_text()
    assert cluster.state(job) == "COMPLETED" and f"Going on from step {stopped} of {steps}" in said, said
    assert hosts(run) == ["node0", "node1"]
