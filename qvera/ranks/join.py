"""Becoming part of a run of several processes, as a launcher's environment says, and leaving it."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import socket
from collections.abc import Iterator

import torch
import torch.distributed as dist

from ..errors import InputError, RunFailed, first_line
from .group import Group
from .heartbeat import Heartbeat, own_store

_VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_LOST = re.compile(r"gloo|NCCL|connection (was )?(closed|reset|refused)|socket|broken pipe", re.IGNORECASE)
"""What torch's collectives say when a peer is gone; they do not say which."""
JOIN_TIMEOUT = datetime.timedelta(minutes=5)
"""How long the processes of a run wait for the last of them to be started."""
COLLECTIVE_TIMEOUT = datetime.timedelta(hours=2)
"""The longest that ranks may be apart, such as while one of them writes or answers. A dead rank is noticed by `heartbeat`."""


def launched_ranks() -> int:
    """How many processes the launcher started for this run; 1 where there was none."""
    text = os.environ.get("WORLD_SIZE", "1")
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise InputError(f"WORLD_SIZE: is {text!r} in the environment; a launcher sets it to the number of processes.")
    return count


@contextlib.contextmanager
def in_group() -> Iterator[Group]:
    """For the time of the block, the group of the processes that a launcher (torchrun, deepspeed) started with this one.

    Where the calling program has set up torch.distributed already, its process group is used and left alone.

    Raises:
        InputError: the environment is that of a launcher in part only.
        RunFailed: the others did not come.
    """
    if dist.is_initialized():
        yield Group(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)))
        return
    count = launched_ranks()
    if count == 1:
        yield Group()
        return
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise InputError(
            f"WORLD_SIZE is {count} in the environment, but {', '.join(missing)} is not set. Start several processes with "
            "`qvera launch`, torchrun or deepspeed; for a single one unset WORLD_SIZE."
        )
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    _meet("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", count)
    group = Group(dist.get_rank(), count, local_rank)
    try:
        with Heartbeat(group, own_store()) as heartbeat:
            try:
                yield group
            except RuntimeError as error:
                if _LOST.search(str(error)):
                    heartbeat.find_the_dead()
                raise
            group.sum([0.0])  # rank 0 may serve the store: it must not go before the others are done with it
    finally:
        dist.destroy_process_group()


def _meet(backend: str, count: int) -> None:
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))
        store.set_timeout(JOIN_TIMEOUT)
        store = dist.PrefixStore("qvera", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)
    except (dist.DistError, TimeoutError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RunFailed(
            f"rank {os.environ['RANK']} on {socket.gethostname()} did not meet all {count} processes at {where} within "
            f"{JOIN_TIMEOUT.seconds // 60} minutes: one was not started, or can't reach that address ({first_line(error)})"
        ) from None
