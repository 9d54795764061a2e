"""Charts: from values to positions in an SVG, which templates/chart.html draws. No library and no state.

A chart fills the width of its place while its text keeps its size: curves are in an inner SVG that stretches
(``preserveAspectRatio="none"``, strokes that do not scale); ticks and dots are in the outer one, at percentages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from qvera.evaluation.report.axes import Scale, log_ticks, nice_ticks
from qvera.evaluation.report.smoothing import Point, running_median
from qvera.utils.formatting import axis_labels, count, significant, size

_ROW_HEIGHT = 46
"""Height in pixels of one bar of `stacked_bars` with its label."""


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        label: Its name in legend and tooltip.
        points: With rising x.
        style: ``faint`` (raw values), ``main``, ``held-out`` (accent colour, a dot at each point) or ``dashed``.
        format: How a value is written in tooltips.
        colour: 1 to 8 where a chart shows several runs; 0 for the colour of the style.
    """

    label: str
    points: Sequence[Point]
    style: Literal["faint", "main", "held-out", "dashed"] = "main"
    format: Callable[[float], str] = significant
    colour: int = 0

    @property
    def css(self) -> str:
        """CSS classes of curve and dots."""
        return f"{self.style} c{self.colour}" if self.colour else self.style

    def text(self, y: float | None) -> str:
        """The value as a tooltip shows it."""
        return "not a finite number" if y is None else self.format(y)

    def summary(self, x_name: str) -> str:
        """First and last value in words, for a screen reader."""
        known = [(x, y) for x, y in self.points if y is not None]
        if not known:
            return f"{self.label} without values"
        (first, start), (last, end) = known[0], known[-1]
        if first == last:
            return f"{self.label} {self.text(start)} at {_x_text(first, x_name)}"
        return (
            f"{self.label} from {self.text(start)} at {_x_text(first, x_name)} "
            f"to {self.text(end)} at {_x_text(last, x_name)}"
        )


class Tick(NamedTuple):
    """Position (an SVG length) and label."""

    at: str
    label: str


class Bar(NamedTuple):
    """A rectangle in SVG lengths, with the text of its tooltip."""

    css: str
    x: str
    width: str
    y: str
    height: str
    title: str


class Dot(NamedTuple):
    """A circle in SVG lengths, with the text of its tooltip."""

    css: str
    x: str
    y: str
    title: str
    ring: bool


@dataclass(frozen=True)
class Chart:
    """What templates/chart.html draws, in SVG lengths.

    Attributes:
        title: Heading of the figure; ``note`` stands beside it.
        description: Read by a screen reader in place of the picture.
        height: Of the plot, in CSS pixels.
        legend: CSS class and text of each entry.
        y_ticks: With a horizontal grid line each.
        x_ticks: With a vertical grid line each where ``x_grid``.
        row_labels: Labels of the rows of `stacked_bars`.
        paths: CSS classes and path of each curve, in a box of 1000 × 1000.
        best: Position of a vertical line.
        log: Whether the y axis is logarithmic.
        sync: Charts of the same ``sync`` show their tooltips together.
        tooltips: JSON for script.js; "" for a chart without.
    """

    title: str
    description: str
    height: int
    note: str = ""
    legend: Sequence[tuple[str, str]] = ()
    y_ticks: Sequence[Tick] = ()
    x_ticks: Sequence[Tick] = ()
    x_name: str = ""
    x_grid: bool = False
    row_labels: Sequence[Tick] = ()
    bars: Sequence[Bar] = ()
    paths: Sequence[tuple[str, str]] = ()
    dots: Sequence[Dot] = ()
    best: str = ""
    log: bool = False
    sync: str = ""
    tooltips: str = ""


