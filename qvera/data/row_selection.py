"""Which raw rows of a source are trained on and which are held out, one at a time: nothing is held that was read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qvera.config.schema import DataSection
from qvera.data.readers import RawRow, read_rows
from qvera.data.sampler import philox_key

TRAIN, EVAL = "train", "eval"
CHUNK_ROWS = 256
"""Raw rows that are tokenized together."""


def raw_rows(section: DataSection, path: str) -> Iterator[RawRow]:
    """The raw rows of ``data.path`` or ``data.eval_path``, one at a time."""
    if path == section.path or not Path(path).expanduser().exists():
        rows = read_rows(path, split=section.split, config_name=section.config_name, revision=section.revision)
    else:  # a local eval file beside a hub dataset: the hub's keys are not about it
        rows = read_rows(path)
    return itertools.islice(rows, section.limit if path == section.path else None)


def count_rows(section: DataSection, path: str) -> int:
    return sum(1 for _ in raw_rows(section, path))


def hold_out(count: int, fraction: float, seed: int) -> np.ndarray:
    """Which rows are held out: bool [count], at least one of each kind where any are.

    Args:
        fraction: of them to hold out, 0 <= fraction < 1; 0 holds out none. Above 0 there must be two rows.
        seed: decides which.
    """
    held = np.zeros(count, dtype=bool)
    if fraction > 0:
        chosen = min(max(1, round(count * fraction)), count - 1)
        # The second key word keeps this stream apart from the epochs' (batches.order counts them up from 0).
        words = np.random.Philox(key=philox_key(seed, -1)).random_raw(count)
        held[np.argsort(words, kind="stable")[:chosen]] = True
    return held


def chosen_rows(section: DataSection, part: str, count: int) -> Iterator[RawRow]:
    """The raw rows of the training or of the held-out part, in file order; ``count``: rows of ``data.path``."""
    if section.eval_path is not None:
        path = section.path if part == TRAIN else section.eval_path
        return itertools.islice(raw_rows(section, path), section.eval_limit if part == EVAL else None)
    held = hold_out(count, section.eval_fraction, section.seed)
    wanted = held if part == EVAL else ~held
    rows = (row for row, taken in zip(raw_rows(section, section.path), wanted, strict=False) if taken)
    return itertools.islice(rows, section.eval_limit if part == EVAL else None)


def chunks_of(rows: Iterator[RawRow]) -> Iterator[list[RawRow]]:
    """The rows in lists of `CHUNK_ROWS`."""
    while chunk := list(itertools.islice(rows, CHUNK_ROWS)):
        yield chunk
