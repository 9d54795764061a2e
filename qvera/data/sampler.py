"""Which rows a step trains on, and how they are cut into forward passes. Only the step decides: nothing to save."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from qvera.config import plugins
from qvera.data.rows import lengths_of

if TYPE_CHECKING:
    from qvera.config.schema import Recipe
    from qvera.data.rows import Example

Row = TypeVar("Row")


def random_order(n: int, seed: int, stream: int) -> np.ndarray:
    """0..n-1 in an order that ``seed`` and ``stream`` decide, int64 [n].

    It sorts raw 64-bit words of Philox: numpy promises a bit generator's stream across versions, not what a Generator
    makes of it. Streams: epochs have 0, 1, ...; held-out rows -1; batches grouped by length -2, -3, ...;
    ``data.rows_per_label`` 2^62; sources of a mixture 2^63 and up. Epoch e of part p of the rows
    (`qvera.config.plugins.Schedule.batches`) has (p + 1) 2^32 + e.
    """
    # uint64 by hand: numpy makes floats of large mixed lists
    key = np.array([seed % 2**64, stream % 2**64], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable")


def weighted(count: int, weight: float, seed: int, number: int) -> np.ndarray:
    """Choose the row numbers of a source of ``count`` rows, int64: whole passes, then a part drawn by ``seed``.

    At least one row is chosen. ``number``, the source's place in the mixture, gives each source a draw of its own.
    """
    passes = int(weight)
    more = max(round((weight - passes) * count), 0 if passes else 1)
    chosen = np.sort(random_order(count, seed, 2**63 + number)[:more])
    return np.concatenate([np.tile(np.arange(count), passes), chosen])


def order(epoch: int, n: int, seed: int, shuffle: bool) -> np.ndarray:
    """The rows of one epoch (from 0) in training order, int64 [n]. Without ``shuffle`` it is file order."""
    return random_order(n, seed, epoch) if shuffle else np.arange(n)


def steps_per_epoch(n: int, global_batch_size: int) -> int:
    """Optimizer steps for one pass over ``n`` rows. The last step may have fewer rows."""
    return -(-n // global_batch_size)


_GROUPED_BATCHES = 50
"""Batches in a stretch that is sorted by length, as in transformers' LengthGroupedSampler."""


