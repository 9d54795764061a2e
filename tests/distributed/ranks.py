"""Start a few processes as a launcher would, on this machine, and wait for them with a hard limit."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def clean_environment() -> dict[str, str]:
    """This process's environment without a launcher's variables, and with this checkout first on the path."""
    kept = {name: value for name, value in os.environ.items() if name not in _LAUNCHER}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class Ranks:
    """``count`` processes of one command, each with the environment of its rank."""

    def __init__(self, arguments: list[str], count: int, log_dir: Path, **environment: str) -> None:
        log_dir.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self.logs = [log_dir / f"rank{rank}.log" for rank in range(count)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
            env = clean_environment() | {name: str(value) for name, value in places.items()}
            env |= {"MASTER_ADDR": "127.0.0.1", **environment}
            with open(log, "w") as handle:
                command = [sys.executable, *arguments]
                self.processes.append(subprocess.Popen(command, env=env, cwd=log_dir, stdout=handle, stderr=handle))

    def wait(self, limit_seconds: float) -> list[int]:
        """The exit code of each; every process still there at the limit is killed, and that is an error."""
        until = time.monotonic() + limit_seconds
        try:
            return [process.wait(max(until - time.monotonic(), 0.1)) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {limit_seconds:.0f} s:\n{self.text()}") from None
        finally:
            self.kill()

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()

    def text(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()[-6000:]}" for log in self.logs)


def run_worker(plan: list[dict[str, Any]], count: int, directory: Path, limit_seconds: float) -> list[dict[str, Any]]:
    """Let ``count`` processes of `worker.py` do ``plan``; what each of them found out."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "plan.json").write_text(json.dumps(plan))
    ranks = Ranks(["-m", "tests.distributed.worker", str(directory)], count, directory)
    codes = ranks.wait(limit_seconds)
    assert codes == [0] * count, ranks.text()
    return [json.loads((directory / f"found{rank}.json").read_text()) for rank in range(count)]
