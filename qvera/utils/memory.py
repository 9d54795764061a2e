"""Measurements of the machine (memory, device name), and going on after memory ran out.

torch raises `torch.OutOfMemoryError` on an accelerator and a plain RuntimeError on a CPU; Python raises MemoryError.
"""

import contextlib
import functools
import gc
import platform
import re
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

import psutil
import torch

from qvera.utils import accelerator
from qvera.utils.cores import cgroups
from qvera.utils.errors import OutOfMemory
from qvera.utils.formatting import counted, size

_MESSAGE = re.compile(r"can't allocate memory|not enough memory|out of memory|ALLOC_FAILED", re.IGNORECASE)
_ASKED = re.compile(r"tried to allocate ([\d.]+) ?(bytes|KiB|MiB|GiB)", re.IGNORECASE)
_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30}

T = TypeVar("T")
Row = TypeVar("Row")


def memory_bytes(device: torch.device) -> int:
    """Return the memory held now: by tensors on the accelerator, or `private_bytes`."""
    allocated = accelerator.counted_bytes(device, "allocated")
    return private_bytes() if allocated is None else allocated


def private_bytes() -> int:
    """Return RssAnon + RssShmem + VmSwap, memory that can't be dropped without loss. Elsewhere: the resident set."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return psutil.Process().memory_info().rss
    wanted = ("RssAnon:", "RssShmem:", "VmSwap:")
    return 1024 * sum(int(line.split()[1]) for line in text.splitlines() if line.startswith(wanted))


def allocated_bytes() -> int | None:
    """Return malloc's memory in use by this process; None without glibc 2.33 or newer."""
    if not hasattr(psutil, "heap_info"):
        return None
    heap = psutil.heap_info()
    return int(heap.heap_used + heap.mmap_used)


@functools.cache
def kernel_bytes(dtype: torch.dtype) -> int:
    """Measure the bytes that the CPU's kernel cache takes for each new shape of a matrix product; 0 if unknown.

    `qvera.data.rows` says why it matters.
    """
    weight = torch.zeros(64, 64, dtype=dtype)
    readings = []
    for rows in range(3001, 3018):  # row counts that nothing else uses, or the kernel would be cached already
        torch.nn.functional.linear(weight.new_zeros(rows, 64), weight)
        readings.append(allocated_bytes() or 0)
    return max(0, readings[-1] - readings[0]) // (len(readings) - 1)


def mapped_weights_bytes() -> int:
    """Return the resident bytes of this process's mapped safetensors files; 0 where the system does not say."""
    try:
        maps = psutil.Process().memory_maps()
    except (AttributeError, psutil.Error):  # not on macOS
        return 0
    # in a hub cache the file behind the link has its hash for a name
    return sum(one.rss for one in maps if one.path.endswith(".safetensors") or "/blobs/" in one.path)


class PeakWatch:
    """Record the peak memory of a with-block: from the accelerator's allocator, else sampled every 20 ms."""

    INTERVAL_SECONDS = 0.02

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._highest_bytes = 0
        self._counted = False
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._counted = accelerator.reset_peak(self.device)
        if not self._counted:
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(self.INTERVAL_SECONDS):
            self._highest_bytes = max(self._highest_bytes, memory_bytes(self.device))

    @property
    def peak_bytes(self) -> int:
        """The most so far: private bytes of the process (CPU), or bytes that the accelerator's allocator held.

        The allocator also keeps gaps and free memory, so a run may need less.
        """
        counted = accelerator.counted_bytes(self.device, "reserved", peak=True) if self._counted else None
        return max(self._highest_bytes, memory_bytes(self.device)) if counted is None else counted

    @property
    def peak_tensor_bytes(self) -> int | None:
        """The most that tensors took at one time; None where the device does not count them."""
        return accelerator.counted_bytes(self.device, "allocated", peak=True) if self._counted else None

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._done.set()
            self._thread.join()


def available_bytes(device: torch.device) -> int:
    """Return the memory that can still be allocated: on the accelerator, or in RAM within the cgroup limit."""
    if (known := accelerator.free_and_total_bytes(device)) is not None:
        return known[0]
    return min([psutil.virtual_memory().available, *_cgroup_available()])


def _cgroup_available() -> Iterator[int]:
    """Yield the free bytes of each memory cgroup above this process; file pages count as free."""
    for directory, is_first in cgroups("memory"):
        limit, usage, cache = "memory.max", "memory.current", "file"
        if is_first:
            limit, usage, cache = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"
        with contextlib.suppress(OSError, ValueError):  # "max": no limit here
            most, held = int((directory / limit).read_text()), int((directory / usage).read_text())
            stat = dict(row.split() for row in (directory / "memory.stat").read_text().splitlines())
            yield most - held + int(stat.get(cache, 0))


def device_name(device: torch.device) -> str:
    """Name the device with what a timing depends on: the model of the card or processor, and torch's threads."""
    if accelerator.is_accelerator(device):
        return accelerator.card_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8") as handle:
        name = next(line.split(":", 1)[1].strip() for line in handle if line.startswith("model name"))
    return f"cpu: {name}, {counted(torch.get_num_threads(), 'thread')}"


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
    known = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, known) or (isinstance(error, RuntimeError) and _MESSAGE.search(str(error)) is not None)


def or_shortage(do: Callable[[], T], device: torch.device) -> T | Shortage:
    """Return the result of ``do``, or the shortage of memory that it ran into.

    After a shortage the tensors of ``do`` are free, because the error that held them is gone.
    """
    try:
        return do()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        said = _ASKED.search(str(error))
        asked_bytes = None if said is None else int(float(said[1]) * _UNITS[said[2].lower()])
        found = Shortage(asked_bytes, available_bytes(device))
    # Only here, outside of the except: within it, the error's traceback still holds the tensors of ``do``.
    gc.collect()
    accelerator.empty_cache()
    return found


def each_in_halves(
    batches: Iterable[list[Row]],
    do: Callable[[list[Row]], T],
    device: torch.device,
    rows: str,
    advice: str,
    together: bool = False,
) -> Iterator[tuple[list[Row], T]]:
    """Call ``do`` with each batch; yield the batch and the result.

    Where memory runs out, that batch and all later ones are halved, again and again, with a warning. OutOfMemory if a
    single one does not fit; ``advice`` ends its message. ``rows`` is the word for elements, such as ``prompts``.
    ``together``: the other ranks wait for this one's share of the weights in each batch, so a batch that does not fit
    raises at once.
    """
    most: int | None = None
    for batch in batches:
        waiting = deque([batch])
        while waiting:
            part = waiting.popleft()
            # Cut to the size that is tried now, in order: the results of a batch come in the order of its rows.
            if most is not None and len(part) > most:
                waiting.extendleft(reversed([part[i : i + most] for i in range(0, len(part), most)]))
                continue
            result = or_shortage(lambda part=part: do(part), device)  # type: ignore[misc]
            if not isinstance(result, Shortage):
                yield part, result
                continue
            if len(part) == 1 or together:
                many = f"one of the {rows}" if len(part) == 1 else f"{len(part)} {rows}"
                raise OutOfMemory(f"Memory ran out with {many} at a time: {result}. {advice}")
            most = len(part) // 2
            waiting.appendleft(part)
            warnings.warn(
                f"Memory ran out with {len(part)} {rows} at a time ({result}); going on with {most}.", stacklevel=2
            )
