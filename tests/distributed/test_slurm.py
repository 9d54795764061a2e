"""docs/slurm.sh under a real Slurm: its controller and two node daemons, each in a network namespace of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.nodes import Node, two_nodes, until
from tests.distributed.ranks import clean_environment
from tests.helpers import ROOT
from tests.training.runs import losses, run_json

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
_SEARCH = f"/usr/sbin:{os.environ['PATH']}"


class Cluster:
    """Two nodes under Slurm. ``tell`` runs one of its commands on the first."""

    def __init__(self, nodes: tuple[Node, Node], place: Path) -> None:
        self.nodes, self.place = nodes, place
        self.environment = {"SLURM_CONF": str(place / "slurm.conf"), "QVERA_CACHE": os.environ["QVERA_CACHE"]}
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # for `qvera`

    def daemon(self, number: int, name: str, *arguments: str) -> None:
        command = [str(shutil.which(name, path=_SEARCH)), *arguments]
        self.nodes[number].start(command, self.place / f"{name}-{number}.log", **self.environment)

    def tell(self, *command: str) -> str:
        asked, environment = self.nodes[0].command(list(command)), clean_environment() | self.environment
        options: dict[str, Any] = {"env": environment, "cwd": self.place, "timeout": 60}
        return subprocess.run(asked, capture_output=True, text=True, **options).stdout.strip()

    def submit(self, recipe: Path, run: Path) -> str:
        # this machine has no GPU that Slurm could give
        given = ["--parsable", "--gpus-per-node=0", f"--output={self.place / 'job-%j.log'}"]
        return self.tell("sbatch", *given, str(ROOT / "docs" / "slurm.sh"), str(recipe), str(run))

    def state(self, job: str) -> str:
        words = self.tell("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word).get("JobState", "gone")

    def until(self, ready: Callable[[], bool]) -> None:
        until(ready, LIMIT_SECONDS, self.logs)

    def logs(self) -> str:
        logs = (f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted(self.place.glob("*.log")))
        return "\n".join([self.tell("sinfo"), *logs])

    def until_completed(self, job: str, run: Path) -> str:
        """What the job, which ran on both nodes, said."""
        self.until(lambda: self.state(job) in ("COMPLETED", "FAILED"))
        said = " ".join((self.place / f"job-{job}.log").read_text().split())
        assert self.state(job) == "COMPLETED", said
        assert [rank["host"] for rank in run_json(run)["processes"]["ranks"]] == ["node0", "node1"]
        return said


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    for tool in ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol"):
        if shutil.which(tool, path=_SEARCH) is None:
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
        cluster = Cluster(nodes, place)
        try:
            files = {"socket": "socket", "pid-file": "pid", "log-file": "txt", "seed-file": "seed"}
            named = [f"--{option}={place / f'munge.{end}'}" for option, end in files.items()]
            cluster.daemon(0, "munged", "--foreground", "--force", f"--key-file={key}", *named)
            cluster.until((place / "munge.socket").exists)
            cluster.daemon(0, "slurmctld", "-D")
            for number in range(2):
                cluster.daemon(number, "slurmd", "-D", "-N", f"node{number}")
            cluster.until(lambda: cluster.tell("sinfo", "-h", "-o", "%D %T") == "2 idle")
            yield cluster
        finally:
            for process in [*nodes[1].started, *reversed(nodes[0].started)]:
                process.terminate()
                process.wait(30)


def test_a_preempted_job_saves_goes_back_into_the_queue_and_on_from_there(
    cluster: Cluster, write_recipe: Any, tmp_path: Path
) -> None:
    run, steps = tmp_path / "run", 400
    job = cluster.submit(write_recipe(training={"max_steps": steps, "save_steps": steps, "eval_steps": 0}), run)
    metrics = run / "metrics.jsonl"
    cluster.until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 20)
    cluster.tell("scancel", "--signal=TERM", job)  # what --signal=TERM@120 sends: to the steps, not to the script
    cluster.until(lambda: any((run / "checkpoints").glob("step-*/manifest.json")))
    cluster.until(lambda: cluster.state(job) == "PENDING")  # it is in the queue again
    stopped = len(losses(run))
    assert 20 <= stopped < steps
    said = cluster.until_completed(job, run)
    assert "2 processes on 2 nodes (node0, node1)" in said
    assert f"Going on from step {stopped} of {steps}" in said
