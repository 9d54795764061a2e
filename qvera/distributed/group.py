"""The processes of a run, and collectives for numbers, JSON and tensors.

Nothing is pickled: torch's object collectives pickle, these send JSON as bytes. All ranks have to call them in the same
order. With one process nothing is sent, and torch.distributed need not be set up.
"""

import dataclasses
import json
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from qvera.utils import accelerator
from qvera.utils.errors import InputError, Interrupted, OwnCodeFailed, QveraError, RunFailed

JSON = Any

T = TypeVar("T")
_Error = TypeVar("_Error", bound=QveraError)
_ERRORS: dict[str, type[QveraError]] = {
    cls.__name__: cls for cls in (InputError, Interrupted, OwnCodeFailed, RunFailed, QveraError)
}


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
        if self.world_size == 1:
            return [float(value) for value in values]
        total = torch.tensor([float(value) for value in values], dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: JSON) -> list[JSON]:
        """Return the values of all ranks, by rank, on every rank."""
        if self.world_size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(lengths, torch.tensor([text.numel()]))
        longest = max(int(length) for length in lengths)
        padded = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world_size)]
        dist.all_gather(padded, torch.cat([text, text.new_zeros(longest - text.numel())]))
        return [json.loads(bytes(p[: int(n)].numpy())) for p, n in zip(padded, lengths, strict=True)]

    def gather_bytes(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the small uint8 tensors of all ranks together, on every rank. Their names must differ."""
        if self.world_size == 1:
            return tensors
        found: dict[str, str] = {}
        for one in self.gather({name: bytes(tensor.numpy()).hex() for name, tensor in tensors.items()}):
            found |= one
        return {name: torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8) for name, text in found.items()}

    def broadcast(self, value: JSON) -> JSON:
        """Return rank 0's value on every rank."""
        return self.gather(value if self.first else None)[0]

    def broadcast_tensors(self, tensors: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
        """Return rank 0's CPU tensors on every rank. Those of the other ranks are ignored."""
        if self.world_size == 1:
            return tensors or {}
        given = tensors if self.first and tensors is not None else {}
        head = self.broadcast([[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in given.items()])
        received = {}
        for name, dtype, shape in head:
            tensor = given[name].contiguous() if self.first else torch.empty(shape, dtype=getattr(torch, dtype))
            if tensor.numel():
                dist.broadcast(tensor.reshape(-1).view(torch.uint8), 0)
            received[name] = tensor
        return received

    def all_reduce(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all ranks, in place. They are sent as one bucket."""
        if self.world_size == 1 or not tensors:
            return
        bucket = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(bucket)
        parts = bucket.split([tensor.numel() for tensor in tensors])
        views = [part.view_as(tensor) for tensor, part in zip(tensors, parts, strict=True)]
        torch._foreach_copy_(list(tensors), views)  # in few launches

    def measure_network(self) -> tuple[float, float]:
        """Time all-reduces where gradients lie: seconds for one number, bytes per second for 4 MB. Medians of five."""
        device = accelerator.current_device()

        def seconds(numel: int) -> float:
            taken = []
            for _ in range(5):
                tensor = torch.zeros(numel, device=device)
                dist.barrier()
                began = time.perf_counter()
                dist.all_reduce(tensor)
                accelerator.synchronize()
                taken.append(time.perf_counter() - began)
            return sorted(taken)[2]

        return seconds(1), 4 * 2**20 / seconds(2**20)

    def on_first(self, do: Callable[[], JSON]) -> JSON:
        """Let rank 0 alone call ``do``, and return its result on every rank. Its QveraError is raised on every rank."""
        found = self.broadcast(_outcome(do) if self.first else None) if self.world_size > 1 else {"value": do()}
        if "error" in found:
            raise for_all(_ERRORS[found["error"]](found["text"]))
        return found["value"]

    def agree(self, do: Callable[[], T]) -> T:
        """Let every rank call ``do``, and return its own result. If one fails, all raise its QveraError."""
        if self.world_size == 1:
            return do()
        mine = _outcome(do)
        found = self.gather({"host": self.host, **{k: v for k, v in mine.items() if k != "value"}})
        failed = [i for i, one in enumerate(found) if "error" in one]
        if failed:
            text = found[failed[0]]["text"]
            if len(failed) < self.world_size:
                text = f"rank {failed[0]} on {found[failed[0]]['host']}: {text}"
            raise for_all(_ERRORS[found[failed[0]]["error"]](text))
        return mine["value"]


ALONE = Group()


def for_all(error: _Error) -> _Error:
    """Mark an error that every rank raises at this place."""
    error.shared = True
    return error


def _outcome(do: Callable[[], object]) -> dict[str, Any]:
    try:
        return {"value": do()}
    except QveraError as error:
        kind = next((name for name, cls in _ERRORS.items() if isinstance(error, cls)), "QveraError")
        return {"error": kind, "text": str(error)}
