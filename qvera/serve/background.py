"""Work that an engine does between steps of answers, and when its next slice may begin."""

import logging
import math
import time
from collections.abc import Callable
from typing import Protocol

from qvera.utils.errors import first_line

_logger = logging.getLogger(__name__)


class BackgroundWork(Protocol):
    """Work on the model for the time that answers leave, slice by slice."""

    def has_work(self) -> bool:
        """Whether there is a slice to do. Be quick: no step runs meanwhile. Call `Engine.wake` when it becomes true."""

    def run_slice(self) -> None:
        """Do one short slice in the engine's thread. No request gets a token meanwhile.

        It may change the model during the call. After an error, nothing is done until `Engine.wake` is called.
        """


class Background:
    """An engine's background works, a slice of each that has work in turn, and their share of the time.

    A slice begins at once if nobody was answered for ``answering_seconds``. Otherwise a slice of t seconds is followed
    by at least t · (1 - share) / share seconds of answers. That time counts as answering because a client that sends
    one request after the other leaves milliseconds between them, and would wait for a whole slice each time. Where a
    work raises, all are parked until ``failure`` is None again.
    """

    def __init__(
        self, share: float, clock: Callable[[], float] = time.perf_counter, answering_seconds: float = 1.0
    ) -> None:
        """``share`` of the time while answers run, from 0 (none) to 1."""
        self.clock, self._answering_seconds = clock, answering_seconds
        self.seconds, self.slices = 0.0, 0  # since the engine's start
        self.failure: str | None = None  # why the last slice failed; None: it went well
        self._pause = math.inf if share <= 0 else (1 - share) / share
        self._next_at = self._answered_at = -math.inf
        self._works: list[BackgroundWork] = []

    def set(self, *works: BackgroundWork) -> None:
        """Replace the works."""
        self._works, self.failure = list(works), None

    def answered(self) -> None:
        """Note that a step of answers has run."""
        self._answered_at = self.clock()

    def seconds_to_wait(self, answering: bool) -> float:
        """Seconds until a slice may begin. ``answering``: requests run or wait."""
        now = self.clock()
        free_at = self._next_at if answering else min(self._next_at, self._answered_at + self._answering_seconds)
        return max(free_at - now, 0.0)

    def has_slice(self, answering: bool) -> bool:
        """Whether a slice may begin now. ``answering``: requests run or wait."""
        works = self._works
        if self.failure is not None or self.seconds_to_wait(answering):
            return False
        try:
            return any(work.has_work() for work in works)
        except Exception as error:
            self._park(works, error)
            return False

    def run_slice(self) -> bool:
        """Do the slice that `has_slice` has found.

        Returns False if it failed. Then what it left behind in the model must be dropped.
        """
        works, began, went_well = self._works, self.clock(), True
        try:
            if (work := next((work for work in works if work.has_work()), None)) is None:  # there is none since
                return True
            works.remove(work)
            works.append(work)  # the others come first next time, also if it fails
            work.run_slice()
        except Exception as error:
            self._park(works, error)
            went_well = False
        ended = self.clock()
        self.seconds, self.slices = self.seconds + ended - began, self.slices + 1
        # the pause is infinite if training gets no time beside answers, and a slice may take none: inf · 0 is nan
        self._next_at = ended + (self._pause * (ended - began) if ended > began else 0.0)
        return went_well

    def _park(self, works: list[BackgroundWork], error: Exception) -> None:
        _logger.exception("background work failed; it is parked until it is woken")
        if works is self._works:  # and not others that were set meanwhile
            self.failure = f"{type(error).__name__}: {first_line(error)}"
