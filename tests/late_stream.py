"""A thread in place of the stream that copies layers' inputs: as late as it may be, and without keeping a tensor alive."""

import queue
import random
import threading
import weakref
from collections.abc import Iterable
from typing import Any

import torch

CHUNK_BYTES = 4096


class Piece:
    """Bytes of a tensor that do not keep it alive, as a copy that was given to a device does not."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._storage = weakref.ref(tensor.untyped_storage())
        self._range = tensor.storage_offset(), tensor.numel()

    def tensor(self) -> torch.Tensor | None:
        storage = self._storage()
        if storage is None:
            return None
        start, count = self._range
        return torch.empty(0, dtype=torch.uint8).set_(storage, start, (count,))  # type: ignore[call-overload]


class LateStream:
    """A `CopyStream` over CPU tensors: a thread copies, as late as possible, and keeps no tensor alive.

    A copy runs when somebody waits for it or for a later one, or (``longest_seconds``) after a random time. What is
    copied in holds NaN until then. A tensor that was let go of before its copy ran is counted.
    """

    device = torch.device("cpu")

    def __init__(self, longest_seconds: float = 0.0) -> None:
        self.copies = self.dead = 0
        self.inputs_at_copies: list[int] = []
        self._inputs: weakref.WeakSet[Any] = weakref.WeakSet()
        self._random, self._longest_seconds = random.Random(0), longest_seconds
        self._tasks: queue.Queue[tuple[threading.Event, list[tuple[Piece, Piece]]] | None] = queue.Queue()
        self._needed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> threading.Event:
        done, pieces = threading.Event(), []
        for destination, source in pairs:
            for tensor in (destination, source):
                if tensor.untyped_storage().nbytes() != CHUNK_BYTES:
                    self._inputs.add(tensor.untyped_storage())
            if source.untyped_storage().nbytes() == CHUNK_BYTES:  # on its way in
                destination.fill_(255)
            pieces.append((Piece(destination), Piece(source)))
        self.inputs_at_copies.append(len(self._inputs))
        self._tasks.put((done, pieces))
        return done

    def wait(self, event: threading.Event) -> None:
        self._needed.set()
        assert event.wait(60)
        if not self._longest_seconds:
            self._needed.clear()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            self._needed.wait(self._random.random() * self._longest_seconds if self._longest_seconds else None)
            for destination, source in task[1]:
                self._copy_now(destination.tensor(), source.tensor())
            task[0].set()

    def _copy_now(self, destination: torch.Tensor | None, source: torch.Tensor | None) -> None:
        if destination is None or source is None:
            self.dead += 1
        else:
            destination.copy_(source)
            self.copies += 1

    def close(self) -> None:
        self._tasks.put(None)
        self._needed.set()
        self._thread.join()
