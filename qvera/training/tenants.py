"""Models of many tenants, trained on one base in shared passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class TokenRow(NamedTuple):
    """A row of a call: position t predicts ``targets[t]``, which need not be the next input."""

    tokens: np.ndarray  # int64 [N]
    targets: np.ndarray  # int64 [N, K]
    inputs: Mapping[str, np.ndarray]  # fp32 [N, K], by the names of `TOKEN_LOSSES`


class RowResults(NamedTuple):
    """What a call gives back."""

    logprobs: list[np.ndarray]  # fp32 [N, K] of each row, of all positions
    loss: float  # sum over the call
    metrics: dict[str, float]  # each name has exactly one ':'
