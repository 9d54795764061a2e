"""The points of a curve: fewer of them, and smoother ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

Point = tuple[float, float | None]
"""x (a step) and y; None: no value there, a gap in the curve."""

MOST_POINTS = 500
"""Points of a curve in the page; a longer run is thinned to this, so that the page stays small."""


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most ``most`` points: means of equal runs of neighbours, placed at each run's last x.

    A run with no value at all stays a gap.
    """
    if len(points) <= most:
        return list(points)
    thinned: list[Point] = []
    for index in range(most):
        run = points[index * len(points) // most : (index + 1) * len(points) // most]
        values = [y for _, y in run if y is not None]
        thinned.append((run[-1][0], sum(values) / len(values) if values else None))
    return thinned


def median_of_five(points: Sequence[Point]) -> list[Point]:
    """Each value replaced by the median of itself and two neighbours on either side (fewer near the ends).

    Single spikes vanish, steps stay where they are; gaps stay gaps.
    """
    result: list[Point] = []
    for index, (x, y) in enumerate(points):
        reach = min(2, index, len(points) - 1 - index)
        near = sorted(value for _, value in points[index - reach : index + reach + 1] if value is not None)
        result.append((x, near[len(near) // 2] if y is not None else None))
    return result


def smooth(points: Sequence[Point], width: float) -> list[Point]:
    """A running mean with Gaussian weights over medians of five, centred, so that the curve is not late.

    The medians keep one outlier from becoming a hill as wide as the weights.

    Args:
        points: gaps stay gaps and weigh nothing.
        width: the standard deviation of the weights, in points; 0: unchanged.
    """
    if width <= 0:
        return list(points)
    medians = median_of_five(points)
    reach = math.ceil(3 * width)
    weights = [math.exp(-0.5 * (offset / width) ** 2) for offset in range(-reach, reach + 1)]
    smoothed: list[Point] = []
    for index, (x, y) in enumerate(medians):
        if y is None:
            smoothed.append((x, None))
            continue
        # the same reach on both sides, also near the ends: a one-sided mean would bend a falling curve
        around = min(reach, index, len(medians) - 1 - index)
        total = weight_sum = 0.0
        for neighbour in range(index - around, index + around + 1):
            value = medians[neighbour][1]
            if value is not None:
                weight = weights[neighbour - index + reach]
                total += weight * value
                weight_sum += weight
        smoothed.append((x, total / weight_sum))
    return smoothed
