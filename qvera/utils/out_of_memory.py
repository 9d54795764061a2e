"""Recognize out-of-memory errors, and go on after them.

torch raises `torch.OutOfMemoryError` on an accelerator and a plain RuntimeError on a CPU; Python raises MemoryError.
"""

from __future__ import annotations

import gc
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from qvera.utils import accelerator, memory
from qvera.utils.errors import OutOfMemory
from qvera.utils.formatting import size

if TYPE_CHECKING:
    import torch

_MESSAGE = re.compile(r"can't allocate memory|not enough memory|out of memory|ALLOC_FAILED", re.IGNORECASE)
_ASKED = re.compile(r"tried to allocate ([\d.]+) ?(bytes|KiB|MiB|GiB)", re.IGNORECASE)
_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30}

T = TypeVar("T")
Row = TypeVar("Row")


@dataclass(frozen=True)
class Shortage:
    """An allocation that failed."""

    asked_bytes: int | None  # None where the error does not say
    free_bytes: int  # of the device, or of RAM within the limit of the process's cgroup

    def __str__(self) -> str:
        asked = "an allocation failed" if self.asked_bytes is None else f"{size(self.asked_bytes)} were asked for"
        return f"{asked}, {size(self.free_bytes)} were free"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on an accelerator or in RAM."""
    import torch  # here, since commands that compute nothing do not wait for it

    known = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, known) or (isinstance(error, RuntimeError) and _MESSAGE.search(str(error)) is not None)


def asked_bytes(error: BaseException) -> int | None:
    """The size of the failed allocation; None where the error does not say."""
    found = _ASKED.search(str(error))
    return None if found is None else int(float(found[1]) * _UNITS[found[2].lower()])


def or_shortage(do: Callable[[], T], device: torch.device) -> T | Shortage:
    """The result of ``do``, or the shortage that it ran into.

    Its tensors are free then: the error that held them is gone.
    """
    try:
        return do()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        found = Shortage(asked_bytes(error), memory.available_bytes(device))
    gc.collect()
    accelerator.empty_cache()
    return found


def each_in_halves(
    batches: Iterable[list[Row]], do: Callable[[list[Row]], T], device: torch.device, rows: str, advice: str
) -> Iterator[tuple[list[Row], T]]:
    """Call ``do`` with each batch; yield the batch and the result.

    Where memory runs out, that batch and all later ones are halved, again and again, with a warning. OutOfMemory if a
    single one does not fit; ``advice`` ends its message. ``rows`` is the word for elements, such as ``prompts``.
    """
    most: int | None = None
    for batch in batches:
        waiting = deque([batch])
        while waiting:
            part = waiting.popleft()
            if most is not None and len(part) > most:
                waiting.extendleft(reversed([part[i : i + most] for i in range(0, len(part), most)]))
                continue
            result = or_shortage(lambda part=part: do(part), device)  # type: ignore[misc]
            if not isinstance(result, Shortage):
                yield part, result
                continue
            if len(part) == 1:
                raise OutOfMemory(f"Memory ran out with one of the {rows} at a time: {result}. {advice}")
            most = len(part) // 2
            waiting.appendleft(part)
            warnings.warn(
                f"Memory ran out with {len(part)} {rows} at a time ({result}); going on with {most}.", stacklevel=2
            )
