"""Work that an engine does between the steps of answers: when the next part of it may begin."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from qvera.utils.errors import first_line

if TYPE_CHECKING:
    from qvera.serve.engine import BackgroundWork

_logger = logging.getLogger(__name__)
_ANSWERING_SECONDS = 1.0
"""So long after its last step an engine counts as answering."""


class Background:
    """An engine's background work and its share of the time.

    A part begins at once where there has been nobody to answer for a second. Else a part that took t seconds is
    followed by at least t · (1 - share) / share seconds of answers. That second counts as time of answers: a client
    that sends one request after the other leaves some milliseconds between them, and would wait for a whole part each
    time. Work that raises an error is parked until somebody calls `resume`.

    Attributes:
        seconds, parts: what it has taken since the engine's start.
        failure: the error of the last part; None where it went well.
    """

    def __init__(self, share: float, clock: Callable[[], float] = time.perf_counter) -> None:
        """``share``: of the time while answers run, 0 (none) to 1."""
        self.clock = clock
        self.seconds, self.parts = 0.0, 0
        self.failure: str | None = None
        self._pause = math.inf if share <= 0 else (1 - share) / share
        self._next_at = self._answered_at = -math.inf
        self._work: BackgroundWork | None = None

    def set(self, work: BackgroundWork | None) -> None:
        """Take on this work in place of the one before."""
        self._work, self.failure = work, None

    def resume(self) -> None:
        """Try work again that was parked."""
        self.failure = None

    def answered(self) -> None:
        """Note that a step of answers was taken."""
        self._answered_at = self.clock()

    def seconds_to_wait(self, answering: bool) -> float:
        """How long no part may begin, from now on; 0: one may begin. ``answering``: requests run or wait."""
        now = self.clock()
        free_at = self._next_at if answering else min(self._next_at, self._answered_at + _ANSWERING_SECONDS)
        return max(free_at - now, 0.0)

    def has_part(self, answering: bool) -> bool:
        """Whether a part may begin now. ``answering``: requests run or wait."""
        work = self._work
        if work is None or self.failure is not None or self.seconds_to_wait(answering):
            return False
        try:
            return work.has_work()
        except Exception as error:
            self._park(work, error)
            return False

    def run_slice(self) -> bool:
        """Do the part that `has_part` found; False: it failed, and whatever it left in the model is to be forgotten."""
        work, began = self._work, self.clock()
        if work is None:  # taken away since
            return True
        try:
            work.run_slice()
        except Exception as error:
            self._park(work, error)
            went_well = False
        else:
            went_well = True
        ended = self.clock()
        self.seconds, self.parts = self.seconds + ended - began, self.parts + 1
        # the pause is infinite where training gets no time beside answers, and a part may take no time at all
        self._next_at = ended + (self._pause * (ended - began) if ended > began else 0.0)
        return went_well

    def _park(self, work: BackgroundWork, error: Exception) -> None:
        _logger.exception("background work failed; it is parked until it is woken")
        if work is self._work:  # and not another one that was set meanwhile
            self.failure = f"{type(error).__name__}: {first_line(error)}"
