"""Ctrl-C, SIGTERM and a closed terminal (SIGHUP) as requests to stop, handled where stopping loses nothing."""

import contextlib
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from types import FrameType
from typing import Self, TextIO, TypeVar

T = TypeVar("T")
R = TypeVar("R")
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class StopRequests:
    """Signals set ``asked`` to their name, and say on standard error what is done first; a second SIGINT stops at once.

    To stop is to raise KeyboardInterrupt with the signal's name. What the process was started to ignore (SIGHUP under
    nohup) stays ignored.

    Args:
        first: what is done before stopping, as ``saving after this step``; None: nothing, a signal stops at once.
        quiet: say nothing.
    """

    def __init__(self, first: str | None = "stopping at the next place to go on from", quiet: bool = False) -> None:
        self.asked: str | None = None
        self._first, self._quiet = first, quiet
        self._taken: list[int] = []
        self._terminals: list[TextIO] = []  # found at the start: one that is gone no longer says that it is one
        self._restore = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._terminals = [s for s in (sys.__stdout__, sys.__stderr__) if s is not None and s.isatty()]
        if threading.current_thread() is not threading.main_thread():  # a notebook's worker: leave signals alone
            return self
        self._watch()
        for number in _SIGNALS:
            if number != signal.SIGINT and signal.getsignal(number) is signal.SIG_IGN:
                continue
            self._restore.callback(signal.signal, number, signal.signal(number, self._ask))
            self._taken.append(number)
        return self

    def _watch(self) -> None:
        """Announce signals from a thread: Python calls `_ask` only once the main thread's operation has ended."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        teller = threading.Thread(target=self._tell, args=(reader,), name="qvera-signals", daemon=True)
        self._restore.callback(teller.join, 1)  # so that what it says stands before what comes after
        self._restore.callback(os.close, writer)
        self._restore.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(writer, warn_on_full_buffer=False))
        teller.start()

    def _tell(self, reader: int) -> None:
        is_told = self._quiet
        with os.fdopen(reader, "rb", buffering=0) as numbers, contextlib.suppress(OSError):  # a terminal that is gone
            while number := numbers.read(1):  # none: the writer is closed
                if number[0] in self._taken and not is_told:
                    is_told = True
                    wait = f"{self._first}; press Ctrl-C again to stop at once"
                    does = "stopping now" if self._first is None else wait
                    print(f"\n{signal.Signals(number[0]).name}: {does}.", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def waiting(self, first: str) -> Iterator[None]:
        """Defer signals within the block; ``first`` says what is done before stopping."""
        before, self._first = self._first, first
        try:
            yield
        finally:
            self._first = before

    def _ask(self, number: int, _: FrameType | None) -> None:
        is_second, name = self.asked is not None, signal.Signals(number).name
        self.asked = self.asked or name
        if name == "SIGHUP":
            self._leave_terminal()
        if self._first is None or (is_second and number == signal.SIGINT):
            raise KeyboardInterrupt(name)

    def __exit__(self, *_: object) -> None:
        self._restore.close()

    def _leave_terminal(self) -> None:
        """Redirect output to nowhere, because a write to a terminal that is gone would fail."""
        for stream in self._terminals:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def in_threads(do: Callable[[T], R], items: Sequence[T], most: int) -> Iterator[tuple[int, R]]:
    """Do something with each item, ``most`` at a time; yield an item's number and result as they come.

    The threads end with the process: Ctrl-C, or an error of one item, does not wait for what a server answers others.
    """
    waiting, is_over = queue.SimpleQueue[tuple[int, T]](), threading.Event()
    ended = queue.SimpleQueue[tuple[int, Future[R]]]()
    for numbered in enumerate(items):
        waiting.put(numbered)

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while not is_over.is_set():
                number, item = waiting.get_nowait()
                future = Future[R]()
                try:
                    future.set_result(do(item))
                except BaseException as error:
                    future.set_exception(error)
                    is_over.set()  # an error of one ends all
                ended.put((number, future))

    for _ in range(min(most, len(items))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in items:
            number, future = ended.get()
            yield number, future.result()  # raises what it raised
    finally:
        is_over.set()
