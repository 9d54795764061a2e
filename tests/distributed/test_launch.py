"""`qvera launch`: the command it makes, what it refuses, and a real run behind it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qvera.cli.main import main
from qvera.distributed import launch
from qvera.utils.errors import InputError
from tests.distributed.ranks import clean_environment, free_port

pytestmark = pytest.mark.process

RECIPE = Path("r.yaml")


def torchrun(*more: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *more, "-m", "qvera", "train", "r.yaml"]


def test_one_machine() -> None:
    assert launch.launch_command(RECIPE, gpus=2) == torchrun("--nproc-per-node", "2", "--standalone")
    assert launch.launch_command(RECIPE, gpus=1, train_arguments=["--resume"])[-2:] == ["r.yaml", "--resume"]
    restarts = torchrun("--nproc-per-node", "2", "--max-restarts", "3", "--standalone")
    assert launch.launch_command(RECIPE, gpus=2, max_restarts=3) == restarts


def test_more_processes_than_accelerators_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.accelerator, "device_count", lambda: 2)
    with pytest.raises(InputError, match="--gpus 4: this machine shows 2 of them .CUDA_VISIBLE_DEVICES"):
        launch.launch_command(RECIPE, gpus=4)
    assert launch.launch_command(RECIPE, gpus=2) == launch.launch_command(RECIPE)


def test_one_of_several_machines() -> None:
    command = launch.launch_command(RECIPE, gpus=4, node_rank=1, nnodes=3, rdzv="node0:29500")
    place = ["--nnodes", "3", "--node-rank", "1", "--master-addr", "node0", "--master-port", "29500"]
    assert command == torchrun("--nproc-per-node", "4", *place)


def test_a_host_file(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("node0 slots=2\n")
    command = launch.launch_command(RECIPE, hostfile=hosts)
    assert command[1:3] == ["-m", "deepspeed.launcher.runner"]
    assert command[3:] == ["--hostfile", str(hosts), "--module", "qvera", "train", "r.yaml"]


def test_settings_of_torch_go_to_the_other_machines(tmp_path: Path, monkeypatch: Any) -> None:
    """By the file that DeepSpeed's launcher reads, which stands in for it here."""
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("SECRET", "not for them")
    read = "import os, shutil, sys; shutil.copy(os.environ['DS_ENV_FILE'], sys.argv[2])"
    assert launch.run([sys.executable, "-c", read, "deepspeed.launcher.runner", str(tmp_path / "sent")]) == 0
    sent = (tmp_path / "sent").read_text().splitlines()
    assert "PYTORCH_ALLOC_CONF=expandable_segments:True" in sent
    assert not [line for line in sent if line.startswith("SECRET")]


def test_several_hosts_without_pdsh_are_refused_with_what_to_do(tmp_path: Path, monkeypatch: Any) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("node0 slots=2  # the first\n# node2 slots=2\nnode1 slots=2\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="by pdsh.* is not installed here .*--node-rank K --nnodes N --rdzv"):
        launch.launch_command(RECIPE, hostfile=hosts)
    for tool in ("pdsh", "ssh"):
        (tmp_path / tool).write_text("#!/bin/sh\n")
        (tmp_path / tool).chmod(0o755)
    assert launch.launch_command(RECIPE, hostfile=hosts, gpus=1)[3:7] == ["--hostfile", str(hosts), "--num_gpus", "1"]


def test_hosts_are_asked_before_anything_starts(tmp_path: Path, monkeypatch: Any) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("node0 slots=2\n\nnode1 slots=2\n")
    (tmp_path / "ssh").write_text(
        '#!/bin/sh\necho "$*" >> called\n[ "$5" = node0 ] || { echo "Permission denied" >&2; exit 255; }\n'
    )
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="hosts, line 3: node1 does not answer to ssh: Permission denied"):
        launch.require_hosts(hosts)
    asked = sorted((tmp_path / "called").read_text().splitlines())
    assert asked == [f"-o BatchMode=yes -o ConnectTimeout=10 {host} true" for host in ("node0", "node1")]
    hosts.write_text("node1 slots=2\n")  # this machine alone: DeepSpeed's launcher needs no ssh
    launch.require_hosts(hosts)
    assert len((tmp_path / "called").read_text().splitlines()) == 2


def test_what_train_is_given_is_handed_on(write_recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(launch, "run", lambda command: ran.append(command) or 0)
    recipe, given = str(write_recipe()), ["--set", "adapter.rank=4", "--set", "training.max_steps=3"]
    ramp = ["--find-lr", "--lr-from", "1e-06", "--lr-to", "0.5", "--lr-steps", "17"]
    for more in ([], [*given, "--resume"], [*given, *ramp]):
        assert main(["launch", recipe, "--gpus", "2", *more]) == 0
        assert ran[-1][ran[-1].index(recipe) + 1 :] == more


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--lr-steps", "20"], "go with --find-lr only"),
        (["--find-lr", "--lr-steps", "4"], "a whole number >= 10"),
        (["--find-lr", "--resume"], "--resume: goes with a run"),
        (["--gpus", "0"], "Invalid value for '--gpus'"),
        (["--max-restarts", "-1"], "Invalid value for '--max-restarts'"),
    ],
)
def test_what_train_would_refuse_starts_nothing(write_recipe: Any, capsys: Any, given: list[str], words: str) -> None:
    assert main(["launch", str(write_recipe()), "--gpus", "2", *given]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "torch.distributed.run" not in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"node_rank": 0}, "goes with all of --node-rank K, --nnodes N and --rdzv"),
        ({"node_rank": 0, "nnodes": 2}, "goes with all of"),
        ({"node_rank": 2, "nnodes": 2, "rdzv": "a:1"}, "--node-rank: is 2, expected 0 to 1"),
        ({"node_rank": 0, "nnodes": 2, "rdzv": "node0"}, "--rdzv: takes HOST:PORT"),
        ({"node_rank": 0, "nnodes": 2, "rdzv": ":29500"}, "--rdzv: takes HOST:PORT"),
        ({"hostfile": Path("/no/hosts")}, "--hostfile: /no/hosts is no file"),
        ({"hostfile": Path("/no/hosts"), "nnodes": 2}, "leave --nnodes out"),
        ({"hostfile": Path("/no/hosts"), "max_restarts": 1}, "DeepSpeed's launcher restarts nothing"),
    ],
)
def test_half_a_way_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        launch.launch_command(RECIPE, **{"gpus": 1, **arguments})


