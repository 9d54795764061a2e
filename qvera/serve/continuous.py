"""Answers as they come: each step runs the next token of every request, and prompts that have arrived since.

`paged` says what is taken from transformers and why; `bank` how each token gets its own adapter's vectors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from qvera.serve.active_request import ActiveRequest
from qvera.serve.paged import PagedModel, Scheduled
from qvera.serve.requests import EngineSettings, TokenEvent
from qvera.serve.sampling import choose_tokens
from qvera.serve.threaded import ThreadedEngine

if TYPE_CHECKING:
    from qvera.models.loader import Base


class ContinuousEngine(ThreadedEngine):
    """An `Engine` in which requests join and leave the batch at any step.

    An adapter whose vectors make hidden states that are not finite would spoil what shares its batch, since masked
    attention multiplies by 0, and 0 · NaN is NaN. Such a step does not count: each of its requests then runs a step
    alone, which shows whose fault it was, and the others go on together.
    """

    def __init__(self, base: Base, settings: EngineSettings) -> None:
        super().__init__(base, settings)
        self._paged = PagedModel(base.model, settings, self._choose, self._identity)
        self._chosen: list[tuple[ActiveRequest, TokenEvent | None]] = []
        self._suspects: deque[ActiveRequest] = deque()
        """Requests of a step that did not count; the first of them runs alone."""
        self._alone: ActiveRequest | None = None
        """The suspect that runs now."""
        self._cleared: list[ActiveRequest] = []
        self._batch: list[Scheduled] = []

    @property
    def longest_tokens(self) -> int:
        """How many tokens prompt and answer may have together."""
        return self._paged.longest_tokens

    def close(self) -> None:
        """See `Engine.close`."""
        super().close()
        self._paged.close()

    def may_begin(self) -> bool:
        """Not while requests run alone."""
        return not self._suspects and not self._cleared

    def begin(self, live: ActiveRequest) -> None:
        """Queue a request, or what is left of it."""
        sampling = live.request.sampling
        left = sampling.max_tokens - len(live.answer)
        self._paged.add(live.request.id, [*live.request.prompt, *live.answer], left, sorted(sampling.stop_tokens))

    def drop(self, live: ActiveRequest) -> None:
        """Leave a request out of the next step."""
        self._paged.cancel(live.request.id)

    def recover(self) -> None:
        """Forget all requests and their keys and values."""
        self._paged.reset()
        self._suspects.clear()
        self._cleared.clear()
        self._alone = None

    def step(self) -> Iterable[tuple[ActiveRequest, TokenEvent | None]]:
        """See `ThreadedEngine.step`."""
        self._chosen = []
        if self._suspects or self._cleared:
            self._go_on_alone()
        self._batch = self._paged.prepare()
        if not self._batch:
            return []
        lives = [(self.running[one.request_id], one.tokens) for one in self._batch]
        self.bank.use([(live.vectors, live.slot, tokens) for live, tokens in lives])
        self._paged.run()
        if self._suspects and self._chosen:
            (live, event), self._alone = self._chosen[0], None
            self._suspects.popleft()
            if event is not None:
                self._cleared.append(live)
        return self._chosen

    def _go_on_alone(self) -> None:
        """Queue the next suspect and nobody else; after the last one, all that are left."""
        while self._suspects and self._suspects[0].ended:
            self._suspects.popleft()
        if self._suspects and self._alone is self._suspects[0]:
            return  # its prompt takes several steps
        self._paged.reset()
        self._alone = self._suspects[0] if self._suspects else None
        if self._alone is not None:
            self.begin(self._alone)
            return
        for live in self._cleared:
            if not live.ended:
                self.begin(live)
        self._cleared.clear()

    def _identity(self, request_id: str) -> str:
        vectors = self.running[request_id].vectors
        return "" if vectors is None else vectors.identity

    def _choose(self, logits: torch.Tensor, new: Sequence[Scheduled]) -> Sequence[int] | None:
        lives = [self.running[one.request_id] for one in new]
        # rows beyond those of new tokens are of the first token: they show a spoilt batch too
        finite = torch.isfinite(logits.sum(-1)).tolist()
        bad = [live for live, good in zip(lives, finite, strict=False) if not good]
        if len(self._batch) > 1 and (len(bad) > 1 or not all(finite[len(lives) :])):
            self._suspects, self._alone = deque(self.running.values()), None
            return None
        choosers = [chooser for live in lives if (chooser := live.chooser) is not None]
        events = choose_tokens(logits[: len(lives)], choosers)
        self._chosen = list(zip(lives, events, strict=True))
        return [0 if event is None else event.token for event in events]
