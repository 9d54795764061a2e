"""A request in an engine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qvera.serve.bank import HostVectors
    from qvera.serve.requests import Event, GenerationRequest
    from qvera.serve.sampling import TokenChooser

_logger = logging.getLogger(__name__)


class ActiveRequest:
    """A request that has not ended."""

    def __init__(
        self, request: GenerationRequest, on_event: Callable[[Event], None], vectors: HostVectors | None
    ) -> None:
        self.request, self.vectors = request, vectors
        self.slot = 0
        self.chooser: TokenChooser | None = None
        self.answer: list[int] = []
        self.ended = False
        self._on_event = on_event

    def send(self, event: Event) -> bool:
        """Pass an event on; False where the receiver failed, which ends nobody else's request."""
        try:
            self._on_event(event)
        except Exception:
            _logger.exception("the receiver of request %s failed", self.request.id)
            return False
        return True
