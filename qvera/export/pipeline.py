"""Reading, computing and writing at the same time, in order, with a bounded number of pieces in memory."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

In = TypeVar("In")
Out = TypeVar("Out")


def in_order(
    pieces: Iterator[In], compute: Callable[[In], Out], workers: int, waiting: int
) -> Generator[Out, None, None]:
    """``compute`` of each piece, in order, by ``workers`` threads, while another thread draws the pieces.

    Args:
        waiting: how many pieces may be drawn and not yet consumed. What bounds memory.

    An error of ``pieces`` or of ``compute`` is raised where its result would come. Closing the iterator stops the threads.
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
                piece = next(pieces, None)
                if piece is None:
                    return
                results.put(pool.submit(compute, piece))
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

    Independent pieces on every core keep them busier than one piece split between them, and the numbers then do not depend
    on how many cores there are.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 16)
    finally:
        torch.set_num_threads(before)


def empty_bytes(size: int) -> tuple[torch.Tensor, memoryview]:
    """Uninitialised bytes as a tensor and as a buffer to read into."""
    data = torch.empty(size, dtype=torch.uint8)
    buffer: Any = data.numpy()
    return data, memoryview(buffer)
