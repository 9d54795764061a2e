"""The curve of a learning-rate range test: when it has diverged, and which rate it suggests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qvera.evaluation.report.smoothing import smooth

_MEMORY = 0.8
"""Weight of the past in the running mean that the loss is watched by: about five steps."""

_DIVERGED = 2.0
"""Times its lowest that the running mean has to reach, besides being above where it began."""

RULE = "the rate at the lowest smoothed loss, for the peak of a schedule with warmup and decay"
"""Chosen after two recipes were seen, SmolLM2-135M, r=256: 0.046 where 0.03 was picked (quickstart), 0.07 where 0.1 was the best of
0.03, 0.1 and 0.2 (E2E); the steepest fall, another common rule, came to 0.008 and 0.014. Then held against a third (Alpaca, r=96
with two b and an a): 0.07 where 0.05 was the best of four; the steepest fall 0.0014."""


@dataclass(frozen=True)
class Found:
    """What a range test came to.

    Attributes:
        points: one record a step: ``step``, ``learning_rate``, ``loss`` (before that step; None where not finite),
            ``smoothed_loss``, ``grad_norm``, ``trained_tokens``, ``input_tokens``, ``step_seconds``.
        suggestion: a rate by `RULE`; None where the loss never fell.
        steepest: the rate at which the loss fell fastest, below which a run wastes steps; None likewise.
        diverged: the rate at which the test was stopped; None where it ran to its end.
    """

    points: list[dict[str, Any]]
    suggestion: float | None
    steepest: float | None
    diverged: float | None


class Watched:
    """Says when the loss has diverged: its running mean is above where it began and above twice its lowest.

    Both are needed: a loss that has fallen far may double by the noise of one batch, and one that barely falls is soon above its
    start.
    """

    def __init__(self) -> None:
        self.sum = self.weight = 0.0
        self.first = self.lowest = math.inf

    def diverged(self, loss: float) -> bool:
        """Take in one step's loss."""
        if not math.isfinite(loss):
            return True
        self.sum = _MEMORY * self.sum + (1 - _MEMORY) * loss
        self.weight = _MEMORY * self.weight + (1 - _MEMORY)
        mean = self.sum / self.weight  # without the pull of the zero it began with
        if self.first == math.inf:
            self.first = mean
        self.lowest = min(self.lowest, mean)
        return mean > self.first and mean > _DIVERGED * self.lowest


def read_curve(points: Sequence[dict[str, Any]]) -> tuple[list[float], float | None, float | None]:
    """Smoothed losses (of the points before the first that is not finite), the suggested rate, and the rate of the steepest fall.

    The smoothed loss is centred, so that it is not late; the steepest fall is that of a line through five neighbours, before the
    lowest loss.
    """
    finite = [point for point in points if point["loss"] is not None]
    rates = [math.log(point["learning_rate"]) for point in finite]
    curve = [y for _, y in smooth([(x, p["loss"]) for x, p in zip(rates, finite, strict=True)], width=len(points) / 30)]
    losses = [y for y in curve if y is not None]
    if len(losses) < 5:
        return losses, None, None
    lowest = min(range(len(losses)), key=losses.__getitem__)
    slopes = {
        at: _slope(rates[at - 2 : at + 3], losses[at - 2 : at + 3]) for at in range(2, min(lowest + 1, len(losses) - 2))
    }
    steepest = min(slopes, key=slopes.__getitem__, default=None)
    if steepest is None or slopes[steepest] >= 0:
        return losses, None, None
    return losses, math.exp(rates[lowest]), math.exp(rates[steepest])


def _slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of the line of least squares."""
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)