def grouped_by_length(chosen: np.ndarray, lengths: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Reorder one epoch (int64 [n], from `order`) so that batches of ``size`` rows hold rows of similar length.

    Batches come in random order, so that no epoch goes from long rows to short ones. A batch that is not full stays
    last.
    """
    stretches = [chosen[i : i + size * _GROUPED_BATCHES] for i in range(0, len(chosen), size * _GROUPED_BATCHES)]
    by_length = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in stretches])
    full = len(by_length) // size
    turns = random_order(full, seed, -2 - epoch)
    return np.concatenate([by_length[: full * size].reshape(full, size)[turns].ravel(), by_length[full * size :]])


@dataclass(slots=True)
class Batches:
    """Decides which rows each optimizer step trains on, and cuts them into forward passes; the same on every rank."""

    lengths: np.ndarray  # int [n], n >= 1; tokens of each row
    global_batch_size: int
    pass_rows: int = 1  # rows of one rank's forward pass, at most
    _: KW_ONLY
    pack_tokens: int | None = None  # instead of pass_rows: consecutive rows with up to this many tokens, or one row
    seed: int = 0
    shuffle: bool = True  # see `order`
    by_length: bool = False  # see `grouped_by_length`
    repeats: int = 1  # so many steps in a row have the same rows
    _last: tuple[int, np.ndarray] | None = field(default=None, init=False, repr=False)

    @property
    def per_epoch(self) -> int:
        """Optimizer steps of one pass over the rows."""
        return steps_per_epoch(len(self.lengths), self.global_batch_size) * self.repeats

    def epoch_order(self, epoch: int) -> np.ndarray:
        """The rows of one epoch in training order, int64 [n]."""
        if self._last is None or self._last[0] != epoch:
            chosen = order(epoch, len(self.lengths), self.seed, self.shuffle)
            if self.by_length:
                chosen = grouped_by_length(chosen, self.lengths, self.global_batch_size, self.seed, epoch)
            self._last = epoch, chosen
        return self._last[1]

    def rows(self, step: int) -> list[int]:
        """The rows of optimizer step ``step`` (from 0), for all processes together.

        Each epoch has every row once. A batch never mixes two epochs, so the last one of an epoch may be short.
        """
        epoch, position = divmod(step, self.per_epoch)
        start = position // self.repeats * self.global_batch_size
        return self.epoch_order(epoch)[start : start + self.global_batch_size].tolist()

    def stretches(self, steps: int) -> Iterator[Sequence[Sequence[int]]]:
        """Yield the rows of the first ``steps`` steps. Each list of a stretch may be given to `cut` as a whole.

        Without ``shuffle`` all epochs have the same order, so only the first is yielded.
        """
        size = self.global_batch_size
        for epoch in range(-(-steps // self.per_epoch)):
            left = -(-(steps - epoch * self.per_epoch) // self.repeats)
            chosen = self.epoch_order(epoch)[: left * size].tolist()
            # without packing a global batch is a multiple of a forward pass, so an epoch can be cut as a whole
            yield [chosen] if self.pack_tokens is None else list(microbatches(chosen, size))
            if not self.shuffle:
                break

    def limit(self, most: int) -> None:
        """Lower the most rows of a pass (packed rows: the most tokens) to ``most``, for all passes from now on."""
        if self.pack_tokens is None:
            self.pass_rows = min(self.pass_rows, most)
        else:
            self.pack_tokens = min(self.pack_tokens, most)

    def cut(self, rows: Sequence[int]) -> list[list[int]]:
        """One rank's rows as forward passes, in order."""
        if self.pack_tokens is None:
            return list(microbatches(rows, self.pass_rows))
        passes: list[list[int]] = []
        room = 0
        for row in rows:
            tokens = int(self.lengths[row])
            if not passes or tokens > room:
                passes.append([])
                room = self.pack_tokens
            passes[-1].append(row)
            room -= tokens
        return passes

    def passes(self, rows: Sequence[int], rank: int = 0, world_size: int = 1) -> list[list[int]]:
        """The forward passes of one rank over a global batch.

        Each rank gets its `share_of` the rows. All ranks get equally many passes, because some walk through the layers
        together. A pass without rows is ``[]``.
        """
        shares = [self.cut(share_of(rows, each, world_size)) for each in range(world_size)]
        return shares[rank] + [[] for _ in range(max(map(len, shares)) - len(shares[rank]))]


def share_of(rows: Sequence[Row], rank: int, world_size: int) -> Sequence[Row]:
    """A rank's run of consecutive rows. The runs of the ranks differ by one row at most."""
    share, more = divmod(len(rows), world_size)
    start = rank * share + min(rank, more)
    return rows[start : start + share + (rank < more)]


def microbatches(indices: Sequence[Row], size: int) -> Iterator[list[Row]]:
    """Cut a batch into consecutive microbatches of at most ``size`` rows."""
    return (list(indices[start : start + size]) for start in range(0, len(indices), size))


def batches_of(recipe: Recipe, rows: Sequence[Example]) -> Batches:
    """The batches of a run over its training rows.

    Raises InputError: there are too few rows for the recipe's schedule.
    """
    data, training = recipe.data, recipe.training
    sizes = lengths_of(rows), training.global_batch_size, training.per_device_train_batch_size
    pack_tokens = data.max_length if data.packing else None
    common: dict[str, Any] = {"pack_tokens": pack_tokens, "seed": data.seed, "shuffle": data.shuffle}
    common["repeats"] = training.updates_per_answers
    for schedule in plugins.schedules_of(data=data, training=training):
        if (batches := schedule.batches(recipe, rows, sizes, common)) is not None:
            return batches
    return Batches(*sizes, **common, by_length=data.group_by_length)


def planned_steps(recipe: Recipe, rows: int) -> int:
    """Optimizer steps of a run over that many training rows."""
    training = recipe.training
    per_epoch = steps_per_epoch(rows, training.global_batch_size) * training.updates_per_answers
    return training.max_steps if training.max_steps >= 0 else math.ceil(training.num_train_epochs * per_epoch)
