"""Curves with fewer points, and smoother ones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

Point = tuple[float, float | None]
"""x (a step, say) and y. A y of None is a gap in the curve."""

MAX_POINTS = 500
"""A curve with more points is thinned to this number, so that the page stays small."""


def thin(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """Reduce a curve to at most ``most`` points: means of equally many neighbours, at the x of the last of them.

    Neighbours without any value stay a gap.
    """
    if len(points) <= most:
        return list(points)
    thinned: list[Point] = []
    for index in range(most):
        group = points[index * len(points) // most : (index + 1) * len(points) // most]
        values = [y for _, y in group if y is not None]
        thinned.append((group[-1][0], sum(values) / len(values) if values else None))
    return thinned


def running_median(values: Sequence[float]) -> list[float]:
    """Median of each value and two neighbours on either side: single spikes vanish, steps stay where they are.

    The second value and the last but one have one neighbour on either side. The first and last values follow Tukey's
    end-point rule (Exploratory Data Analysis, 1977, section 7C): the median of the value itself, of the smoothed value
    next to it, and of the line through the next two smoothed values.
    """
    if len(values) < 3:
        return list(values)
    last = len(values) - 1
    reaches = [min(2, index, last - index) for index in range(len(values))]
    medians = [statistics.median(values[i - reach : i + reach + 1]) for i, reach in enumerate(reaches)]
    for end, inner in ((0, 1), (last, -1)):
        near, far = medians[end + inner], medians[end + 2 * inner]
        medians[end] = statistics.median([values[end], near, 3 * near - 2 * far])
    return medians


def smooth(points: Sequence[Point], width: float) -> list[Point]:
    """Smooth a curve: lines fitted locally, with Gaussian weights, to its `running_median`.

    Inside, where the weights are symmetric, the fit is their weighted mean. At the ends it follows the slope, where a
    mean would bend a falling curve and a narrower window would end at the last, noisy value. A line fitted to one side
    varies more, so the weights are twice as wide at the ends.

    Args:
        points: Evenly spaced in x, but for gaps, which stay gaps.
        width: Standard deviation of the weights, in points. With 0 the curve is returned unchanged.
    """
    known = [(index, y) for index, (_, y) in enumerate(points) if y is not None]
    if width <= 0 or not known:
        return list(points)
    medians = running_median([y for _, y in known])
    smoothed = list(points)
    for place, (index, _) in enumerate(known):
        to_end = min(place, len(known) - 1 - place)
        local_width = width * (2 - min(1.0, to_end / (3 * width)))
        near = range(
            max(0, place - math.ceil(3 * local_width)), min(len(known), place + math.ceil(3 * local_width) + 1)
        )
        distances = [known[other][0] - index for other in near]
        smoothed[index] = (points[index][0], _local_line(distances, [medians[other] for other in near], local_width))
    return smoothed


def _local_line(distances: Sequence[int], values: Sequence[float], width: float) -> float:
    """Value at distance 0 of the line fitted with Gaussian weights, within the range of ``values``."""
    weights = [math.exp(-0.5 * (distance / width) ** 2) for distance in distances]
    total = sum(weights)
    mean_x = _dot(weights, distances) / total
    mean_y = _dot(weights, values) / total
    offsets = [weight * (distance - mean_x) for weight, distance in zip(weights, distances, strict=True)]
    variance = _dot(offsets, distances)
    slope = _dot(offsets, values) / variance if variance > 1e-9 * total else 0.0
    return min(max(mean_y - slope * mean_x, min(values)), max(values))


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(left, right, strict=True))


def loss_curves(losses: Sequence[Point]) -> tuple[list[Point], list[Point]]:
    """A loss by step, thinned, and the same smoothed. Both are equal for less than ten steps."""
    raw = thin(losses)
    return raw, smooth(raw, width=min(max(len(raw) / 20, 2), 8)) if len(raw) >= 10 else raw
