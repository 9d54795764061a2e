"""`qvera launch`: the command it makes, what it refuses, and a real run behind it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from qvera.cli.main import main
from qvera.distributed import launch
from qvera.utils.cores import Cores
from qvera.utils.errors import InputError
from tests.distributed.ranks import clean_environment, free_port
from tests.helpers import wait_until
from tests.training.runs import run_json

pytestmark = pytest.mark.process

RECIPE = Path("r.yaml")


def torchrun(*more: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", *more, "-m", "qvera", "train", "r.yaml"]


def test_one_machine_or_one_of_several() -> None:
    command = launch.launch_command
    assert command(RECIPE, gpus=2) == torchrun("2", "--standalone")
    assert command(RECIPE, gpus=1, train_arguments=["--resume"]) == [*torchrun("1", "--standalone"), "--resume"]
    assert command(RECIPE, gpus=2, max_restarts=3) == torchrun("2", "--max-restarts", "3", "--standalone")
    place = ["--nnodes", "3", "--node-rank", "1", "--master-addr", "node0", "--master-port", "29500"]
    assert command(RECIPE, gpus=4, node_rank=1, nnodes=3, rdzv="node0:29500") == torchrun("4", *place)


def test_more_processes_than_accelerators_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvera.utils.accelerator.device_count", lambda: 2)
    with pytest.raises(InputError, match="--gpus 4: this machine shows 2 of them .CUDA_VISIBLE_DEVICES"):
        launch.launch_command(RECIPE, gpus=4)
    assert launch.launch_command(RECIPE, gpus=2) == launch.launch_command(RECIPE)


def test_processes_without_a_gpu_are_warned_about(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("qvera.utils.accelerator.device_count", lambda: 0)
    launch.launch_command(RECIPE, gpus=2)
    assert "--gpus 2: this machine shows no GPU, so 2 processes share its CPU." in capsys.readouterr().err
    launch.launch_command(RECIPE, gpus=1)
    launch.launch_command(RECIPE)
    assert not capsys.readouterr().err


def test_processes_of_one_machine_share_the_free_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(launch, "measure", lambda: Cores(8, 1.5))
    worker = tmp_path / "worker.py"
    worker.write_text("import os; print('threads ' + os.environ['OMP_NUM_THREADS'] + '\\n', end='')")  # one write
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(worker)]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for threads in ("3", "5"):
        assert launch.run(command) == 0
        assert capfd.readouterr().out.splitlines() == [f"threads {threads}"] * 2
        monkeypatch.setenv("OMP_NUM_THREADS", "5")  # what a person has set stays


def test_settings_of_torch_go_to_the_other_machines(tmp_path: Path, monkeypatch: Any) -> None:
    """By the file that DeepSpeed's launcher reads, which stands in for it here."""
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("SECRET", "not for them")
    read = "import os, shutil, sys; shutil.copy(os.environ['DS_ENV_FILE'], sys.argv[2])"
    assert launch.run([sys.executable, "-c", read, "deepspeed.launcher.runner", str(tmp_path / "sent")]) == 0
    sent = (tmp_path / "sent").read_text().splitlines()
    assert "PYTORCH_ALLOC_CONF=expandable_segments:True" in sent
    assert not [line for line in sent if line.startswith("SECRET")]


