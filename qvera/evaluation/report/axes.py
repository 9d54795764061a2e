"""Ticks and scales of a chart's axes."""

from __future__ import annotations

import math
from dataclasses import dataclass


def nice_ticks(low: float, high: float, about: int = 5, whole: bool = False) -> list[float]:
    """Round ticks (steps of 1, 2 or 5 × 10^k) whose first is <= ``low`` and whose last is >= ``high``.

    Args:
        low: Smallest value, finite. Where it equals ``high`` but for rounding, room is made on both sides.
        high: Largest value, finite.
        about: How many intervals are wanted.
        whole: Ticks are integers.
    """
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = abs(low) * 0.5 or 1.0
        low, high = (min(low, 0.0), low + room) if low >= 0 else (low - room, 0.0)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    if whole:
        step = max(1.0, float(round(step)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    # index × step, not repeated addition: 3 × 0.1 is off by one rounding, a running sum by many
    return [index * step for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks for a logarithmic axis from at or below ``low`` to at or above ``high`` (both positive).

    1, 2 and 5 of each decade over up to three decades, powers of ten beyond, at most eight of them.
    """
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    if math.log10(high / low) <= 3:
        fine = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
        start = max(index for index, tick in enumerate(fine) if tick <= low * (1 + 1e-9))
        end = min(index for index, tick in enumerate(fine) if tick >= high * (1 - 1e-9))
        return fine[start : max(end, start + 1) + 1]
    stride = -(-(last - first) // 7)
    last = first + stride * -(-(last - first) // stride)
    return [10.0**power for power in range(first, last + 1, stride)]


@dataclass(frozen=True)
class Scale:
    """A mapping of [low, high] to [0, 1], with ``low < high``; where ``log``, both are positive."""

    low: float
    high: float
    log: bool = False

    def fraction(self, value: float) -> float:
        """Position of ``value``: below 0 or above 1 outside the ends, -inf for a value that has no logarithm."""
        if not self.log:
            return (value - self.low) / (self.high - self.low)
        if value <= 0:
            return -math.inf
        return math.log(value / self.low) / math.log(self.high / self.low)

    def percent(self, value: float) -> str:
        """Position of ``value`` as an SVG length, from the left."""
        return _percent(self.fraction(value))

    def from_top(self, value: float) -> str:
        """Position of ``value`` as an SVG length, from the top."""
        return _percent(1 - self.fraction(value))


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}".rstrip("0").rstrip(".") + "%"
