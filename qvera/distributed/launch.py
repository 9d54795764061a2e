"""`qvera launch`: start torchrun or DeepSpeed's launcher, on one machine, from a host file or under a scheduler."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qvera.utils.cores import measure
from qvera.utils.errors import EXIT_FAILED, EXIT_INPUT, EXIT_INTERRUPTED, InputError

FORWARDED = (
    "CUDA_", "GLOO_", "HF_", "NCCL_", "OMP_", "PYTHON", "PYTORCH_", "QVERA_", "TOKENIZERS_", "TORCH_", "TRANSFORMERS_",
    "XDG_",
)  # fmt: skip
"""Environment variables with these prefixes are sent to remote processes. ssh forwards none by itself."""
EXIT_CODES = "QVERA_EXIT_CODES"
"""The folder for the workers' exit codes. torchrun itself ends with 1, whatever its workers ended with."""
TORCHRUN = ["-m", "torch.distributed.run"]
_SSH_SECONDS = 10
"""The limit for ssh to connect. The answer may take twice as long."""


def launch_command(
    recipe: Path,
    *,
    gpus: int | None = None,
    hostfile: Path | None = None,
    node_rank: int | None = None,
    nnodes: int | None = None,
    rdzv: str | None = None,
    max_restarts: int = 0,
    train_arguments: list[str] | None = None,
) -> list[str]:
    """Return the command of torchrun, or with a host file that of DeepSpeed's launcher.

    The arguments are the options of `qvera launch`. Without ``gpus`` there is a process for each GPU, or one. Raises
    InputError if the arguments do not fit together, or pdsh is missing.
    """
    inner = ["qvera", "train", str(recipe), *(train_arguments or [])]
    placed = {"--node-rank": node_rank, "--nnodes": nnodes, "--rdzv": rdzv}
    several = [name for name, value in placed.items() if value is not None]
    if hostfile is not None:
        if several:
            raise InputError(f"--hostfile: names the machines by itself; leave {', '.join(several)} out.")
        if max_restarts:
            raise InputError("--max-restarts: DeepSpeed's launcher restarts nothing; use it with --gpus or --rdzv.")
        if not hostfile.is_file():
            raise InputError(f"--hostfile: {hostfile} is no file. It has a line `HOST slots=N` for each machine.")
        missing = [tool for tool in ("pdsh", "ssh") if shutil.which(tool) is None] if len(_hosts(hostfile)) > 1 else []
        if missing:
            raise InputError(
                "--hostfile: DeepSpeed's launcher reaches other machines by pdsh, over ssh without a password, and "
                f"{missing[0]} is not installed here (Debian and Ubuntu: pdsh, openssh-client). Or start each machine "
                "by itself, with --node-rank K --nnodes N --rdzv HOST:PORT."
            )
        per_node = [] if gpus is None else ["--num_gpus", str(gpus)]
        runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), *per_node]
        return [*runner, "--module", *inner]
    from qvera.utils import accelerator  # which imports torch

    here = accelerator.device_count()
    if gpus is not None and 0 < here < gpus:
        raise InputError(f"--gpus {gpus}: this machine shows {here} of them (CUDA_VISIBLE_DEVICES hides others).")
    if gpus is not None and gpus > 1 and not here:
        print(f"--gpus {gpus}: this machine shows no GPU, so {gpus} processes share its CPU.", file=sys.stderr)
    if gpus is None:
        gpus = max(here, 1)
    command = [sys.executable, *TORCHRUN, "--nproc-per-node", str(gpus)]
    if max_restarts:
        command += ["--max-restarts", str(max_restarts)]
    if not several:
        return [*command, "--standalone", "-m", *inner]
    if node_rank is None or nnodes is None or rdzv is None:
        raise InputError(f"{', '.join(several)}: goes with all of --node-rank K, --nnodes N and --rdzv HOST:PORT.")
    host, colon, port = rdzv.rpartition(":")
    if not colon or not host or not port.isdigit():
        raise InputError(f"--rdzv: takes HOST:PORT of node 0, such as node0:29500, got {rdzv!r}.")
    if not 0 <= node_rank < nnodes:
        raise InputError(f"--node-rank: is {node_rank}, expected 0 to {nnodes - 1} (--nnodes {nnodes}).")
    # static: the command names the machine that serves the store, so that host names do not matter
    place = ["--nnodes", str(nnodes), "--node-rank", str(node_rank), "--master-addr", host, "--master-port", port]
    return [*command, *place, "-m", *inner]


def _hosts(hostfile: Path) -> dict[str, int]:
    """Return host → its line in the file, from 1. InputError: a line that DeepSpeed's launcher would not read."""
    found: dict[str, int] = {}
    for number, line in enumerate(hostfile.read_text(encoding="utf-8").splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) < 2 or not re.fullmatch(r"slots=[1-9]\d*", words[1]):
            raise InputError(f"{hostfile}, line {number}: {line.strip()!r}; expected HOST slots=N, with N processes.")
        if words[0] in found:
            raise InputError(f"{hostfile}, line {number}: {words[0]} is in line {found[words[0]]} too. Name it once.")
        found[words[0]] = number
    if not found:
        raise InputError(f"{hostfile}: names no machine; expected a line `HOST slots=N` for each.")
    return found


