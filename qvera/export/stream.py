"""The base's shards as a stream: read once from start to end, computed in order by several threads.

Every byte goes into its file's SHA-256 on the way. Where the export is to merge onto the dequantized base, each weight
is quantized and dequantized again, some rows at a time. 4-bit blocks are 64 consecutive elements of the flattened
weight. With double quantization the blocks' absolute maxima are quantized themselves, around their mean over the whole
weight (QLoRA, arXiv 2305.14314, section 3.2): so the maxima of the whole weight come first, then rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import queue
import threading
from collections.abc import Callable, Collection, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from qvera.config.schema import ModelSection
from qvera.models import quantization
from qvera.models.nf4 import BLOCK
from qvera.utils.errors import InputError, RunFailed
from qvera.utils.files import file_stamp, read_at
from qvera.utils.safetensors_io import TensorEntry

BLOCK_ELEMENTS = 1 << 20
"""Elements of a block of rows: its fp32 temporaries stay in the processor's cache."""

In = TypeVar("In")
Out = TypeVar("Out")


def absolute_maxima(rows: torch.Tensor) -> torch.Tensor:
    """The largest absolute value of each block of 64 elements, fp32; the last block may be short."""
    flat = rows.reshape(-1)
    whole = flat.numel() // BLOCK * BLOCK
    found = flat[:whole].view(-1, BLOCK).abs().amax(dim=1).float()
    if whole < flat.numel():
        found = torch.cat([found, flat[whole:].abs().amax().float().view(1)])
    return found


def row_step(columns: int, section: ModelSection) -> int:
    """Rows have to be taken in multiples of this many, so that no quantization block is cut in two."""
    four_bit = section.quantization in ("nf4", "fp4")
    return BLOCK // math.gcd(BLOCK, columns) if four_bit else 1


