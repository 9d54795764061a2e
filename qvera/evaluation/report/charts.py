"""Turn values into positions in an SVG, for templates/chart.html, and thin or smooth curves.

A chart stretches to the width of its place, but its text does not. So curves are in an inner SVG that stretches, and
ticks and dots in the outer one, at percentages.
"""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from qvera.evaluation.report.read import Point
from qvera.utils.formatting import axis_labels, count, significant, size

Chart = dict[str, object]  # the values for templates/chart.html, which lists the keys; positions are SVG lengths

_ROW_HEIGHT = 46  # height in pixels of one bar of `stacked_bars` with its label


def nice_ticks(low: float, high: float, about: int = 5, whole: bool = False) -> list[float]:
    """About ``about`` round ticks (steps of 1, 2 or 5 × 10^k), the first <= ``low``, the last >= ``high``."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = abs(low) * 0.5 or 1.0
        low, high = (min(low, 0.0), low + room) if low >= 0 else (low - room, 0.0)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    if whole:
        step = max(1.0, float(round(step)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks from ``low`` to ``high``: 1, 2 and 5 of up to three decades, else at most eight powers of ten."""
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
    """Maps [low, high] to [0, 1]; ``low < high``, and with ``log`` both are positive."""

    low: float
    high: float
    log: bool = False

    def fraction(self, value: float) -> float:
        """Below 0 or above 1 outside the ends; -inf for a value without a logarithm."""
        if not self.log:
            return (value - self.low) / (self.high - self.low)
        return -math.inf if value <= 0 else math.log(value / self.low) / math.log(self.high / self.low)

    def percent(self, value: float, from_top: bool = False) -> str:
        """An SVG length from the left, or from the top."""
        fraction = 1 - self.fraction(value) if from_top else self.fraction(value)
        return f"{100 * fraction:.2f}".rstrip("0").rstrip(".") + "%"

    def ticks(self, values: Sequence[float], labels: Sequence[str], from_top: bool = False) -> list[tuple[str, str]]:
        """Position and label of each tick."""
        return [(self.percent(value, from_top), label) for value, label in zip(values, labels, strict=True)]


@dataclass(frozen=True)
class Line:
    """One curve; x of its points rises."""

    label: str
    points: Sequence[Point]
    style: Literal["faint", "main", "held-out", "dashed"] = "main"  # faint: raw values; held-out: a dot at each point
    format: Callable[[float], str] = significant
    colour: int = 0  # 1 to 8 where a chart shows several runs; 0 for the colour of the style

    @property
    def css(self) -> str:
        """CSS classes of curve and dots."""
        return f"{self.style} c{self.colour}" if self.colour else self.style

    @property
    def values(self) -> list[float]:
        """The known values."""
        return [y for _, y in self.points if y is not None]

    def text(self, y: float | None) -> str:
        """The value in a tooltip."""
        return "not a finite number" if y is None else self.format(y)

    def summary(self, x_name: str) -> str:
        """First and last value in words, for a screen reader."""
        known = [f"{self.text(y)} at {_x_text(x, x_name)}" for x, y in self.points if y is not None]
        if len(known) < 2:
            return f"{self.label} {known[0] if known else 'without values'}"
        return f"{self.label} from {known[0]} to {known[-1]}"


