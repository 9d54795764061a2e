"""A signal, a kill, a stop, a cut link, a full disk: all ranks end within a stated time and say what is gone, or go on."""

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

from qvera.config.schema import load_recipe
from qvera.training import checkpoint
from qvera.training.trainer import train
from tests.disk import fill, read_only, small_disk
from tests.distributed.nodes import Node, two_nodes, until
from tests.distributed.ranks import clean_environment, free_port, run_worker
from tests.distributed.runs import BARE, TinyRuns
from tests.training.runs import losses, run_json

pytestmark = pytest.mark.process

NOTICED_SECONDS = 30.0
"""What docs/multi-node.md promises for a rank or node that is gone."""
SAVED_SECONDS = 15.0
"""From SIGTERM to the end of all processes, where a step takes a fraction of a second."""
START_SECONDS = 150.0  # two imports of torch on two busy cores, several times over
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
DEEPSPEED = ["-m", "deepspeed.launcher.runner", "--hostfile", "hosts", "--no_ssh", "--node_rank", "0"]
DEEPSPEED += ["--master_addr", "127.0.0.1", "--master_port", "PORT", "--module"]


class Watched:
    """Launchers with two workers under them: what they say, and how far the run is."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.out = directory, directory / "out"
        self.launchers: list[subprocess.Popen[bytes]] = []
        self.logs: list[Path] = []

    def steps(self) -> list[int]:
        file = self.out / "metrics.jsonl"
        lines = [line for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []
        return [record["step"] for record in map(json.loads, lines) if record["kind"] == "train"]

    def wait_for_step(self, step: int) -> None:
        def there() -> bool:
            assert all(launcher.poll() is None for launcher in self.launchers), self.text()
            return step in self.steps()

        until(there, START_SECONDS, self.text)

    def said(self, number: int) -> str:
        return " ".join(self.logs[number].read_text(errors="replace").split())

    def text(self) -> str:
        return "\n".join(f"--- {log.name}\n{self.said(i)[-5000:]}" for i, log in enumerate(self.logs))

    def saved(self) -> checkpoint.Checkpoint:
        newest = checkpoint.newest(self.out / "checkpoints")
        assert newest is not None, self.text()
        return newest


class Launched(Watched):
    """One launcher of both."""

    def __init__(self, front: list[str], recipe: Path, directory: Path) -> None:
        super().__init__(directory)
        self.codes, self.logs = directory / "codes", [directory / "launch.log"]
        self.codes.mkdir()
        (directory / "hosts").write_text("localhost slots=2\n")
        front = [str(free_port()) if part == "PORT" else part for part in front]
        command = [sys.executable, *front, *([] if "--module" in front else ["-m"]), "qvera", "train", str(recipe)]
        env = clean_environment() | {"QVERA_EXIT_CODES": str(self.codes)}
        with open(self.logs[0], "w") as log:
            process = subprocess.Popen(command, env=env, cwd=directory, stdout=log, stderr=log, start_new_session=True)
        self.launchers.append(process)

    def worker(self, rank: int) -> int:
        """The process id of a rank."""
        for process in psutil.Process(self.launchers[0].pid).children(recursive=True):
            command = process.cmdline()
            if "qvera" in command and "runner" not in " ".join(command) and process.environ().get("RANK") == str(rank):
                return process.pid
        raise AssertionError(f"no rank {rank}:\n{self.text()}")

    def end(self, limit_seconds: float) -> int | None:
        """Wait for the launcher's end; its exit code."""
        until(lambda: self.launchers[0].poll() is not None, limit_seconds, self.text)
        return self.launchers[0].returncode

    def kill(self) -> None:
        family = [psutil.Process(self.launchers[0].pid)] if self.launchers[0].poll() is None else []
        for process in [*family, *(child for one in family for child in one.children(recursive=True))]:
            process.kill()
        self.launchers[0].wait(10)


