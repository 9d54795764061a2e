"""docs/slurm.sh and the examples for SkyPilot and Kubeflow: what they start on each machine, when they resume, what they do after 75."""

from __future__ import annotations

import importlib
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from qvera.distributed.launch import launch_command
from qvera.utils.errors import EXIT_INPUT, EXIT_INTERRUPTED
from tests.cli.helpers import parse
from tests.helpers import ROOT

pytestmark = pytest.mark.process

SKYPILOT = yaml.safe_load((ROOT / "examples" / "skypilot.yaml").read_text(encoding="utf-8"))
KUBEFLOW = list(yaml.safe_load_all((ROOT / "examples" / "kubeflow-trainjob.yaml").read_text(encoding="utf-8")))
RUNTIME, JOB = (next(part for part in KUBEFLOW if part["kind"] == kind) for kind in ("TrainingRuntime", "TrainJob"))
POD_JOB = RUNTIME["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]

# `qvera` writes down what it was called with, and ends with CODE.
_QVERA = """#!/bin/bash
printf '%s\\n' "$*" >> "$CALLED"
exit "$CODE"
"""
_SLURM = {
    "scontrol": """case "$1" in show) echo node7; echo node9;; requeue) echo "requeue $2" >> "$CALLED";; esac""",
    "srun": """for id in 0 1; do SLURM_NODEID=$id "$@"; code=$?; done; exit $code""",
}


class Machine:
    """A place where bash runs a script, with stand-ins for `qvera` and a scheduler's own commands."""

    def __init__(self, directory: Path, tools: dict[str, str] | None = None) -> None:
        self.directory, self.log = directory, directory / "called"
        bin = directory / "bin"
        bin.mkdir()
        for name, text in {"qvera": _QVERA, **(tools or {})}.items():
            (bin / name).write_text(text if text.startswith("#!") else f"#!/bin/bash\n{text}\n")
            (bin / name).chmod(0o755)
        self.environment = {"PATH": f"{bin}:{os.environ['PATH']}", "CALLED": str(self.log), "HOME": str(directory)}

    def bash(self, words: list[str], code: int, **environment: str) -> int:
        """Run it where `qvera` ends with ``code``; the exit code of the script."""
        given = self.environment | {"CODE": str(code)} | environment
        return subprocess.run(["bash", *words], cwd=self.directory, env=given, capture_output=True).returncode

    def called(self) -> list[str]:
        return self.log.read_text().splitlines()


def begin(run: Path) -> None:
    run.mkdir(parents=True)
    (run / "recipe.yaml").touch()


def torchrun_options(line: str, **environment: str) -> Any:
    """What torchrun makes of the command that a line `launch …` starts, in the environment that a scheduler gives."""
    _, options = parse(line.split())
    names = ("recipe", "gpus", "node_rank", "nnodes", "rdzv", "max_restarts")
    command = launch_command(**{name: options[name] for name in names})
    assert command[1:3] == ["-m", "torch.distributed.run"]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        # its parser takes defaults from PET_*
        return importlib.import_module("torch.distributed.run").parse_args(command[3:])


def started(line: str, before: bool, first: str, port: int, **environment: str) -> None:
    """That `launch` is machine 1 of two with four GPUs, and goes on with a run that was there before."""
    assert line.startswith("launch my.yaml ") and line.endswith(" --resume") == before
    options = torchrun_options(line, **environment)
    assert (options.nnodes, options.node_rank, options.nproc_per_node) == ("2", 1, "4")
    assert (options.master_addr, options.master_port) == (first, port)


@pytest.mark.parametrize(("code", "before"), [(0, False), (75, False), (1, True)])
def test_slurm_starts_an_agent_on_each_node_and_requeues_after_75(tmp_path: Path, code: int, before: bool) -> None:
    machine, run = Machine(tmp_path, _SLURM), tmp_path / "a run"
    script = str(ROOT / "docs" / "slurm.sh")
    if before:
        begin(run)
    slurm = {"SLURM_JOB_NODELIST": "node[7,9]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "5", "SLURM_GPUS_ON_NODE": "4"}
    assert machine.bash([script, "my.yaml", str(run)], code, **slurm) == code
    called, resume = machine.called(), " --resume" * before
    for number in range(2):
        rest = f"--nnodes 2 --rdzv node7:29500 --gpus 4 --set training.output_dir={run}{resume} --node-rank {number}"
        assert called[number] == f"launch my.yaml {rest}"
    assert called[2:] == (["requeue 5"] if code == 75 else [])
    started(called[1].replace(str(run), "run"), False, "node7", 29500)
    assert machine.bash([script], 0, **slurm) != 0, "it needs a recipe and a run's directory"


@pytest.mark.parametrize(("code", "before"), [(0, False), (75, True)])
def test_skypilot_starts_an_agent_on_each_machine(tmp_path: Path, code: int, before: bool) -> None:
    machine, run = Machine(tmp_path), tmp_path / "runs" / "my"
    if before:
        begin(run)
    # SkyPilot appends commands of its own: they wait for the bucket, and end with what the script's last command ended with
    script = SKYPILOT["run"].replace("/runs/", f"{tmp_path}/runs/") + "\nended=$?\necho flushed >> $CALLED\nexit $ended"
    given = {
        "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.9",
        "SKYPILOT_NUM_NODES": str(SKYPILOT["num_nodes"]),
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NUM_GPUS_PER_NODE": SKYPILOT["resources"]["accelerators"].partition(":")[2],
    }
    assert machine.bash(["-c", script], code, **SKYPILOT["envs"], **given) == code
    line, after = machine.called()
    assert f"--set training.output_dir={run}" in line
    assert after == "flushed"
    started(line, before, "10.0.0.7", 29500)


def test_skypilot_goes_on_after_an_interruption_and_keeps_runs_in_the_bucket() -> None:
    assert SKYPILOT["resources"]["job_recovery"]["recover_on_exit_codes"] == [EXIT_INTERRUPTED]
    assert SKYPILOT["file_mounts"]["/runs"]["mode"] == "MOUNT_CACHED"
    assert subprocess.run(["bash", "-n", "-c", SKYPILOT["setup"]]).returncode == 0


@pytest.mark.parametrize(("code", "before"), [(0, False), (75, True)])
def test_kubeflow_starts_an_agent_in_each_pod(tmp_path: Path, code: int, before: bool, monkeypatch: Any) -> None:
    machine, trainer = Machine(tmp_path), JOB["spec"]["trainer"]
    environment = {variable["name"]: variable["value"] for variable in trainer["env"]}
    if before:
        begin(tmp_path / environment["RUN"])
    # what the torch plugin of Kubeflow Trainer gives to pod 1 of two
    given = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "auto", "PET_NODE_RANK": "1"}
    given |= {"PET_MASTER_ADDR": "my-node-0-0.my", "PET_MASTER_PORT": "29400"}
    assert trainer["command"] == ["bash", "-c"]
    assert machine.bash(["-c", *trainer["args"]], code, **environment, **given) == code
    monkeypatch.setattr("qvera.utils.accelerator.device_count", lambda: 4)
    (line,) = machine.called()
    started(line, before, "my-node-0-0.my", 29400, **given)


def test_kubernetes_starts_an_interrupted_pod_again_and_none_with_wrong_input() -> None:
    rules = POD_JOB["podFailurePolicy"]["rules"]
    by_code = {code: r["action"] for r in rules for code in r.get("onExitCodes", {}).get("values", [])}
    assert by_code == {EXIT_INTERRUPTED: "Ignore", EXIT_INPUT: "FailJob"}
    assert POD_JOB["template"]["spec"]["restartPolicy"] == "Never", "a Job with a podFailurePolicy takes no other"
    (rule,) = RUNTIME["spec"]["template"]["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_the_kubeflow_example_fits_kubeflows_own_models_and_its_parts_name_each_other() -> None:
    """The models check types and enumerations, and drop keys that they do not know: what comes back has to be the same."""
    models = importlib.import_module("kubeflow_trainer_api.models")
    names = {"PersistentVolumeClaim": "IoK8sApiCoreV1PersistentVolumeClaim"}
    for part in KUBEFLOW:
        model = getattr(models, names.get(part["kind"], f"TrainerV1alpha1{part['kind']}"))
        assert model.from_dict(part).to_dict() == part
    claims = {part["metadata"]["name"] for part in KUBEFLOW if part["kind"] == "PersistentVolumeClaim"}
    volumes, (container,) = POD_JOB["template"]["spec"]["volumes"], POD_JOB["template"]["spec"]["containers"]
    assert claims == {v["persistentVolumeClaim"]["claimName"] for v in volumes if "persistentVolumeClaim" in v}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in volumes}
    reference = JOB["spec"]["runtimeRef"]
    assert (reference["kind"], reference["name"]) == (RUNTIME["kind"], RUNTIME["metadata"]["name"])
