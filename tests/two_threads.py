"""Two threads in place of an accelerator's two streams: work that is given in a wrong order gives wrong numbers.

An accelerator runs what the host gives it later, and two streams at the same time. Here a thread for each stream does
that with CPU tensors. A gate holds one thread back, so that a missing wait shows in every run and not by chance.
"""

import queue
import threading
from collections.abc import Callable
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qvera.models.stream import CopyStream


class _Event(threading.Event):
    def synchronize(self) -> None:
        assert self.wait(20), "a stream waits for an event that never happens"


class ThreadStream:
    """A stream: what it is given runs in order, in a thread. Within ``with stream:`` copies are given to it."""

    def __init__(self) -> None:
        self._work: queue.Queue[Callable[[], object]] = queue.Queue()
        self._deferred: list[_Deferred] = []
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            self._work.get()()
            self._work.task_done()

    def give(self, work: Callable[[], object]) -> None:
        """Run this after everything that was given before."""
        self._work.put(work)

    def drain(self) -> None:
        """Wait until everything is done."""
        self._work.join()

    def record_event(self) -> _Event:
        """As `torch.Stream.record_event`."""
        event = _Event()
        self.give(event.set)
        return event

    def wait_event(self, event: _Event) -> None:
        """As `torch.Stream.wait_event`."""
        self.give(event.synchronize)

    def __enter__(self) -> Self:
        self._deferred.append(_Deferred(self))
        self._deferred[-1].__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._deferred.pop().__exit__(*error)


class HostStream:
    """The stream of a CPU that computes at once: when something is given to it, everything before is done."""

    def record_event(self) -> _Event:
        """An event that has happened."""
        event = _Event()
        event.set()
        return event

    def wait_event(self, event: _Event) -> None:
        """Wait here."""
        event.synchronize()


class _Deferred(TorchDispatchMode):
    def __init__(self, stream: ThreadStream) -> None:
        super().__init__()
        self._stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **(kwargs or {}))
        self._stream.give(lambda: func(*args, **(kwargs or {})))
        return args[0]


class TwoThreads(CopyStream):
    """`CopyStream` over a thread that copies and ``computing``, which is another thread or the host."""

    def __init__(self, computing: ThreadStream | HostStream) -> None:
        self.device = torch.device("cpu")
        self._stream: Any = ThreadStream()
        self._computing = computing
        self.copied_bytes = 0

    @property
    def copying(self) -> ThreadStream:
        """The thread of the copies."""
        return self._stream

    def computing(self) -> Any:
        """The thread that computes, or the host."""
        return self._computing

    def copy(self, pairs: Any, after: Any = None) -> Any:
        """Count the bytes too."""
        pairs = list(pairs)
        self.copied_bytes += sum(source.numel() * source.element_size() for _, source in pairs)
        return super().copy(pairs, after)

    def keep(self, tensor: torch.Tensor) -> None:
        """CPU tensors are not reused by a stream."""
