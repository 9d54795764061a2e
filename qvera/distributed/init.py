"""Join the processes of a run, by the environment of their launcher, and leave them."""

import contextlib
import datetime
import hashlib
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator

import torch.distributed as dist

from qvera.distributed.group import Group
from qvera.distributed.heartbeat import Heartbeat, own_store
from qvera.utils import accelerator
from qvera.utils.errors import InputError, RunFailed, first_line

_LOST = re.compile(r"gloo|NCCL|connection (was )?(closed|reset|refused)|socket|broken pipe", re.IGNORECASE)
"""Messages of torch's collectives when a peer is gone. They do not say which one."""
JOIN_TIMEOUT = datetime.timedelta(minutes=5)
"""How long processes wait for the last of them to start."""
COLLECTIVE_TIMEOUT = datetime.timedelta(hours=2)
"""How far apart ranks may be, such as while one writes. `heartbeat` notices a dead rank much sooner."""


@contextlib.contextmanager
def in_group() -> Iterator[Group]:
    """Yield the group of the processes that a launcher (torchrun, deepspeed) started with this one.

    If the calling program has set up torch.distributed already, its process group is used and left alone.

    Raises:
        InputError: the launcher's environment is wrong, accelerators are too few, or the program's group takes no CPU
            tensors.
        RunFailed: the other processes did not come.
    """
    if dist.is_initialized():
        require_backend_of_cpu()
        yield Group(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)))
        return
    text = os.environ.get("WORLD_SIZE", "1")
    count = int(text) if text.isdigit() else 0
    if count < 1:
        raise InputError(f"WORLD_SIZE: is {text!r} in the environment; a launcher sets it to the number of processes.")
    if count == 1:
        by_torchrun = all(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"))
        yield Group(store=own_store() if by_torchrun else None)
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(
            f"WORLD_SIZE is {count} in the environment, but {', '.join(missing)} is not set. Start several processes "
            "with `qvera launch`, torchrun or deepspeed; for a single one unset WORLD_SIZE."
        )
    local_rank = int(os.environ["LOCAL_RANK"])
    if 0 < (seen := accelerator.device_count()) <= local_rank:
        raise InputError(
            f"LOCAL_RANK is {local_rank}, and this process sees {seen} accelerator{'s'[: seen != 1]}, numbered from 0. "
            "Start one process for each (`qvera launch --gpus N`), and let each see all of them."
        )
    accelerator.use_device(local_rank)
    with _clear_errors(count):
        store, rank, _ = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))
        store.set_timeout(JOIN_TIMEOUT)
        attempt = agreed_attempt(store, rank, count, JOIN_TIMEOUT.total_seconds())
    group = Group(rank, count, local_rank, store=store)
    # the process id of torchrun or DeepSpeed's launcher, which has to live as long as this process
    launcher = os.getppid() if {"TORCHELASTIC_RUN_ID", "CROSS_RANK"} & os.environ.keys() else None
    try:
        with Heartbeat(group, dist.PrefixStore(attempt, own_store()), launcher=launcher) as heartbeat:
            try:
                with _clear_errors(count):  # a peer may go while the processes connect, too
                    backend = accelerator.collective_backend()
                    own = dist.PrefixStore(attempt, store)
                    dist.init_process_group(backend, store=own, rank=rank, world_size=count, timeout=COLLECTIVE_TIMEOUT)
                yield group
            except RuntimeError as error:
                if _LOST.search(str(error)):
                    heartbeat.find_the_dead()
                raise
            group.sum([0.0])  # rank 0 may serve the store: it must not go before the others are done with it
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def require_backend_of_cpu() -> None:
    """Raise InputError if the calling program's process group takes an accelerator's tensors alone."""
    config = dist.get_backend_config()
    if "cpu" not in config and dist.get_backend() != "gloo":
        raise InputError(
            f"torch.distributed was set up with {config}, which takes no CPU tensors. Set it up with "
            f"init_process_group({accelerator.collective_backend()!r}), or leave it to qvera."
        )


def restarted() -> bool:
    """Whether torchrun started this process in place of one that failed (``--max-restarts``)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextlib.contextmanager
def _clear_errors(count: int) -> Iterator[None]:
    try:
        yield
    except (dist.DistError, TimeoutError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RunFailed(
            f"rank {os.environ['RANK']} on {socket.gethostname()} did not meet all {count} processes at {where} within "
            f"{JOIN_TIMEOUT.seconds // 60} minutes: one was not started, or can't reach that address "
            f"({first_line(error)})"
        ) from None


def agreed_attempt(store: dist.Store, rank: int, world_size: int, limit_seconds: float) -> str:
    """Return a key prefix that all live processes have in common, and that no earlier process used.

    A launcher that restarts processes keeps its store, with the addresses and beats of the dead; its count of restarts
    is no prefix, because each node counts for itself. So each process writes a random word. Rank 0 publishes the list
    of words until every process has confirmed a list with its own word. The prefix is a hash of that list.
    """
    until = time.monotonic() + limit_seconds
    word = uuid.uuid4().hex
    store.set(f"qvera/word/{rank}", word)
    seen = ""
    while time.monotonic() < until:
        if rank == 0:
            keys = [f"qvera/word/{other}" for other in range(world_size)]
            if store.check(keys):
                words = ",".join(store.get(key).decode() for key in keys)
                if words != seen:
                    seen = words
                    store.set("qvera/words", words)
        elif store.check(["qvera/words"]):
            words = store.get("qvera/words").decode()
            if word in words.split(",") and words != seen:
                seen = words
                store.set(f"{_prefix(words)}/confirmed/{rank}", "")
        if seen:
            confirmations = [f"{_prefix(seen)}/confirmed/{other}" for other in range(1, world_size)]
            if rank == 0 and store.check(confirmations):
                store.set(f"{_prefix(seen)}/go", "")
                return _prefix(seen)
            if rank and store.check([f"{_prefix(seen)}/go"]):
                return _prefix(seen)
        time.sleep(0.02)
    raise TimeoutError("the others did not come.")


def _prefix(words: str) -> str:
    return f"qvera/{hashlib.sha256(words.encode()).hexdigest()[:16]}"
