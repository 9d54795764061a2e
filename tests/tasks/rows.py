"""Labelled rows without a file."""

from __future__ import annotations

import numpy as np

from qvera.data import Example


def labelled(label: str, tokens: int = 3) -> Example:
    """A row of so many tokens with this label."""
    ids, nothing = np.arange(5, 5 + tokens, dtype=np.int32), np.zeros(0, np.int32)
    return Example(ids, np.arange(tokens) == tokens - 1, "rows:1", nothing, "text", label)
