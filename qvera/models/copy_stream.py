"""Copies between an accelerator and RAM in a stream of their own, beside the stream that computes.

`CopyStream` orders the copies, `PinnedChunks` hands out page-locked RAM and takes it back. They serve whatever moves
tensors out of a device's memory and in again ahead of their use: the inputs of checkpointed layers
(`qvera.models.checkpointing`), or the layers of a base that is larger than the device.

The order of things, for whoever uses it:

- `CopyStream.copy` may be called as soon as the tensor's kernels were launched: the copy waits for them.
- The tensors of a copy must be kept alive until `CopyStream.wait` was called on its event. An allocator gives memory
  that was let go of to the next kernel of the computing stream, and that must not run before the copy.
- A copied tensor may be read after `CopyStream.wait`; kernels launched later then run after the copy.
- Copies of one `CopyStream` run one after the other. So a chunk may be given back, and taken for another copy of the
  same stream, while its last copy still waits to run.

No accelerator has run this. A fake one has, and tests/models/test_checkpointing.py runs it on a thread in a stream's
place, which shows a tensor that is read or let go of too early.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from qvera.utils import accelerator

CHUNK_BYTES = 2**24
"""16 MB: long enough for the bus's full rate. torch rounds page-locked memory up to a power of two, so pieces of one
size waste none of it, whatever the sizes of the tensors."""


class CopyStream:
    """A side stream of one device; see the module for the rules."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.Stream(device)

    def computing(self) -> Any:
        """The stream that computes; it is the calling thread's."""
        return accelerator.computing_stream(self.device)

    def mark(self) -> Any:
        """The event that all kernels launched so far have run."""
        return self.computing().record_event()

    def copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], after: Any = None) -> Any:
        """Copy each (destination, source) once all kernels launched so far have run; returns their event at once.

        ``after``: an earlier `mark` to wait for instead. A thread that does not compute needs one.
        """
        self._stream.wait_event(self.mark() if after is None else after)
        with self._stream:
            for destination, source in pairs:
                destination.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def wait(self, event: Any) -> None:
        """Let kernels that are launched from now on run after that event. The program itself goes on at once."""
        self.computing().wait_event(event)

    def keep(self, tensor: torch.Tensor) -> None:
        """Let the allocator reuse a tensor's memory only when the copies are through that run when it is let go of."""
        tensor.record_stream(self._stream)


class PinnedChunks:
    """Page-locked RAM in chunks of one size, each of them allocated once and used again."""

    def __init__(self, chunk_bytes: int = CHUNK_BYTES, pin_memory: bool = True) -> None:
        self.chunk_bytes, self._pin_memory = chunk_bytes, pin_memory
        self.allocated = 0
        self._free: list[torch.Tensor] = []

    def take(self, size_bytes: int) -> list[torch.Tensor]:
        """Chunks (uint8) that hold this many bytes together; the last one may be used in part."""
        count = -(-size_bytes // self.chunk_bytes)
        taken = [self._free.pop() for _ in range(min(count, len(self._free)))]
        while len(taken) < count:
            taken.append(torch.empty(self.chunk_bytes, dtype=torch.uint8, pin_memory=self._pin_memory))
            self.allocated += 1
        return taken

    def give(self, chunks: list[torch.Tensor]) -> None:
        """Take chunks back. Copies that were ordered with them may still be waiting to run, in the same stream."""
        self._free.extend(chunks)


def pairs(flat: torch.Tensor, chunks: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The pieces of a contiguous tensor as bytes, each beside the part of a chunk that holds it."""
    parts = flat.view(-1).view(torch.uint8).split(len(chunks[0]))
    return [(part, chunk[: len(part)]) for part, chunk in zip(parts, chunks, strict=True)]
