"""Ctrl-C, SIGTERM and a closed terminal (SIGHUP) as requests to stop, handled where stopping loses nothing."""

import contextlib
import os
import signal
import sys
from types import FrameType
from typing import Self, TextIO

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class StopRequests:
    """Signals set ``asked`` to their name; a second SIGINT raises KeyboardInterrupt.

    What the process was started to ignore (SIGHUP under nohup) stays ignored.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self._terminals: list[TextIO] = []  # found at the start: one that is gone no longer says that it is one
        self._restore = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._terminals = [s for s in (sys.__stdout__, sys.__stderr__) if s is not None and s.isatty()]
        for number in _SIGNALS:
            if number != signal.SIGINT and signal.getsignal(number) is signal.SIG_IGN:
                continue
            try:
                self._restore.callback(signal.signal, number, signal.signal(number, self._ask))
            except ValueError:  # not the main thread (a notebook's worker): leave signals alone
                break
        return self

    def _ask(self, number: int, _: FrameType | None) -> None:
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name
        if self.asked == "SIGHUP":
            self._leave_terminal()

    def __exit__(self, *_: object) -> None:
        self._restore.close()

    def _leave_terminal(self) -> None:
        """A write to a terminal that is gone would fail."""
        for stream in self._terminals:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