class FakeQuantization:
    """One weight as the trained base has it: quantized and dequantized again.

    Args:
        section: how the base was quantized.
        maxima: `absolute_maxima` of all rows of the weight, in order; None where it is not 4-bit.
        compute: the dtype it is dequantized to.
    """

    def __init__(self, section: ModelSection, maxima: torch.Tensor | None, compute: torch.dtype) -> None:
        self.section, self.absmax, self.compute = section, maxima, compute
        if maxima is not None and section.double_quant:
            self.absmax = quantization.double_quantized_absmax(maxima)

    @property
    def reads_original(self) -> bool:
        """Whether the weight was quantized from the stored values, as 4-bit weights are, or after a cast."""
        return self.absmax is not None

    def rows(self, weight: torch.Tensor, first: int) -> torch.Tensor:
        """Rows [k, n] of the weight from row ``first``, as the trained base has them, in the compute dtype."""
        if self.absmax is None:
            return quantization.quantize_dequantize(weight, self.section)
        at = first * weight.shape[1] // BLOCK
        absmax = self.absmax[at : at + -(-weight.numel() // BLOCK)]
        return quantization.quantize_dequantize_blocks(weight, absmax, self.section.quantization, self.compute)


@dataclasses.dataclass
class Block:
    """Rows [first, first + k) of a tensor, in the dtype of the file."""

    entry: TensorEntry
    first: int
    rows: torch.Tensor
    last: bool
    """Whether the tensor ends here."""
    fake_quantization: FakeQuantization | None
    """How the trained base had the weight; None where the file's own values are wanted."""
    transposed: bool = False
    """A Conv1D's [in, out], which is quantized as [out, in]; it comes whole where it has a ``fake_quantization``."""


class CheckpointReader:
    """Reads the tensors of a checkpoint in order.

    Args:
        entries: all of them, in the order they lie on disk.
        known: file name → SHA-256, where an earlier run read all of it.
        trained_on: how the base was quantized, and its compute dtype; None to take the weights as they are.
        quantized: names of the weights that were quantized.
        transposed: those of Conv1D, quantized as [out, in].
    """

    def __init__(
        self,
        entries: list[TensorEntry],
        known: dict[str, str],
        trained_on: tuple[ModelSection, torch.dtype] | None = None,
        quantized: Collection[str] = (),
        transposed: Collection[str] = (),
    ) -> None:
        self.files = list(dict.fromkeys(e.file for e in entries))
        self.entries, self.sha256 = entries, dict(known)
        self.trained_on, self.quantized, self.transposed = trained_on, quantized, transposed
        for entry in entries:
            if not entry.dtype.is_floating_point:
                raise InputError(f"{entry.file}: {entry.name} is {entry.dtype}, expected a floating-point weight.")

    def blocks(self, skip: Collection[str]) -> Iterator[Block]:
        """Every tensor in blocks of rows; those named in ``skip`` are only hashed, and not even that where it is known.

        Raises:
            RunFailed: a file changed or ended while it was read.
        """
        for file in self.files:
            wanted = [e for e in self.entries if e.file == file]
            known = file.name in self.sha256
            if known and all(e.name in skip for e in wanted):
                continue
            with open(file, "rb") as handle:
                before = file_stamp(os.fstat(handle.fileno()))
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                digest = None if known else hashlib.sha256(handle.read(wanted[0].start))
                for entry in wanted:
                    if known and entry.name in skip:
                        continue
                    for block in self._blocks_of(handle.fileno(), entry, entry.name in skip):
                        if digest is not None:
                            digest.update(block.rows.view(-1).view(torch.uint8).numpy().data)
                        if entry.name not in skip:
                            yield block
                if file_stamp(os.fstat(handle.fileno())) != before:
                    raise RunFailed(
                        f"{file}: was changed while it was read. Run the same command again when it is at rest."
                    )
            if digest is not None:
                self.sha256[file.name] = digest.hexdigest()

    def _blocks_of(self, descriptor: int, entry: TensorEntry, hash_only: bool) -> Iterator[Block]:
        if entry.start == entry.stop:
            return
        count = entry.shape[0] if entry.shape else 1
        columns = (entry.stop - entry.start) // count // entry.dtype.itemsize
        step = max(1, BLOCK_ELEMENTS // columns)
        transposed, fake_quantization = entry.name in self.transposed, None
        if self.trained_on is not None and not hash_only:
            section, compute = self.trained_on
            unit = row_step(columns, section)
            step = max(unit, (count if transposed else step) // unit * unit)
            if entry.name in self.quantized:
                maxima = None
                if section.quantization in ("nf4", "fp4"):
                    found = []
                    for _, rows in self._read(descriptor, entry, count, step):
                        # a Conv1D is quantized while loading, from weights in the compute dtype
                        found.append(absolute_maxima(rows.to(compute).t().contiguous() if transposed else rows))
                    maxima = torch.cat(found)
                fake_quantization = FakeQuantization(section, maxima, compute)
        for first, rows in self._read(descriptor, entry, count, step):
            yield Block(entry, first, rows, first + step >= count, fake_quantization, transposed)

    def _read(self, descriptor: int, entry: TensorEntry, count: int, step: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The ``count`` rows of a tensor, ``step`` at a time, each with the number of its first row."""
        row_bytes = (entry.stop - entry.start) // count
        for first in range(0, count, step):
            size = min(step, count - first)
            data = torch.empty(size * row_bytes, dtype=torch.uint8)
            if not read_at(descriptor, data.numpy().data, entry.start + first * row_bytes):
                raise RunFailed(
                    f"{entry.file}: ended within {entry.name} while it was read. Run the same command again when it is "
                    f"whole."
                )
            yield first, data.view(entry.dtype).view((size, *entry.shape[1:]) if entry.shape else ())


def stamps(entries: list[TensorEntry]) -> dict[str, list[int]]:
    """File → `file_stamp` of a checkpoint's files."""
    files: dict[str, Path] = {str(e.file.resolve()): e.file for e in entries}
    return {name: file_stamp(file.stat()) for name, file in sorted(files.items())}


def in_order(
    items: Iterator[In], compute: Callable[[In], Out], workers: int, waiting: int
) -> Generator[Out, None, None]:
    """``compute`` of each item, in order, by ``workers`` threads, while another thread draws the items.

    An error of ``items`` or of ``compute`` is raised where its result would come. Closing the iterator stops the
    threads.

    Args:
        items: drawn in one thread.
        compute: called in the workers.
        workers: how many threads compute.
        waiting: how many items may be drawn and not yet consumed. What bounds memory.
    """
    results: queue.Queue[Future[Out] | None] = queue.Queue()
    places = threading.Semaphore(waiting)
    stop = threading.Event()

    def draw(pool: ThreadPoolExecutor) -> None:
        try:
            while True:
                places.acquire()
                if stop.is_set():
                    return
                item = next(items, None)
                if item is None:
                    return
                results.put(pool.submit(compute, item))
        except BaseException as error:  # handed to the consumer
            failed: Future[Out] = Future()
            failed.set_exception(error)
            results.put(failed)
        finally:
            results.put(None)

    with ThreadPoolExecutor(workers, thread_name_prefix="compute") as pool:
        reader = threading.Thread(target=draw, args=(pool,), name="read", daemon=True)
        reader.start()
        try:
            while (future := results.get()) is not None:
                yield future.result()
                places.release()
        finally:
            stop.set()
            places.release()
            reader.join()
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def one_thread_each() -> Iterator[int]:
    """Torch computes with one thread for each thread that calls it; gives how many should (the cores of this process).

    Independent blocks on every core keep them busier than one block split between them, and the results then do not
    depend on how many cores there are.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 16)
    finally:
        torch.set_num_threads(before)