def test_a_host_file_needs_pdsh_and_ssh_for_several_hosts_alone(tmp_path: Path, monkeypatch: Any) -> None:
    hosts = tmp_path / "hosts"
    monkeypatch.setenv("PATH", str(tmp_path))
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hosts)]
    inner = ["--module", "qvera", "train", "r.yaml"]
    hosts.write_text("node0 slots=2\n")
    assert launch.launch_command(RECIPE, hostfile=hosts) == [*runner, *inner]
    hosts.write_text("node0 slots=2  # the first\n# node2 slots=2\nnode1 slots=2\n")
    with pytest.raises(InputError, match="by pdsh.* is not installed here .*--node-rank K --nnodes N --rdzv"):
        launch.launch_command(RECIPE, hostfile=hosts)
    for tool in ("pdsh", "ssh"):
        (tmp_path / tool).write_text("#!/bin/sh\n")
        (tmp_path / tool).chmod(0o755)
    assert launch.launch_command(RECIPE, hostfile=hosts, gpus=1) == [*runner, "--num_gpus", "1", *inner]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("node0 slots=2\nnode1 slot=2\n", "hosts, line 2: 'node1 slot=2'; expected HOST slots=N"),
        ("localhost slots=two\n", "hosts, line 1: 'localhost slots=two'"),
        ("node0\n", "hosts, line 1: 'node0'"),
        ("node0 slots=2\n\nnode0 slots=4\n", "hosts, line 3: node0 is in line 1 too"),
        ("# none yet\n", "hosts: names no machine"),
    ],
)
def test_a_host_file_that_deepspeed_could_not_read_is_refused_by_its_line(
    tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(InputError, match=words):
        launch.launch_command(RECIPE, hostfile=tmp_path / "hosts")


def test_hosts_are_asked_before_anything_starts(tmp_path: Path, monkeypatch: Any) -> None:
    hosts, ssh, called = tmp_path / "hosts", tmp_path / "ssh", tmp_path / "called"
    hosts.write_text("node0 slots=2\n\nnode1 slots=2\n")
    refuse = '[ "$5" = node0 ] || { echo "Permission denied" >&2; exit 255; }'
    ssh.write_text(f'#!/bin/sh\necho "$*" >> {called}\n{refuse}\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(InputError, match="hosts, line 3: node1 does not answer to ssh: Permission denied"):
        launch.require_hosts(hosts)
    asked = sorted(called.read_text().splitlines())
    assert asked == [f"-o BatchMode=yes -o ConnectTimeout=10 {host} true" for host in ("node0", "node1")]
    hosts.write_text("node1 slots=2\n")  # this machine alone: DeepSpeed's launcher needs no ssh
    launch.require_hosts(hosts)
    assert len(called.read_text().splitlines()) == 2


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
        (["--set", "training.max_steps=-3"], "training.max_steps"),
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


def test_a_launched_run_saves_on_sigterm_and_ends_with_75(write_recipe: Any, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "launch.log"
    recipe = write_recipe(training={"max_steps": 4000, "output_dir": str(out), "save_steps": 4000, "sample_count": 0})
    command = [sys.executable, "-m", "qvera", "launch", str(recipe), "--gpus", "2"]
    with open(log, "w") as handle:
        process = subprocess.Popen(command, env=clean_environment(), cwd=tmp_path, stdout=handle, stderr=handle)
    try:
        metrics = out / "metrics.jsonl"
        wait_until(lambda: process.poll() is not None or (metrics.exists() and metrics.read_text().count("\n") > 3))
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 75, log.read_text()[-3000:]
    finally:
        process.kill()
    text = " ".join(log.read_text().split())  # as on a narrow terminal
    assert "torch.distributed.run --nproc-per-node 2 --standalone -m qvera train" in text
    assert "2 processes on 1 node" in text and "an all-reduce takes" in text
    assert text.count("Stopped by SIGTERM") == 1, "one process says it for all"
    assert "Traceback" not in text
    run = run_json(out)
    assert run["status"] == "interrupted" and run["result"]["steps"] >= 3
    assert [p.name for p in (out / "checkpoints").iterdir()] == [f"step-{run['result']['steps']:08d}"]


def test_of_a_worker_that_is_killed_one_line_is_said_and_of_one_that_failed_its_own_words_alone(tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, signal, sys\nif 'kill' in sys.argv: os.kill(os.getpid(), signal.SIGKILL)\nsys.exit('no rows')"
    )
    for word in ("kill", "fail"):
        command = [sys.executable, "-m", "qvera.distributed.launch", "--standalone", "--nproc-per-node", "1"]
        done = subprocess.run([*command, str(worker), word], env=clean_environment(), capture_output=True, text=True)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert ("rank 0 was ended by SIGKILL" in done.stderr and "--resume" in done.stderr) == (word == "kill")
        assert ("no rows" in done.stderr) == (word == "fail")


def test_a_launch_under_nohup_outlives_its_terminal() -> None:
    child = "import os, signal, time; os.kill(os.getppid(), signal.SIGHUP); time.sleep(1)"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert launch.run([sys.executable, "-c", child]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_launch_that_is_stopped_while_it_starts_says_so(write_recipe: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qvera", "launch", str(write_recipe()), "--gpus", "2"]
    process = subprocess.Popen(command, env=clean_environment(), cwd=tmp_path, stderr=subprocess.PIPE)
    wait_until(
        lambda: any("qvera.distributed.launch" in one.cmdline() for one in psutil.Process(process.pid).children())
    )
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 75, said
    assert "Traceback" not in said and "interrupted before its processes could answer." in said


@pytest.mark.slow
def test_deepspeeds_launcher_works_too(write_recipe: Any, tmp_path: Path) -> None:
    """`qvera launch --hostfile` leaves --no_ssh out; that a machine reaches itself by ssh is not to be taken for granted."""
    recipe, out = write_recipe(training={"max_steps": 2, "sample_count": 0}), tmp_path / "out"
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    front = ["-m", "deepspeed.launcher.runner", "--hostfile", "hosts", "--no_ssh", "--node_rank", "0"]
    front += ["--master_addr", "127.0.0.1", "--master_port", str(free_port()), "--module", "qvera", "train"]
    command = [sys.executable, *front, str(recipe), "--set", "deepspeed=zero2", "--set", f"training.output_dir={out}"]
    done = subprocess.run(command, env=clean_environment(), cwd=tmp_path, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stdout.decode()[-2000:] + done.stderr.decode()[-4000:]
    run = run_json(out)
    assert run["status"] == "done"
    assert (run["processes"]["count"], run["processes"]["deepspeed"]) == (2, "zero2")
    again = f"qvera launch {recipe} --gpus 2 --set deepspeed=zero2"
    assert again in " ".join(done.stdout.decode().split()), "what is advised after a launch is a launch"


def test_a_restart_resumes_what_its_launch_has_begun_and_no_other_run(
    write_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The environment is torchrun's, which starts refused processes again: they are refused again."""
    out, port = tmp_path / "out", free_port()
    recipe = str(write_recipe(training={"max_steps": 2, "output_dir": str(out), "sample_count": 0}))
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    assert main(["train", recipe]) == 0  # without a launch
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    for count in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        assert main(["train", recipe]) == 2
        assert "already holds a run. Add --resume" in " ".join(capsys.readouterr().err.split())
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    more = ["--set", f"training.output_dir={tmp_path / 'other'}"]
    for _ in range(2):  # the second one takes the place of the first
        assert main(["train", recipe, *more]) == 0
    del store
