"""Batches that come from one part of the rows at a time: from one task, or from one of two levels.

Like those of `Batches`, the rows of a step are a function of the step alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np

from qvera.data.sampler import Batches, random_order, steps_per_epoch

_TASK_ORDER, _LEVELS = 2**30, 2**30 + 1
"""The order of tasks and the split into levels are drawn as parts of these numbers; parts of rows have lower ones."""
_STRETCH_STEPS = 1024


@functools.lru_cache(maxsize=8)
def part_order(part: int, epoch: int, n: int, seed: int, shuffle: bool) -> np.ndarray:
    """0..n-1 in the order in which epoch ``epoch`` of part ``part`` has its rows, int64 [n]."""
    return random_order(n, seed, (part + 1) * 2**32 + epoch) if shuffle else np.arange(n)


@dataclass(slots=True)
class _PartBatches(Batches):
    """Each part has epochs of its own: a batch never mixes two of them, and an epoch's last batch may be short."""

    def part_rows(self, part: int, members: np.ndarray, batch: int) -> list[int]:
        """The rows of batch ``batch`` (from 0) of a part whose rows are ``members`` int64 [n]."""
        size = self.global_batch_size
        epoch, position = divmod(batch, steps_per_epoch(len(members), size))
        chosen = part_order(part, epoch, len(members), self.seed, self.shuffle)
        return members[chosen[position * size : (position + 1) * size]].tolist()

    def stretches(self, steps: int) -> Iterator[Sequence[Sequence[int]]]:
        """See `Batches.stretches`."""
        for first in range(0, steps, _STRETCH_STEPS):
            yield [self.rows(step) for step in range(first, min(first + _STRETCH_STEPS, steps))]


@dataclass(slots=True)
class TaskBatches(_PartBatches):
    """Each optimizer step trains on one task. Each round over the K tasks has every task once, in random order.

    Uniform over tasks, however many rows they have (multitask fine-tuning, arXiv 2203.04904). With ``steps_each`` above
    1 a task keeps its turn for that many steps; the paper trains one task after the other.

    Attributes:
        tasks: the rows of each task, int64 [n]; a row may be in several tasks.
        steps_each: consecutive steps on a task.
    """

    _: KW_ONLY
    tasks: Sequence[np.ndarray] = ()
    steps_each: int = 1

    def turn(self, step: int) -> tuple[int, int]:
        """The task of optimizer step ``step`` (from 0), and how many steps this task has had before."""
        turn, within = divmod(step, self.steps_each)
        round_, place = divmod(turn, len(self.tasks))
        task = part_order(_TASK_ORDER, round_, len(self.tasks), self.seed, self.shuffle)[place]
        return int(task), round_ * self.steps_each + within

    def rows(self, step: int) -> list[int]:
        """The rows of optimizer step ``step`` (from 0): a batch of its task's rows."""
        task, before = self.turn(step)
        return self.part_rows(task, self.tasks[task], before)


@functools.lru_cache(maxsize=1)
def split_levels(n: int, upper_share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """0..n-1 in two disjoint parts, each in order: the lower level's and, of a share of them, the upper level's."""
    count = min(max(round(n * upper_share), 1), n - 1)
    drawn = random_order(n, seed, (_LEVELS + 1) * 2**32)
    return np.sort(drawn[count:]), np.sort(drawn[:count])


@dataclass(slots=True)
class BilevelBatches(_PartBatches):
    """Steps on two disjoint parts of the rows in turn: ``lower_steps`` on the first, ``upper_steps`` on the second.

    From step ``retrain_from`` (from 0) on all rows are the lower level's (BiLoRA, arXiv 2403.13037).

    Attributes:
        upper_share: the share of the rows that the upper level trains on, at least one row of each level.
    """

    _: KW_ONLY
    upper_share: float = 0.2
    lower_steps: int = 1
    upper_steps: int = 1
    retrain_from: int | None = None

    def is_upper(self, step: int) -> bool:
        """Whether optimizer step ``step`` (from 0) is one of the upper level."""
        if self.retrain_from is not None and step >= self.retrain_from:
            return False
        return step % (self.lower_steps + self.upper_steps) >= self.lower_steps

    def level_rows(self, upper: bool) -> np.ndarray:
        """The rows of a level, in the order of the data, int64."""
        return split_levels(len(self.lengths), self.upper_share, self.seed)[upper]

    def rows(self, step: int) -> list[int]:
        """The rows of optimizer step ``step`` (from 0): a batch of its level's rows."""
        if self.retrain_from is not None and step >= self.retrain_from:
            return self.part_rows(2, np.arange(len(self.lengths)), step - self.retrain_from)
        cycle, place = divmod(step, self.lower_steps + self.upper_steps)
        upper = self.is_upper(step)
        batch = cycle * self.upper_steps + place - self.lower_steps if upper else cycle * self.lower_steps + place
        return self.part_rows(int(upper), self.level_rows(upper), batch)