def values_range(lines: Sequence[Line]) -> tuple[float, float] | None:
    """The range of the y axis; None where no line has a value.

    With raw values, single spikes may leave the picture: one loss of 1000 would press the rest flat.
    """
    has_raw = any(line.style == "faint" for line in lines)
    lows, highs = [], []
    for line in lines:
        if not line.values or (has_raw and line.style == "main"):
            continue
        low, high = min(line.values), max(line.values)
        if line.style == "faint":
            typical = running_median(line.values)
            room = 0.25 * (max(typical) - min(typical))
            low, high = max(low, min(typical) - room), min(high, max(typical) + room)
        lows.append(low)
        highs.append(high)
    return (min(lows), max(highs)) if lows else None


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    note: str = "",
    legend: Sequence[tuple[str, str]] = (),
    kind: str = "number",
    height: int = 120,
    from_zero: bool = False,
    may_be_log: bool = False,
    best: float | None = None,
    x_name: str = "step",
    top: float | None = None,
) -> Chart | None:
    """A chart of values over steps, tokens or learning rates; None where no line has a value.

    Args:
        lines: drawn in order, the last on top.
        legend: CSS class and text of each entry.
        kind: of the y axis, as in `axis_labels`.
        height: of the plot, in CSS pixels.
        may_be_log: use a logarithmic y axis where the values span more than a factor of 30.
        best: an x to mark with a vertical line, and with a ring on the held-out curve.
        x_name: ``step``, ``round``, ``adapter``, ``token`` or ``learning rate`` (a logarithmic axis). Charts with the
            same one show their tooltips together.
        top: values above it leave the picture.
    """
    extent = values_range(lines)
    if extent is None:
        return None
    low, high = extent
    if top is not None and high > top > low:
        high = top
    log, x_log = may_be_log and low > 0 and high / low > 30, x_name == "learning rate"
    y_ticks = log_ticks(low, high) if log else nice_ticks(0.0 if from_zero else low, high, max(2, height // 40))
    y_scale = Scale(y_ticks[0], y_ticks[-1], log)
    texts: dict[float, list[str]] = {}
    for line in lines:
        for x, y in line.points:
            texts.setdefault(x, [_x_text(x, x_name)]).append(f"{line.label} {line.text(y)}")
    places = [*texts] if best is None else [*texts, best]
    first, last = min(places), max(places)
    if last <= first:
        x_scale, x_ticks = Scale(first - 1, last + 1), [first]
    else:
        x_scale = Scale(first, last, x_log)
        x_ticks = log_ticks(first, last) if x_log else nice_ticks(first, last, 5, whole=True)
        x_ticks = [tick for tick in x_ticks if first * (1 - 1e-9) <= tick <= last * (1 + 1e-9)]
    raw = any(line.style == "faint" for line in lines)
    drawn = [_drawn(line, x_scale, y_scale, best, x_name) for line in lines]
    summaries = [line.summary(x_name) for line in lines if not (raw and line.style == "main")]
    return {
        "title": title,
        "note": note,
        "description": f"{title} by {x_name}. {'; '.join(summaries)}.",
        "height": height,
        "legend": legend,
        "y_ticks": y_scale.ticks(y_ticks, axis_labels(y_ticks, "log" if log else kind), from_top=True),
        "x_ticks": x_scale.ticks(
            x_ticks, [f"{tick:g}".replace("e-0", "e-") if x_log else count(tick) for tick in x_ticks]
        ),
        "x_name": {"token": "tokens", "learning rate": "rate"}.get(x_name, x_name),  # there is room for a short word
        "paths": [(line.css, path) for line, (path, _) in zip(lines, drawn, strict=True)],
        "dots": [dot for _, dots in drawn for dot in dots],
        "best": "" if best is None else x_scale.percent(best),
        "log": log,
        "sync": f"{x_name}s",
        "tooltips": tooltips_json(x_scale, sorted(texts.items())),
    }


def length_chart(edges: Sequence[float], counts: Sequence[float]) -> Chart | None:
    """[n] ``counts`` of rows between [n + 1] lengths in tokens; None where these do not fit or all bars are empty."""
    rising = all(left < right for left, right in pairwise(edges))
    if len(edges) != len(counts) + 1 or not counts or not rising or max(counts) <= 0 or min(counts) < 0:
        return None
    y_ticks = nice_ticks(0.0, max(counts), 2, whole=True)
    x_ticks = [tick for tick in nice_ticks(edges[0], edges[-1], 5, whole=True) if edges[0] <= tick <= edges[-1]]
    y_scale, x_scale = Scale(y_ticks[0], y_ticks[-1]), Scale(edges[0], edges[-1])
    bars, tips = [], []
    for (left, right), rows in zip(pairwise(edges), counts, strict=True):
        texts = [f"{count(left)} to {count(right)} tokens", f"{count(rows)} rows"]
        place = x_scale.percent(left), x_scale.percent(edges[0] + right - left)
        bars.append(("bar", *place, y_scale.percent(rows, from_top=True), y_scale.percent(rows), ": ".join(texts)))
        tips.append(((left + right) / 2, texts))
    return {
        "title": "Length of rows",
        "note": "rows by tokens",
        "description": f"Rows by length in tokens, in {len(counts)} bins.",
        "height": 120,
        "y_ticks": y_scale.ticks(y_ticks, axis_labels(y_ticks, "count"), from_top=True),
        "x_ticks": x_scale.ticks(x_ticks, [count(tick) for tick in x_ticks]),
        "bars": bars,
        "tooltips": tooltips_json(x_scale, tips),
    }


def stacked_bars(
    title: str,
    rows: Mapping[str, Sequence[tuple[str, str, float]]],
    *,
    legend: Sequence[tuple[str, str]] = (),
    mark_bytes: float | None = None,
) -> Chart | None:
    """Bars of bytes, one below the other, over a common axis from 0; None where nothing has a size.

    ``rows``: label → parts from the left: CSS class, name, bytes. A line crosses all bars at ``mark_bytes``.
    """
    totals = {label: sum(part_bytes for _, _, part_bytes in parts) for label, parts in rows.items()}
    if max(totals.values(), default=0) <= 0:
        return None
    ticks = nice_ticks(0.0, max([*totals.values(), mark_bytes or 0.0]), 5)
    scale = Scale(ticks[0], ticks[-1])
    return {
        "title": title,
        "description": f"{title}. {'; '.join(f'{label}: {size(total)}' for label, total in totals.items())}.",
        "height": _ROW_HEIGHT * len(rows),
        "legend": legend,
        "x_ticks": scale.ticks(ticks, axis_labels(ticks, "bytes")),
        "x_grid": True,
        "rows": rows,
        "row_height": _ROW_HEIGHT,
        "scale": scale,
        "best": "" if mark_bytes is None else scale.percent(mark_bytes),
    }


def _x_text(x: float, x_name: str) -> str:
    if x_name == "token":
        return f"{x:,.0f} tokens"
    return f"{x_name} {x:.3g}" if x_name == "learning rate" else f"{x_name} {x:,.0f}"


def tooltips_json(scale: Scale, texts: Sequence[tuple[float, list[str]]]) -> str:
    """JSON of the x of each tooltip, its position, and its lines of text."""
    places = [x for x, _ in texts]
    tree = {"at": [round(scale.fraction(x), 4) for x in places], "x": places, "text": [lines for _, lines in texts]}
    return json.dumps(tree, separators=(",", ":"))


def _drawn(
    line: Line, x_scale: Scale, y_scale: Scale, best: float | None, x_name: str
) -> tuple[str, list[tuple[str, str, str, str, bool]]]:
    """The path in a box of 1000 × 1000, cut off a little above and below it; and dots.

    A dot: CSS class, x, y, tooltip, and whether there is a ring. Held-out curves have one at every value; others only
    where a value between two gaps has no stroke.
    """
    values = [None, *(y for _, y in line.points), None]
    path, dots = [], []
    for index, (x, y) in enumerate(line.points):
        if y is None:
            continue
        before, after = values[index], values[index + 2]
        across, down = 1000 * x_scale.fraction(x), 1000 * (1 - min(max(y_scale.fraction(y), -1.0), 2.0))
        numbers = " ".join(f"{number:.1f}".removesuffix(".0") for number in (across, down))
        path.append(f"{'M' if before is None else 'L'}{numbers}")
        has_dot = line.style == "held-out" or (before is None and after is None)
        if has_dot and -1e-9 <= y_scale.fraction(y) <= 1 + 1e-9:
            title = f"{_x_text(x, x_name)}: {line.label} {line.text(y)}"
            place = x_scale.percent(x), y_scale.percent(y, from_top=True)
            dots.append((f"dot {line.css}", *place, title, line.style == "held-out" and x == best))
    return "".join(path), dots


MAX_POINTS = 500  # curves are thinned to this number of points, so that pages stay small


def thin(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """At most ``most`` points: means of equally many neighbours, at the last x of each group. Gaps stay gaps."""
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

    The ends follow Tukey's end-point rule (Exploratory Data Analysis, 1977, section 7C): the median of the value, the
    smoothed value next to it, and the line through the next two smoothed values.
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
    """Smooth a curve: lines fitted locally, with Gaussian weights, to its `running_median`. Gaps stay gaps.

    A line follows the slope at the ends, where a mean would bend the curve. A fit to one side varies more, so the
    weights are twice as wide there. ``width`` is their standard deviation in points.
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
    """A loss by step, thinned, and the same smoothed; below ten steps both are equal."""
    raw = thin(losses)
    return raw, smooth(raw, width=min(max(len(raw) / 20, 2), 8)) if len(raw) >= 10 else raw
