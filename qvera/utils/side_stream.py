"""Copies between RAM and an accelerator beside the computation: their own stream, and page-locked RAM.

An accelerator does the work of one stream in the order in which it was given, and the work of two streams at the same
time. Events order two streams: a stream that waits for an event starts nothing new until the event has happened. Only
copies from and to page-locked ("pinned") RAM run beside the computation.

Run so far on a CPU, on the fake accelerator of the tests, and with two threads in place of two streams
(tests/utils/test_side_stream.py); on no real accelerator.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from qvera.utils import accelerator

_LARGEST_PIECE_BYTES = 2**28
_SMALLEST_PIECE_BYTES = 2**20


class CopyStream:
    """A stream for copies, beside the stream that computes on a device.

    A device without streams (a CPU) copies at once, and its events are None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = self.new_stream()

    @property
    def asynchronous(self) -> bool:
        """Whether copies run beside the computation."""
        return self._stream is not None

    def new_stream(self) -> Any:
        """Return a new stream of the device; None where it has none."""
        if not accelerator.is_accelerator(self.device):
            return None
        try:
            return torch.Stream(device=self.device)
        except (RuntimeError, NotImplementedError):  # MPS: its one stream keeps the order by itself
            return None

    def computing_stream(self) -> Any:
        """Return the stream to which the calling thread gives its computations."""
        return torch.accelerator.current_stream(self.device)

    def mark(self) -> Any:
        """Return an event that happens when everything given to the computing stream so far is done."""
        return None if self._stream is None else self.computing_stream().record_event()

    def copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], after: Any) -> Any:
        """Copy each (destination, source) of the same shape, once the event ``after`` has happened.

        What still reads a destination, or writes a source, must have been given to the device before ``after``
        was marked.

        Returns:
            The event of the last copy. Whoever reads a destination, or overwrites a source, waits for it.
        """
        if self._stream is None:
            for destination, source in pairs:
                destination.copy_(source)
            return None
        self._stream.wait_event(after)
        with self._stream:
            for destination, source in pairs:
                destination.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def wait(self, event: Any) -> None:
        """Let everything that is given to the computing stream from now on wait for an event of `copy`."""
        if event is not None:
            self.computing_stream().wait_event(event)

    def keep(self, *tensors: torch.Tensor) -> None:
        """Do not let the allocator reuse these tensors, once they are freed, before the copies in flight are done."""
        if self._stream is not None:
            for tensor in tensors:
                tensor.record_stream(self._stream)


def pinned_bytes(size_bytes: int, device: torch.device) -> list[torch.Tensor]:
    """Page-locked RAM for copies to and from ``device``, as uint8 tensors that have ``size_bytes`` together.

    torch rounds each page-locked tensor up to a power of two bytes (its CachingHostAllocator), which for one large
    tensor can double it. So all pieces but the last are powers of two, and at most 1 MiB is lost.

    Raises:
        RuntimeError: the system does not lock so much.
    """
    sizes, left = [], size_bytes
    while left >= _SMALLEST_PIECE_BYTES:
        sizes.append(min(_LARGEST_PIECE_BYTES, 1 << (left.bit_length() - 1)))
        left -= sizes[-1]
    sizes += [left] if left else []
    pin = accelerator.is_accelerator(device)
    return [torch.empty(size, dtype=torch.uint8, pin_memory=pin) for size in sizes]
