"""Answers in batches that begin and end together, by transformers' ordinary forward pass and cache.

The fallback where `continuous` does not know this transformers. Each step is one call of the model, padded on the
left as `qvera.evaluation.generate` does it. Requests that come while a batch runs wait for its end.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from qvera.evaluation.generate import CACHE_ARGUMENT, padded
from qvera.serve.active_request import ActiveRequest
from qvera.serve.requests import EngineSettings, TokenEvent
from qvera.serve.sampling import choose_tokens
from qvera.serve.threaded import ThreadedEngine

if TYPE_CHECKING:
    from qvera.models.loader import Base


class StaticEngine(ThreadedEngine):
    """An `Engine` that answers batch after batch."""

    def __init__(self, base: Base, settings: EngineSettings) -> None:
        super().__init__(base, settings)
        self._rows: list[ActiveRequest] = []
        self._mask = torch.empty(0)
        self._next = torch.empty(0)
        self._cache: Any = None

    def may_begin(self) -> bool:
        """Whether no batch runs."""
        return all(live.ended for live in self._rows)

    def begin(self, live: ActiveRequest) -> None:
        """Nothing: `step` makes a batch of all that are running."""

    def drop(self, live: ActiveRequest) -> None:
        """Nothing: `step` passes over rows that have ended."""

    def recover(self) -> None:
        """Forget the batch."""
        self._rows, self._cache = [], None

    def step(self) -> Iterable[tuple[ActiveRequest, TokenEvent | None]]:
        """One token for each row of the batch; a new batch where all rows of the last one have ended."""
        if all(live.ended for live in self._rows):
            self._rows = list(self.running.values())
            prompts = [live.request.prompt for live in self._rows]
            self._next = padded(prompts, 0).to(self.bank.device)
            self._mask = padded([[1] * len(prompt) for prompt in prompts], 0).to(self.bank.device)
            self._cache = DynamicCache(config=self.model.config)
        places = (self._mask.cumsum(-1) - 1).clamp(min=0)[:, -self._next.shape[1] :]
        self.bank.use([(live.vectors, live.slot, self._next.shape[1]) for live in self._rows])
        logits = self.model(
            input_ids=self._next,
            attention_mask=self._mask,
            position_ids=places,
            use_cache=True,
            logits_to_keep=1,
            **{CACHE_ARGUMENT: self._cache},
        ).logits[:, -1]
        going = [i for i, live in enumerate(self._rows) if not live.ended]
        choosers = [chooser for i in going if (chooser := self._rows[i].chooser) is not None]
        events = choose_tokens(logits[going], choosers)
        tokens = [0] * len(self._rows)
        for i, event in zip(going, events, strict=True):
            tokens[i] = 0 if event is None else event.token
        self._next = torch.tensor(tokens, device=self.bank.device).unsqueeze(1)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], 1)
        return [(self._rows[i], event) for i, event in zip(going, events, strict=True)]
