"""Curves with fewer points, and smoother ones."""

import math
import statistics
from collections.abc import Sequence

import numpy as np

from qvera.evaluation.report.read import Point

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
    known = [index for index, (_, y) in enumerate(points) if y is not None]
    if width <= 0 or len(known) < 3:
        return list(points)
    places, medians = np.array(known), np.array(running_median([y for _, y in points if y is not None]))
    smoothed = list(points)
    for at, index in enumerate(known):
        to_end = min(at, len(known) - 1 - at)
        local_width = width * (2 - min(1.0, to_end / (3 * width)))
        reach = math.ceil(3 * local_width)
        near = slice(max(0, at - reach), at + reach + 1)
        distances, values = places[near] - index, medians[near]
        # polyfit squares the weights
        line = np.polyfit(distances, values, deg=1, w=np.exp(-0.25 * (distances / local_width) ** 2))
        smoothed[index] = (points[index][0], float(np.clip(line[1], values.min(), values.max())))
    return smoothed


def loss_curves(losses: Sequence[Point]) -> tuple[list[Point], list[Point]]:
    """A loss by step, thinned, and the same smoothed. Both are equal for less than ten steps."""
    raw = thin(losses)
    return raw, smooth(raw, width=min(max(len(raw) / 20, 2), 8)) if len(raw) >= 10 else raw