def require_hosts(hostfile: Path) -> None:
    """Raise InputError if one of several hosts does not answer to ssh: the others would wait minutes for it."""
    hosts = _hosts(hostfile)
    if len(hosts) < 2:
        return
    with ThreadPoolExecutor(len(hosts)) as pool:
        for host, why in zip(hosts, pool.map(_ssh_problem, hosts), strict=True):
            if why is not None:
                raise InputError(
                    f"{hostfile}, line {hosts[host]}: {host} does not answer to ssh: {why}. Each machine has to let "
                    f"the others in without a password; `ssh {host} true` shows whether it does."
                )


def _ssh_problem(host: str) -> str | None:
    command = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_SSH_SECONDS}"]
    command += [*shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", "")), host, "true"]  # pdsh's: a port, a key
    null, limit = subprocess.DEVNULL, 2 * _SSH_SECONDS
    with tempfile.TemporaryFile("w+") as errors:  # no pipe: what ssh starts may outlive it
        try:
            code = subprocess.run(command, stdin=null, stdout=null, stderr=errors, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            return f"no answer within {limit} s"
        errors.seek(0)
        lines = [f"ssh ended with {code}", *errors.read().split("\n")]
    return None if code == 0 else next(line.strip() for line in reversed(lines) if line.strip())


def run(command: list[str]) -> int:
    """Run the launcher, pass SIGINT and SIGTERM on to it, and return the exit code of the run.

    That is 75 if every process was interrupted and has saved, or was stopped before it could answer; 2 if the input was
    wrong; else the launcher's own.
    """
    of_torch = command[1:3] == TORCHRUN
    if of_torch:
        command = [command[0], "-m", __name__, *command[3:]]
    with tempfile.TemporaryDirectory(prefix="qvera-launch-") as scratch:
        codes = Path(scratch) / "codes"
        codes.mkdir()
        environment = os.environ | {EXIT_CODES: str(codes)}
        threads = 1
        if of_torch:  # it would give each worker one thread, whatever the cores
            workers = int(command[command.index("--nproc-per-node") + 1])
            threads = max(measure().free_threads // workers, 1)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
        if "deepspeed.launcher.runner" in command:
            file = Path(scratch) / "environment"
            file.write_text(
                "".join(f"{k}={v}\n" for k, v in environment.items() if k.startswith(FORWARDED) and "\n" not in v)
            )
            environment["DS_ENV_FILE"] = str(file)
        # a SIGHUP that is ignored, as under nohup, stays ignored
        is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signals, stopped = [signal.SIGINT, signal.SIGTERM, *[signal.SIGHUP] * (not is_ignored)], threading.Event()
        child: subprocess.Popen[bytes] | None = None

        def stop(*_: object) -> None:
            stopped.set()
            if child is not None:
                child.send_signal(signal.SIGTERM)

        # before the launcher starts, so that no signal between the two leaves it behind
        previous = {number: signal.signal(number, stop) for number in signals}
        try:
            # In a session of its own, so that Ctrl-C reaches this process alone. A worker that got it from the terminal
            # and from torchrun would take the second one for "at once".
            child = subprocess.Popen(command, env=environment, start_new_session=True)
            if stopped.is_set():
                child.send_signal(signal.SIGTERM)
            code = child.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        found = [int(file.read_text()) for file in codes.iterdir()]
    if code == 0:
        return 0
    # only where all workers agree: one that failed otherwise must not be hidden
    for known in (EXIT_INPUT, EXIT_INTERRUPTED):
        if {known} <= set(found) <= {0, known}:
            return known
    if of_torch and stopped.is_set() and not found:
        print(
            "interrupted before its processes could answer. The same command begins again, or goes on with --resume "
            "where steps were saved.",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED
    return code if code > 0 else EXIT_FAILED


def _torchrun() -> None:
    """torchrun, which would end in a traceback of its own where a signal stops it or a worker fails."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main()
    except SignalException:
        sys.exit(EXIT_FAILED)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # the others say themselves why they end
            print(
                f"rank {rank} was ended by {failure.signal_name()} (where RAM runs out, the system ends a process by "
                "SIGKILL). The same command begins again, or goes on with --resume where steps were saved.",
                file=sys.stderr,
            )
        sys.exit(EXIT_FAILED)


def leave_exit_code(code: int) -> None:
    """Tell `run` the exit code of this worker, if `run` started it."""
    directory = os.environ.get(EXIT_CODES)
    if directory is not None and Path(directory).is_dir():
        (Path(directory) / os.environ.get("RANK", "0")).write_text(str(code))


if __name__ == "__main__":
    _torchrun()