def test_a_wrong_recipe_starts_nothing(tmp_path: Path, capsys: Any) -> None:
    assert main(["launch", str(tmp_path / "none.yaml"), "--gpus", "2"]) == 2
    assert "no such recipe file" in capsys.readouterr().err


def started(recipe: Path, *more: str, directory: Path) -> tuple[subprocess.Popen[bytes], Path]:
    log = directory / "launch.log"
    with open(log, "w") as handle:
        command = [sys.executable, "-m", "qvera", "launch", str(recipe), "--gpus", "2", *more]
        return subprocess.Popen(command, env=clean_environment(), cwd=directory, stdout=handle, stderr=handle), log


def test_a_launched_run_stops_on_sigterm_with_75_and_goes_on(write_recipe: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = write_recipe(
        training={"max_steps": 4000, "output_dir": str(out), "save_steps": 4000, "report_to": ["auto"]}
    )
    process, log = started(recipe, "--set", "deepspeed=zero1", directory=tmp_path)
    try:
        until = time.monotonic() + 120
        while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < 3:
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.1)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75, log.read_text()[-3000:]
        assert time.monotonic() - began < 30
    finally:
        process.kill()
    text = " ".join(log.read_text().split())  # as on a narrow terminal
    assert "torch.distributed.run --nproc-per-node 2 --standalone -m qvera train" in text
    assert "2 processes on 1 node" in text
    assert "an all-reduce takes" in text
    assert text.count("Stopped by SIGTERM") == 1, "one process says it for all"
    run = json.loads((out / "run.json").read_text())
    assert run["status"] == "interrupted"
    assert run["result"]["steps"] >= 3
    assert [p.name for p in (out / "checkpoints").iterdir()] == [f"step-{run['result']['steps']:08d}"]


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "qvera", "train"]
# `qvera launch --hostfile` leaves the --no_ssh part out; that a machine reaches itself by ssh is not to be taken for
# granted
HOSTFILE = ["-m", "deepspeed.launcher.runner", "--hostfile", "hosts", "--no_ssh", "--node_rank", "0"]
HOSTFILE += ["--master_addr", "127.0.0.1", "--master_port", "PORT", "--module", "qvera", "train"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("front", "stage"), [(TORCHRUN, "zero3"), (HOSTFILE, "zero2")], ids=["torchrun", "deepspeed by a host file"]
)
def test_bare_torchrun_and_deepspeeds_launcher_work_too(
    write_recipe: Any, tmp_path: Path, front: list[str], stage: str
) -> None:
    recipe, out = write_recipe(training={"max_steps": 2}), tmp_path / "out"
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    front = [str(free_port()) if part == "PORT" else part for part in front]
    command = [*front, str(recipe), "--set", f"deepspeed={stage}", "--set", f"training.output_dir={out}"]
    done = subprocess.run(
        [sys.executable, *command], env=clean_environment(), cwd=tmp_path, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stdout.decode()[-2000:] + done.stderr.decode()[-4000:]
    run = json.loads((out / "run.json").read_text())
    assert run["status"] == "done"
    assert run["processes"]["count"] == 2
    assert run["processes"]["deepspeed"] == stage


@pytest.mark.slow
def test_input_that_is_wrong_ends_a_launched_run_with_2(write_recipe: Any, tmp_path: Path) -> None:
    recipe = write_recipe(data={"path": str(tmp_path / "none.jsonl")})
    process, log = started(recipe, directory=tmp_path)
    assert process.wait(120) == 2, log.read_text()[-3000:]
    assert log.read_text().count("none.jsonl") >= 1
    assert not os.path.exists(tmp_path / "runs")


@pytest.mark.slow
def test_a_restart_does_not_turn_a_refused_run_into_a_resumed_one(write_recipe: Any, tmp_path: Path) -> None:
    """A run of another launch stands there.

    Refused, torchrun starts the processes again, and they are refused again.
    """
    out = tmp_path / "out"
    recipe = write_recipe(training={"max_steps": 4, "output_dir": str(out)})
    assert main(["train", str(recipe)]) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    process, log = started(recipe, "--max-restarts", "1", directory=tmp_path)
    assert process.wait(180) == 2, log.read_text()[-3000:]
    assert log.read_text().count("already holds a run. Add --resume") == 2
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
