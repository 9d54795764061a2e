"""Batches that begin and end together, by the model's ordinary pass and transformers' own cache.

For models that `qvera.serve.paged` can't run. New requests wait for the end of the running batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from qvera.evaluation.generate import CACHE_ARGUMENT, padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qvera.serve.engine import ActiveRequest


class StaticBatches:
    """Batch after batch, padded on the left as in `qvera.evaluation.generate`. For one thread."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._rows: list[ActiveRequest] = []
        self._mask = torch.empty(0)
        self._cache: Any = None

    @property
    def longest_tokens(self) -> int:
        """The most tokens that one request may have in all."""
        return int(self._model.config.get_text_config().max_position_embeddings)

    def may_begin(self) -> bool:
        """Whether no batch runs."""
        return all(row.ended for row in self._rows)

    def schedule(self, running: Collection[ActiveRequest]) -> list[tuple[ActiveRequest, int]]:
        """All rows of the batch, ended ones too, each with the columns of the next step."""
        if self.may_begin():
            self._rows, self._cache = list(running), None
        width = 1 if self._cache is not None else max(len(row.tokens) for row in self._rows)
        return [(row, width) for row in self._rows]

    def run(self, batch: Sequence[tuple[ActiveRequest, int]]) -> tuple[list[ActiveRequest], torch.Tensor]:
        """Run a step. Returns the rows that have not ended, and their logits [rows, vocabulary]."""
        device = self._model.device
        if self._cache is None:
            self._cache = DynamicCache(config=self._model.config)
            ids = padded([row.tokens for row in self._rows], 0).to(device)
            self._mask = padded([[1] * len(row.tokens) for row in self._rows], 0).to(device)
        else:
            ids = torch.tensor([row.tokens[-1:] for row in self._rows], device=device)
            self._mask = torch.cat([self._mask, torch.ones_like(ids)], 1)
        positions = (self._mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        logits = self._model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{CACHE_ARGUMENT: self._cache},
        ).logits[:, -1]
        going = [i for i, row in enumerate(self._rows) if not row.ended]
        return [self._rows[i] for i in going], logits[going]

    def end(self, request: ActiveRequest) -> None:
        """Do nothing: the row stays until the batch ends."""

    def reset(self) -> None:
        """Forget the batch."""
        self._rows, self._cache = [], None

    def paused(self) -> contextlib.nullcontext[None]:
        """The model always has its own attention."""
        return contextlib.nullcontext()

    def close(self) -> None:
        """Do nothing: the model was not changed."""
