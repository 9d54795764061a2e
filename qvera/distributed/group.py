"""The processes of a run as its code sees them. A process on its own needs no torch; `processes` connects several.

All ranks have to call the methods of a group in the same order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

from qvera.utils.errors import InputError, QveraError

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

JSON = Any

T = TypeVar("T")
_Error = TypeVar("_Error", bound=QveraError)


@dataclasses.dataclass(frozen=True)
class Group:
    """The processes of this run. ``Group()`` is a process on its own."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    host: str = dataclasses.field(default_factory=socket.gethostname)
    store: dist.Store | None = dataclasses.field(default=None, compare=False, repr=False)
    """The launcher's key-value store, if there is one. It outlives processes that the launcher restarts."""

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the process that writes and prints."""
        return self.rank == 0

    def set_flag(self, name: str) -> None:
        """Set a flag that all processes of this launch see, also those that the launcher restarts."""
        if self.store is not None:
            self.store.set(f"qvera/flag/{name}", "")

    def has_flag(self, name: str) -> bool:
        """Whether a process of the same launch has set this flag."""
        return self.store is not None and bool(self.store.check([f"qvera/flag/{name}"]))

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sum of each number over all ranks, in fp64: counts up to 2**53 stay exact."""
        return [float(value) for value in values]

    def gather(self, value: JSON) -> list[JSON]:
        """Return the values of all ranks, by rank, on every rank."""
        return [value]

    def gather_bytes(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the small uint8 tensors of all ranks together, on every rank. Their names must differ."""
        return tensors

    def broadcast(self, value: JSON) -> JSON:
        """Return rank 0's value on every rank."""
        return value

    def broadcast_tensors(self, tensors: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
        """Return rank 0's CPU tensors on every rank. Those of the other ranks are ignored."""
        return tensors or {}

    def all_reduce(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all ranks, in place. They are sent as one bucket."""

    def on_first(self, do: Callable[[], JSON]) -> JSON:
        """Let rank 0 alone call ``do``, and return its result on every rank. Its QveraError is raised on every rank."""
        return do()

    def agree(self, do: Callable[[], T]) -> T:
        """Let every rank call ``do``, and return its own result. If one fails, all raise its QveraError."""
        return do()


ALONE = Group()


def for_all(error: _Error) -> _Error:
    """Mark an error that every rank raises at this place."""
    error.shared = True
    return error


def refuse_other_launchers() -> None:
    """Raise InputError where mpirun or srun started several processes that know nothing of each other."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        if "WORLD_SIZE" not in os.environ and os.environ.get(name, "1") != "1":
            raise InputError(
                f"{name} is {os.environ[name]} in the environment, but WORLD_SIZE is not set: each of these processes "
                f"would train the whole run. Start them with `qvera launch`; for a single one unset {name}."
            )


def in_group() -> AbstractContextManager[Group]:
    """Return the group of the processes that a launcher or the calling program started. Raises as `joined`."""
    # torch takes seconds to import. A program that has not imported it has set up no process group.
    if "torch" not in sys.modules and not {"WORLD_SIZE", "MASTER_ADDR"} & os.environ.keys():
        refuse_other_launchers()
        return contextlib.nullcontext(ALONE)
    from qvera.distributed.processes import joined

    return joined()