@pytest.fixture
def launched(write_recipe: Any, tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    all_of_them: list[Launched] = []

    def start(front: list[str], **training: Any) -> Launched:
        settings = {"max_steps": 4000, "save_steps": 5, "output_dir": str(tmp_path / "out"), "sample_count": 0}
        all_of_them.append(Launched(front, write_recipe(training={**settings, **training}), tmp_path))
        return all_of_them[-1]

    yield start
    for one in all_of_them:
        one.kill()


@pytest.mark.slow
def test_after_a_kill_torchrun_starts_again_from_the_last_checkpoint(launched: Any, tmp_path: Path) -> None:
    """--max-restarts: rank 0 is killed, both are started again without anyone saying --resume."""
    run = launched([*TORCHRUN, "--max-restarts", "1"], max_steps=30)
    run.wait_for_step(6)
    launcher = psutil.Process(run.launchers[0].pid)
    launcher.suspend()  # else it may end rank 1 before that has said a word
    os.kill(run.worker(0), signal.SIGKILL)
    until(lambda: "lost a peer in the middle of a step" in run.text(), NOTICED_SECONDS, run.text)
    launcher.resume()
    assert run.end(START_SECONDS) == 0, run.text()
    assert "Going on from step" in run.text()
    train(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "alone")
    assert run.steps() == list(range(1, 31))
    assert losses(run.out) == pytest.approx(losses(tmp_path / "alone"), rel=1e-3)
    assert run_json(run.out)["status"] == "done"
    assert run_json(run.out)["processes"]["count"] == 2


@pytest.mark.slow
def test_a_full_disk_and_a_read_only_one_end_all_ranks_alike(tmp_path: Path, tiny_rows: Path) -> None:
    place = TinyRuns(tmp_path, tiny_rows)
    recipe = place.recipe(save_steps=1, max_steps=2, **BARE)
    place.alone("whole", recipe)
    with small_disk(tmp_path / "disk", 4 << 20) as disk:

        def attempt(name: str, **more: Any) -> list[dict[str, Any]]:
            task = {"name": "run", "recipe": recipe, "run_dir": str(disk / "run"), "fails": True, **more}
            return [rank["run"] for rank in run_worker([task], 2, tmp_path / name, limit_seconds=120)]

        filler = fill(disk, leave_bytes=40_000)  # the run's first files, and no checkpoint
        for rank in attempt("full"):
            assert (rank["error"], rank["exit_code"]) == ("RunFailed", 1)
            assert "the disk is full" in rank["text"]
        filler.unlink()
        with read_only(disk):
            for rank in attempt("read-only", resume=True):
                assert rank["error"] == "InputError"
                assert "nothing can be written in" in rank["text"]
        assert [rank["error"] for rank in attempt("again", resume=True)] == [None, None]
        assert losses(disk / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


EITHER_LAUNCHER = pytest.mark.parametrize("front", [TORCHRUN, DEEPSPEED], ids=["torchrun", "deepspeed"])


@pytest.mark.matrix
@pytest.mark.parametrize("rank", [0, 1])
@EITHER_LAUNCHER
def test_sigterm_to_any_rank_stops_all_with_75(launched: Any, front: list[str], rank: int) -> None:
    """Every rank leaves with 75, at one step, with a checkpoint of it that verifies."""
    run = launched(front)
    run.wait_for_step(3)
    os.kill(run.worker(rank), signal.SIGTERM)
    code = run.end(SAVED_SECONDS)
    assert front is TORCHRUN or code == 75  # torchrun answers 1 whatever its workers answered
    assert f"Stopped by SIGTERM at rank {rank} on " in run.text()
    assert {file.name: file.read_text() for file in run.codes.iterdir()} == {"0": "75", "1": "75"}, run.text()
    assert run_json(run.out)["status"] == "interrupted"
    assert run_json(run.out)["result"]["steps"] == run.steps()[-1] == run.saved().number
    assert sorted(run.saved().files["random"]) == ["cpu", "cpu.1"]


@pytest.mark.matrix
@pytest.mark.parametrize("rank", [0, 1])
@EITHER_LAUNCHER
def test_a_killed_worker_ends_its_launcher(launched: Any, front: list[str], rank: int) -> None:
    run = launched(front)
    run.wait_for_step(6)
    os.kill(run.worker(rank), signal.SIGKILL)
    assert run.end(NOTICED_SECONDS) != 0
    assert run.saved().number >= 5


class Pair(Watched):
    """`qvera launch` on each of two nodes."""

    def __init__(self, nodes: tuple[Node, Node], recipe: Path, directory: Path, *more: str) -> None:
        super().__init__(directory)
        self.nodes, self.recipe, self.more = nodes, recipe, more
        self.logs = [directory / "node0.log", directory / "node1.log"]
        self.launchers = [self.start(0), self.start(1)]

    def start(self, number: int) -> subprocess.Popen[bytes]:
        place = ["--gpus", "1", "--node-rank", str(number), "--nnodes", "2", "--rdzv", f"{self.nodes[0].address}:29500"]
        command = [sys.executable, "-m", "qvera", "launch", str(self.recipe), *place, *self.more]
        return self.nodes[number].start(command, self.logs[number])

    def process(self, number: int, what: str) -> psutil.Process:
        """On that node, torchrun ("agent") or the rank ("worker")."""
        words = {"agent": "torch.distributed.run", "worker": "-u -m qvera train"}[what]
        return next(one for one in self.nodes[number].processes() if words in " ".join(one.cmdline()))


@pytest.fixture
def pair(write_recipe: Any, tmp_path: Path) -> Iterator[Callable[..., Pair]]:
    with two_nodes() as nodes:

        def start(*more: str, **training: Any) -> Pair:
            settings = {"max_steps": 4000, "save_steps": 5, "output_dir": str(tmp_path / "out"), **training}
            return Pair(nodes, write_recipe(training=settings), tmp_path, *more)

        yield start


SILENT = "rank 1 on {node1} has been silent for 15 s"
NO_STORE = "store at {address0}"  # it was there, so nobody can be told by whom it was lost
NO_LAUNCHER = "the launcher that had started it was killed"
FAULTS: dict[str, tuple[Callable[[Pair], Any], dict[int, str]]] = {
    # what is done, and what each of the nodes that are left says
    "a worker of node 1 killed": (lambda p: p.process(1, "worker").kill(), {0: "rank 1 on {node1}"}),
    "a worker of node 1 stopped": (lambda p: p.process(1, "worker").suspend(), {0: SILENT}),
    "the agent of node 1 killed": (
        lambda p: p.process(1, "agent").kill(), {0: f"rank 1 on {{node1}} failed: {NO_LAUNCHER}", 1: NO_LAUNCHER},
    ),
    "the agent of node 0 killed": (lambda p: p.process(0, "agent").kill(), {0: NO_LAUNCHER, 1: NO_STORE}),
    "node 0 down": (lambda p: p.nodes[0].kill(), {1: NO_STORE}),
    "node 1 down": (lambda p: p.nodes[1].kill(), {0: SILENT}),
    "the link cut": (lambda p: p.nodes[1].cut(), {0: SILENT, 1: NO_STORE}),
}  # fmt: skip


@pytest.mark.matrix
@pytest.mark.parametrize("fault", FAULTS)
def test_the_other_node_notices_within_30_seconds_and_says_who_is_gone(pair: Any, fault: str) -> None:
    run: Pair = pair()
    run.wait_for_step(6)
    hurt, wanted = FAULTS[fault]
    workers = {number: run.process(number, "worker") for number in wanted}
    hurt(run)
    began = time.monotonic()
    for number, words in wanted.items():
        gone = lambda w=workers[number]: not w.is_running() or w.status() == psutil.STATUS_ZOMBIE  # noqa: E731
        until(gone, NOTICED_SECONDS - (time.monotonic() - began), run.text)
        print(f"{fault}: rank {number} ended within {time.monotonic() - began:.1f} s")
        assert words.format(node1=run.nodes[1].name, address0=run.nodes[0].address) in run.said(number), run.text()
    for number in wanted:
        if fault != f"the agent of node {number} killed":  # its own launcher is what was killed
            assert run.launchers[number].wait(60) not in (0, 75), run.text()
    assert run.saved().number >= 5


@pytest.mark.matrix
def test_a_node_that_comes_back_goes_on_from_the_last_checkpoint(pair: Any) -> None:
    run: Pair = pair("--max-restarts", "2", max_steps=200)
    run.wait_for_step(7)
    run.nodes[1].kill()
    until(lambda: f"rank 1 on {run.nodes[1].name}" in run.said(0), NOTICED_SECONDS, run.text)
    run.launchers[1] = run.start(1)
    assert [launcher.wait(START_SECONDS) for launcher in run.launchers] == [0, 0], run.text()
    assert "2 processes on 2 nodes" in run.said(0) and "Going on from step" in run.said(0)
    assert [rank["host"] for rank in run_json(run.out)["processes"]["ranks"]] == [node.name for node in run.nodes]
    assert run.steps() == list(range(1, 201))