def values_range(lines: Sequence[Line]) -> tuple[float, float] | None:
    """The range that the y axis shows; None where no line has a value.

    In a chart with a faint line (raw values), the smoothed line follows it, and single spikes may leave the picture:
    one step with a loss of 1000 would press everything else flat.
    """
    has_raw = any(line.style == "faint" for line in lines)
    lows, highs = [], []
    for line in lines:
        values = [y for _, y in line.points if y is not None]
        if not values or (has_raw and line.style == "main"):
            continue
        low, high = min(values), max(values)
        if line.style == "faint":
            typical = running_median(values)
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
    x_log: bool = False,
    top: float | None = None,
) -> Chart | None:
    """A chart of values over optimizer steps, tokens or learning rates; None where no line has a value.

    Args:
        title: Heading of the figure.
        lines: Drawn in order, the last on top.
        note: Text beside the heading.
        legend: CSS class and text of each entry.
        kind: Kind of the y axis, as in `axis_labels`.
        height: Of the plot, in CSS pixels.
        from_zero: The y axis starts at 0.
        may_be_log: Use a logarithmic y axis where the values span more than a factor of 30.
        best: An x to mark with a vertical line, and with a ring on the held-out curve.
        x_name: ``step``, ``token`` or ``learning rate``. Charts with the same one show their tooltips together.
        x_log: A logarithmic x axis.
        top: Values above leave the picture.
    """
    extent = values_range(lines)
    if extent is None:
        return None
    low, high = extent
    if top is not None and high > top > low:
        high = top
    log = may_be_log and low > 0 and high / low > 30
    y_ticks = log_ticks(low, high) if log else nice_ticks(0.0 if from_zero else low, high, max(2, height // 40))
    y_scale = Scale(y_ticks[0], y_ticks[-1], log)
    places = sorted({x for line in lines for x, _ in line.points} | ({best} if best is not None else set()))
    first, last = places[0], places[-1]
    x_scale = Scale(first, last, x_log) if last > first else Scale(first - 1, last + 1)
    if last <= first:
        all_ticks = [first]
    else:
        all_ticks = log_ticks(first, last) if x_log else nice_ticks(first, last, 5, whole=True)
    x_ticks = [tick for tick in all_ticks if first * (1 - 1e-9) <= tick <= last * (1 + 1e-9)]
    texts: dict[float, list[str]] = {}
    for line in lines:
        for x, y in line.points:
            texts.setdefault(x, [_x_text(x, x_name)]).append(f"{line.label} {line.text(y)}")
    raw = any(line.style == "faint" for line in lines)
    summaries = [line.summary(x_name) for line in lines if not (raw and line.style == "main")]
    return Chart(
        title,
        note=note,
        description=f"{title} by {x_name}. {'; '.join(summaries)}.",
        height=height,
        legend=legend,
        y_ticks=_ticks(y_scale.from_top, y_ticks, axis_labels(y_ticks, "log" if log else kind)),
        x_ticks=_ticks(x_scale.percent, x_ticks, [_x_label(tick, x_log) for tick in x_ticks]),
        x_name={"token": "tokens", "learning rate": "rate"}.get(x_name, x_name),  # there is room for a short word
        paths=[(line.css, _path(line.points, x_scale, y_scale)) for line in lines],
        dots=[dot for line in lines for dot in _dots(line, x_scale, y_scale, best, x_name)],
        best="" if best is None else x_scale.percent(best),
        log=log,
        sync=f"{x_name}s",
        tooltips=_tooltips(x_scale, [(x, texts[x]) for x in sorted(texts)]),
    )


def length_histogram(edges: Sequence[float], counts: Sequence[float]) -> Chart | None:
    """Bars of rows over their lengths in tokens, as wide as the intervals.

    Args:
        edges: [n + 1] rising lengths.
        counts: [n] rows between them.

    Returns:
        None where the two do not fit together or all bars are empty.
    """
    rising = all(left < right for left, right in pairwise(edges))
    if len(edges) != len(counts) + 1 or not counts or not rising or max(counts) <= 0 or min(counts) < 0:
        return None
    y_ticks = nice_ticks(0.0, max(counts), 2, whole=True)
    x_ticks = [tick for tick in nice_ticks(edges[0], edges[-1], 5, whole=True) if edges[0] <= tick <= edges[-1]]
    y_scale, x_scale = Scale(y_ticks[0], y_ticks[-1]), Scale(edges[0], edges[-1])
    bars, tips = [], []
    for (left, right), rows in zip(pairwise(edges), counts, strict=True):
        texts = [f"{count(left)} to {count(right)} tokens", f"{count(rows)} rows"]
        width = x_scale.percent(edges[0] + right - left)
        x, y = x_scale.percent(left), y_scale.from_top(rows)
        bars.append(Bar("bar", x, width, y, y_scale.percent(rows), ": ".join(texts)))
        tips.append(((left + right) / 2, texts))
    return Chart(
        "Length of rows",
        note="rows by tokens",
        description=f"Rows by length in tokens, in {len(counts)} bins.",
        height=120,
        y_ticks=_ticks(y_scale.from_top, y_ticks, axis_labels(y_ticks, "count")),
        x_ticks=_ticks(x_scale.percent, x_ticks, [count(tick) for tick in x_ticks]),
        bars=bars,
        tooltips=_tooltips(x_scale, tips),
    )


def stacked_bars(
    title: str,
    rows: Mapping[str, Sequence[tuple[str, str, float]]],
    *,
    legend: Sequence[tuple[str, str]] = (),
    mark_bytes: float | None = None,
) -> Chart | None:
    """Bars of bytes, one below the other, over a common axis from 0; None where nothing has a size.

    Args:
        title: Heading of the figure.
        rows: Label of each bar, and its parts from the left: CSS class of the colour, name, bytes.
        legend: CSS class and text of each entry.
        mark_bytes: Where a line crosses all bars.
    """
    totals = {label: sum(part_bytes for _, _, part_bytes in parts) for label, parts in rows.items()}
    if max(totals.values(), default=0) <= 0:
        return None
    ticks = nice_ticks(0.0, max([*totals.values(), mark_bytes or 0.0]), 5)
    scale = Scale(ticks[0], ticks[-1])
    bars = []
    for row, (label, parts) in enumerate(rows.items()):
        left, y = 0.0, str(_ROW_HEIGHT * row + 18)
        for css, name, part_bytes in parts:
            if part_bytes > 0:
                text = f"{label}: {name} {size(part_bytes)}"
                bars.append(Bar(f"bar {css}", scale.percent(left), scale.percent(part_bytes), y, "20", text))
                left += part_bytes
    return Chart(
        title,
        description=f"{title}. {'; '.join(f'{label}: {size(total)}' for label, total in totals.items())}.",
        height=_ROW_HEIGHT * len(rows),
        legend=legend,
        x_ticks=_ticks(scale.percent, ticks, axis_labels(ticks, "bytes")),
        x_grid=True,
        row_labels=[Tick(str(_ROW_HEIGHT * row + 13), label) for row, label in enumerate(rows)],
        bars=bars,
        best="" if mark_bytes is None else scale.percent(mark_bytes),
    )


def _ticks(position: Callable[[float], str], ticks: Sequence[float], labels: Sequence[str]) -> list[Tick]:
    return [Tick(position(tick), label) for tick, label in zip(ticks, labels, strict=True)]


def _x_label(tick: float, log: bool) -> str:
    return f"{tick:g}".replace("e-0", "e-") if log else count(tick)


def _x_text(x: float, x_name: str) -> str:
    """A place on the x axis in words: step 80; 12,400 tokens; learning rate 0.0123."""
    if x_name == "token":
        return f"{x:,.0f} tokens"
    return f"{x_name} {x:,.0f}" if x_name == "step" else f"{x_name} {x:.3g}"


def _tooltips(scale: Scale, texts: Sequence[tuple[float, list[str]]]) -> str:
    """JSON of the x of each tooltip, its position, and its lines of text."""
    places = [x for x, _ in texts]
    tree = {"at": [round(scale.fraction(x), 4) for x in places], "x": places, "text": [lines for _, lines in texts]}
    return json.dumps(tree, separators=(",", ":"))


def _path(points: Sequence[Point], x_scale: Scale, y_scale: Scale) -> str:
    """An SVG path in a box of 1000 × 1000, cut off a little beyond its upper and lower edge."""
    commands, pen_down = [], False
    for x, y in points:
        if y is not None:
            down = 1000 * (1 - min(max(y_scale.fraction(y), -1.0), 2.0))
            commands.append(f"{'L' if pen_down else 'M'}{_number(1000 * x_scale.fraction(x))} {_number(down)}")
        pen_down = y is not None
    return "".join(commands)


def _dots(line: Line, x_scale: Scale, y_scale: Scale, best: float | None, x_name: str) -> list[Dot]:
    """Dots of a held-out curve; of others only where a value stands between two gaps and has no stroke."""
    values = [None, *(y for _, y in line.points), None]
    dots = []
    for index, (x, y) in enumerate(line.points):
        alone = values[index] is None and values[index + 2] is None
        if y is None or not (line.style == "held-out" or alone) or not -1e-9 <= y_scale.fraction(y) <= 1 + 1e-9:
            continue
        title = f"{_x_text(x, x_name)}: {line.label} {line.text(y)}"
        ring = line.style == "held-out" and x == best
        dots.append(Dot(f"dot {line.css}", x_scale.percent(x), y_scale.from_top(y), title, ring))
    return dots


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
