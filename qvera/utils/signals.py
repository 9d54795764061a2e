"""Ctrl-C and SIGTERM as a wish that is asked for at places where stopping loses nothing."""

from __future__ import annotations

import signal
from typing import Any


class StopRequests:
    """SIGINT and SIGTERM only set ``asked``, to the signal's name; a second SIGINT stops at once (KeyboardInterrupt)."""

    def __init__(self) -> None:
        self.asked: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._ask)
            except ValueError:  # not the main thread (a notebook's worker): leave signals alone
                break
        return self

    def _ask(self, number: int, _frame: Any) -> None:
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
