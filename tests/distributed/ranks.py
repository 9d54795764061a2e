"""Start a few processes as a launcher would, on this machine, and wait for them with a hard limit."""

from __future__ import annotations

import json
import os
import runpy
import socket
import sys
import time
from pathlib import Path
from typing import Any

from tests.helpers import ROOT, start_process

_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def clean_environment() -> dict[str, str]:
    """This process's environment without a launcher's variables, and with this checkout first on the path."""
    kept = {name: value for name, value in os.environ.items() if name not in _LAUNCHER}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def _run_module(arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    """What `python -m MODULE ...` does with these arguments."""
    with open(log, "w") as handle:
        for stream in (1, 2):
            os.dup2(handle.fileno(), stream)
    os.chdir(log.parent)
    os.environ.update(clean_environment() | environment)
    sys.argv = arguments[1:]
    runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)


class Ranks:
    """``count`` processes of `python -m MODULE ...`, each with the environment of its rank, forked by `start_process`."""

    def __init__(self, arguments: list[str], count: int, log_dir: Path) -> None:
        log_dir.mkdir(parents=True, exist_ok=True)
        place = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.logs = [log_dir / f"rank{rank}.log" for rank in range(count)]
        self.processes = [
            start_process(_run_module, arguments, log, {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank, log in enumerate(self.logs)
        ]

    def wait(self, limit_seconds: float) -> list[int | None]:
        """The exit code of each; every process still there at the limit is killed, and that is an error."""
        until = time.monotonic() + limit_seconds
        try:
            for process in self.processes:
                process.join(max(until - time.monotonic(), 0.1))
                assert process.exitcode is not None, f"still running after {limit_seconds:.0f} s:\n{self.text()}"
            return [process.exitcode for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def text(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()[-6000:]}" for log in self.logs)


def run_worker(plan: list[dict[str, Any]], count: int, directory: Path, limit_seconds: float) -> list[dict[str, Any]]:
    """Let ``count`` processes of `worker.py` do ``plan``; what each of them found out."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "plan.json").write_text(json.dumps(plan))
    ranks = Ranks(["-m", "tests.distributed.worker", str(directory)], count, directory)
    assert ranks.wait(limit_seconds) == [0] * count, ranks.text()
    return [json.loads((directory / f"found{rank}.json").read_text()) for rank in range(count)]
