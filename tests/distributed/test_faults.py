"""A signal, a kill, a stop, a cut link: all ranks end within a stated time and say who is gone, or go on where it was asked for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from qvera.config.load import load_recipe
from qvera.training import checkpoint
from qvera.training.trainer import train
from tests.distributed.nodes import Node, two_nodes, until
from tests.distributed.ranks import clean_environment, free_port

pytestmark = pytest.mark.process

NOTICED_SECONDS = 30.0
"""What docs/multi-node.md promises for a rank or node that is gone."""
SAVED_SECONDS = 15.0
"""From SIGTERM to the end of all processes, where a step takes a fraction of a second."""
START_SECONDS = 150.0  # two imports of torch on two busy cores, several times over
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
DEEPSPEED = ["-m", "deepspeed.launcher.runner", "--hostfile", "hosts", "--no_ssh", "--node_rank", "0"]
DEEPSPEED += ["--master_addr", "127.0.0.1", "--master_port", "PORT", "--module"]


class Launched:
    """A launcher with two workers under it, and what they leave behind."""

    def __init__(self, front: list[str], recipe: Path, directory: Path) -> None:
        self.out, self.log, self.codes = directory / "out", directory / "launch.log", directory / "codes"
        self.codes.mkdir()
        (directory / "hosts").write_text("localhost slots=2\n")
        front = [str(free_port()) if part == "PORT" else part for part in front]
        env = clean_environment() | {"QVERA_EXIT_CODES": str(self.codes)}
        with open(self.log, "w") as handle:
            self.launcher = subprocess.Popen(
                [sys.executable, *front, *([] if "--module" in front else ["-m"]), "qvera", "train", str(recipe)],
                env=env, cwd=directory, stdout=handle, stderr=handle, start_new_session=True,
            )  # fmt: skip

    def steps(self) -> int:
        file = self.out / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)

    def wait_for_step(self, step: int) -> None:
        def there() -> bool:
            assert self.launcher.poll() is None, self.text()
            return self.steps() >= step

        until(there, START_SECONDS, f"step {step}\n{self.text()}")

    def worker(self, rank: int) -> int:
        """The process id of a rank."""
        for process in psutil.Process(self.launcher.pid).children(recursive=True):
            command = process.cmdline()
            if "qvera" in command and "train" in command and "runner" not in " ".join(command):
                environment = process.environ()
                if environment.get("RANK") == str(rank):
                    return process.pid
        raise AssertionError(f"no rank {rank}:\n{self.text()}")

    def text(self) -> str:
        return " ".join(self.log.read_text(errors="replace").split())[-6000:]

    def kill(self) -> None:
        family = [psutil.Process(self.launcher.pid)] if self.launcher.poll() is None else []
        family += family[0].children(recursive=True) if family else []
        for process in family:
            process.kill()
        self.launcher.wait(10)


@pytest.fixture
def launched(write_recipe: Any, tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    all_of_them: list[Launched] = []

    def start(front: list[str], **training: Any) -> Launched:
        out = str(tmp_path / "out")
        settings = {"max_steps": 4000, "save_steps": 5, "output_dir": out, **training}
        all_of_them.append(Launched(front, write_recipe(training=settings), tmp_path))
        return all_of_them[-1]

    yield start
    for one in all_of_them:
        one.kill()


def losses(out: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]


def all_saved(run: Launched) -> None:
    """Every rank left with 75, at one step, with a checkpoint of it that verifies."""
    assert {file.name: file.read_text() for file in run.codes.iterdir()} == {"0": "75", "1": "75"}, run.text()
    facts = json.loads((run.out / "run.json").read_text())
    step = facts["result"]["steps"]
    assert facts["status"] == "interrupted"
    assert losses(run.out)[-1][0] == step
    newest = checkpoint.newest(run.out / "checkpoints")
    assert newest is not None
    assert newest.number == step
    assert sorted(newest.files["random"]) == ["cpu", "cpu.1"]


def sigterm_stops_all(run: Launched, rank: int) -> None:
    run.wait_for_step(3)
    os.kill(run.worker(rank), signal.SIGTERM)
    seconds = until(lambda: run.launcher.poll() is not None, SAVED_SECONDS, f"the end after SIGTERM\n{run.text()}")
    assert seconds < SAVED_SECONDS
    assert f"Stopped by SIGTERM at rank {rank} on " in run.text()
    all_saved(run)


@pytest.mark.slow
def test_after_a_kill_torchrun_starts_again_from_the_last_checkpoint(launched: Any, tmp_path: Path) -> None:
    """--max-restarts: rank 0 is killed, both are started again without anyone saying --resume."""
    run = launched([*TORCHRUN, "--max-restarts", "1"], max_steps=40)
    run.wait_for_step(7)
    os.kill(run.worker(0), signal.SIGKILL)
    assert run.launcher.wait(START_SECONDS) == 0, run.text()
    assert "Going on from step" in run.text()
    assert "lost a peer in the middle of a step" in run.text()
    train(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "alone")
    mine, alone = losses(run.out), losses(tmp_path / "alone")
    assert [step for step, _ in mine] == list(range(1, 41))
    assert [loss for _, loss in mine] == pytest.approx([loss for _, loss in alone], rel=1e-3)
    assert json.loads((run.out / "run.json").read_text())["status"] == "done"


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("front", "rank"),
    [(TORCHRUN, 0), (TORCHRUN, 1), (DEEPSPEED, 0), (DEEPSPEED, 1)],
    ids=["torchrun-0", "torchrun-1", "deepspeed-0", "deepspeed-1"],
)
def test_sigterm_to_any_rank_stops_all_with_75(launched: Any, front: list[str], rank: int) -> None:
    run = launched(front)
    sigterm_stops_all(run, rank)
    if front is DEEPSPEED:  # torchrun answers 1 whatever its workers answered
        assert run.launcher.returncode == 75


@pytest.mark.matrix
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("front", [TORCHRUN, DEEPSPEED], ids=["torchrun", "deepspeed"])
def test_a_killed_worker_ends_its_launcher(launched: Any, front: list[str], rank: int) -> None:
    run = launched(front)
    run.wait_for_step(6)
    os.kill(run.worker(rank), signal.SIGKILL)
    until(lambda: run.launcher.poll() is not None, NOTICED_SECONDS, f"the end after a kill\n{run.text()}")
    assert run.launcher.returncode != 0
    newest = checkpoint.newest(run.out / "checkpoints")
    assert newest is not None
    assert newest.number >= 5


# Two nodes.


class Pair:
    """`qvera launch` on each of two nodes."""

    def __init__(self, nodes: tuple[Node, Node], recipe: Path, directory: Path, *more: str) -> None:
        self.nodes, self.recipe, self.directory, self.more = nodes, recipe, directory, more
        self.out, self.port = directory / "out", 29_500
        self.logs = [directory / "node0.log", directory / "node1.log"]
        self.launchers = [self.start(0), self.start(1)]

    def start(self, number: int) -> subprocess.Popen[bytes]:
        place = ["--gpus", "1", "--node-rank", str(number), "--nnodes", "2"]
        place += ["--rdzv", f"{self.nodes[0].address}:{self.port}"]
        command = [sys.executable, "-m", "qvera", "launch", str(self.recipe), *place, *self.more]
        return self.nodes[number].start(command, self.logs[number])

    def processes(self, number: int) -> dict[str, psutil.Process]:
        """On that node: ``launch`` is `qvera launch`, ``agent`` torchrun, ``worker`` the rank."""
        found = {}
        for process in self.nodes[number].processes():
            command = " ".join(process.cmdline())
            if "qvera launch" in command:
                found["launch"] = process
            elif "torch.distributed.run" in command:
                found["agent"] = process
            elif "qvera train" in command:
                found["worker"] = process
        return found

    def wait_for_step(self, step: int) -> None:
        file = self.out / "metrics.jsonl"

        def there() -> bool:
            assert all(launcher.poll() is None for launcher in self.launchers), self.text()
            lines = file.read_text().splitlines() if file.exists() else []
            return any(line.endswith("}") and json.loads(line)["step"] >= step for line in lines)

        until(there, START_SECONDS, f"step {step}\n{self.text()}")

    def said(self, number: int) -> str:
        return " ".join(self.logs[number].read_text(errors="replace").split())

    def text(self) -> str:
        return "\n".join(f"--- node {i}\n{self.said(i)[-4000:]}" for i in (0, 1))


@pytest.fixture
def pair(write_recipe: Any, tmp_path: Path) -> Iterator[Callable[..., Pair]]:
    with two_nodes() as nodes:

        def start(*more: str, **training: Any) -> Pair:
            out = str(tmp_path / "out")
            recipe = write_recipe(training={"max_steps": 4000, "save_steps": 5, "output_dir": out, **training})
            return Pair(nodes, recipe, tmp_path, *more)

        yield start


SILENT = "rank 1 on {node1} has been silent for 15 s"
NO_LAUNCHER = "the launcher that had started it was killed"
FAULTS: dict[str, tuple[Callable[[Pair], Any], dict[int, str]]] = {
    # what is done, and what each of the nodes that are left says
    "a worker of node 1 killed": (lambda p: p.processes(1)["worker"].kill(), {0: "rank 1 on {node1}"}),
    "a worker of node 1 stopped": (lambda p: p.processes(1)["worker"].suspend(), {0: SILENT}),
    "the agent of node 1 killed": (
        lambda p: p.processes(1)["agent"].kill(),
        {0: f"rank 1 on {{node1}} failed: {NO_LAUNCHER}", 1: NO_LAUNCHER},
    ),
    # it serves the store, so nobody can be told by whom it was lost: rank 1 says where the store was
    "the agent of node 0 killed": (
        lambda p: p.processes(0)["agent"].kill(),
        {0: NO_LAUNCHER, 1: "store at {address0}"},
    ),
    "node 0 down": (lambda p: p.nodes[0].kill(), {1: "store at {address0}"}),
    "node 1 down": (lambda p: p.nodes[1].kill(), {0: SILENT}),
    "the link cut": (lambda p: p.nodes[1].cut(), {0: SILENT, 1: "store at {address0}"}),
}


@pytest.mark.matrix
@pytest.mark.parametrize("fault", FAULTS)
def test_the_other_node_notices_within_30_seconds_and_says_who_is_gone(pair: Any, fault: str) -> None:
    run: Pair = pair()
    run.wait_for_step(6)
    hurt, wanted = FAULTS[fault]
    workers = {number: run.processes(number)["worker"] for number in wanted}
    hurt(run)
    began = time.monotonic()
    names = {"node1": run.nodes[1].name, "address0": run.nodes[0].address}
    for number, words in wanted.items():
        gone = lambda n=number: not workers[n].is_running() or workers[n].status() == psutil.STATUS_ZOMBIE  # noqa: E731
        until(gone, NOTICED_SECONDS - (time.monotonic() - began), f"rank {number}'s end\n{run.text()}")
        print(f"{fault}: rank {number} ended within {time.monotonic() - began:.1f} s")
        assert words.format(**names) in run.said(number), run.text()
    for number in wanted:
        if "agent" in fault and str(number) in fault.split("killed")[0]:
            continue  # its own launcher is what was killed
        code = run.launchers[number].wait(60)
        assert code not in (0, 75), run.text()
    newest = checkpoint.newest(run.out / "checkpoints")
    assert newest is not None
    assert newest.number >= 5


@pytest.mark.matrix
def test_a_node_that_comes_back_goes_on_from_the_last_checkpoint(pair: Any) -> None:
    run: Pair = pair("--max-restarts", "2", max_steps=200)
    run.wait_for_step(7)
    run.nodes[1].kill()
    until(lambda: f"rank 1 on {run.nodes[1].name}" in run.said(0), NOTICED_SECONDS, run.text())
    run.launchers[1] = run.start(1)
    assert [launcher.wait(START_SECONDS) for launcher in run.launchers] == [0, 0], run.text()
    assert "Going on from step" in run.said(0)
    assert [step for step, _ in losses(run.out)] == list(range(1, 201))
