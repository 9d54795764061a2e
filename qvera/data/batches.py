"""Which rows a step trains on, and rows → tensors. The order is a function of the step alone: nothing to save."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from .examples import Example

IGNORED = -100
"""The label of a token that is not trained (torch's ``cross_entropy`` default)."""


def philox_key(seed: int, stream: int) -> np.ndarray:
    """A key for numpy's Philox from two integers; uint64 by hand, because numpy makes floats of large mixed lists."""
    return np.array([seed % 2**64, stream % 2**64], dtype=np.uint64)


@lru_cache(maxsize=4)
def order(epoch: int, n: int, seed: int, shuffle: bool) -> np.ndarray:
    """The rows of one epoch in the order they are trained.

    Args:
        epoch: from 0.
        n: rows.
        seed: ``data.seed``; with the epoch it keys the generator (numpy Philox), so every epoch has its own order.
        shuffle: False: file order.

    Returns:
        int64 [n], each of 0..n-1 once; read-only, because it is cached.
    """
    if shuffle:
        # argsort of raw 64-bit words, not Generator.permutation: numpy promises the bit stream of a bit generator
        # across versions, not what a Generator makes of it.
        indices = np.argsort(np.random.Philox(key=philox_key(seed, epoch)).random_raw(n), kind="stable")
    else:
        indices = np.arange(n)
    indices.setflags(write=False)
    return indices


def steps_per_epoch(n: int, global_batch_size: int) -> int:
    """Optimizer steps that one pass over ``n`` rows takes; the last one may have fewer rows."""
    return -(-n // global_batch_size)


def global_batch(step: int, n: int, global_batch_size: int, seed: int, shuffle: bool) -> list[int]:
    """The rows of optimizer step ``step`` (from 0), whatever came before and however many processes share them.

    Each epoch has every row exactly once. A batch never mixes two epochs: the last one of an epoch may be short.

    Returns:
        1 to ``global_batch_size`` row indices.

    Raises:
        ValueError: ``n`` or ``global_batch_size`` below 1, or a negative step.
    """
    if n < 1 or global_batch_size < 1 or step < 0:
        raise ValueError(f"no batch {step} of {global_batch_size} rows out of {n}")
    epoch, position = divmod(step, steps_per_epoch(n, global_batch_size))
    start = position * global_batch_size
    return order(epoch, n, seed, shuffle)[start : start + global_batch_size].tolist()


def microbatches(indices: Sequence[int], size: int) -> Iterator[list[int]]:
    """Cut a batch into consecutive pieces of at most ``size`` rows, in order."""
    if size < 1:
        raise ValueError(f"microbatches of {size} rows")
    for start in range(0, len(indices), size):
        yield list(indices[start : start + size])


def rank_passes(rows: Sequence[int], rank: int, world_size: int, size: int) -> list[list[int]]:
    """The forward passes of one rank over a global batch: consecutive rows, at most ``size`` in each pass.

    The rows are cut into ``world_size`` runs that differ by one row at most, so every row is on exactly one rank, in the order of
    the batch. All ranks get equally many passes, because some walk through the layers together; one without rows is ``[]``.
    """
    if not 0 <= rank < world_size or size < 1:
        raise ValueError(f"no rank {rank} of {world_size} with passes of {size} rows")
    share, more = divmod(len(rows), world_size)
    start = rank * share + min(rank, more)
    mine = rows[start : start + share + (rank < more)]
    passes = list(microbatches(mine, size))
    most = share + (more > 0)
    return passes + [[] for _ in range(-(-most // size) - len(passes))]


def collate(examples: Sequence[Example], pad_id: int, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Rows of different lengths → one batch, padded on the right to the longest.

    Args:
        examples: B rows, at least one.
        pad_id: the token put where a row has ended; it is neither attended to nor trained.
        device: where the tensors go.

    Returns:
        ``input_ids`` int64 [B, T]; ``attention_mask`` int64 [B, T], 1 on real tokens; ``labels`` int64 [B, T], the
        token itself where it is trained and `IGNORED` elsewhere. Aligned with ``input_ids``: the loss shifts.
    """
    if not examples:
        raise ValueError("collate needs at least one row")
    length = max(len(example.input_ids) for example in examples)
    input_ids = np.full((len(examples), length), pad_id, dtype=np.int64)
    attention_mask = np.zeros((len(examples), length), dtype=np.int64)
    labels = np.full((len(examples), length), IGNORED, dtype=np.int64)
    for row, example in enumerate(examples):
        end = len(example.input_ids)
        input_ids[row, :end] = example.input_ids
        attention_mask[row, :end] = 1
        labels[row, :end] = np.where(example.trained, example.input_ids, IGNORED)
    arrays = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
