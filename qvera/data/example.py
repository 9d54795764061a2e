"""What a tokenized row is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One row, ready for a batch.

    Attributes:
        input_ids: int32 [T].
        trained: bool [T]; ``trained[i]``: token i is a target (the logits at i - 1 are trained to give it). The first
            token has nothing before it, so it never is one.
        source: where the row came from, for messages.
        prompt_ids: int32 [P]; what the last assistant turn is generated from, BOS included. Empty for plain text and
            for rows that do not end with an assistant turn.
        prompt_text: the same as text (without a BOS that the tokenizer itself would add).
        reference: the content of that last assistant turn, or None.
    """

    input_ids: np.ndarray
    trained: np.ndarray
    source: str
    prompt_ids: np.ndarray
    prompt_text: str
    reference: str | None

    @property
    def trained_tokens(self) -> int:
        return int(self.trained.sum())
