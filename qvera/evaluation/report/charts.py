"""SVG charts as pure functions of numbers: no library, no state, no scripts.

A chart fills the width that it is given while its text keeps its size: curves live in an inner SVG that stretches
(``preserveAspectRatio="none"``, strokes that do not scale), ticks and dots in the outer one at percentages.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from qvera.evaluation.report.points import Point, median_of_five
from qvera.evaluation.report.scales import Scale, log_ticks, nice_ticks
from qvera.utils.formatting import axis_labels, count
from qvera.utils.formatting import size as bytes_text


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        label: its name in legend and tooltip.
        points: rising x.
        style: ``faint`` (raw values), ``main``, ``held-out`` (accent, a dot at each point) or ``dashed``.
        texts: what the tooltip says at each point.
        colour: 1 to 8, where several runs are in one chart; 0: as its style says.
    """

    label: str
    points: Sequence[Point]
    style: Literal["faint", "main", "held-out", "dashed"]
    texts: Sequence[str]
    colour: int = 0

    @property
    def css(self) -> str:
        return f"{self.style} c{self.colour}" if self.colour else self.style


def values_range(lines: Sequence[Line]) -> tuple[float, float] | None:
    """The range that an axis has to show; None where no line has a value.

    Where there is a faint line (raw values), the smoothed one follows it and single spikes of it may leave the picture:
    one step with a loss of 1000 would else press everything else flat.
    """
    has_raw = any(line.style == "faint" for line in lines)
    lows, highs = [], []
    for line in lines:
        values = [y for _, y in line.points if y is not None]
        if not values or (has_raw and line.style == "main"):
            continue
        low, high = min(values), max(values)
        if line.style == "faint":
            typical = [y for _, y in median_of_five(line.points) if y is not None]
            room = 0.25 * (max(typical) - min(typical))
            low, high = max(low, min(typical) - room), min(high, max(typical) + room)
        lows.append(low)
        highs.append(high)
    return (min(lows), max(highs)) if lows else None


def line_chart(
    lines: Sequence[Line],
    *,
    description: str,
    kind: str = "number",
    height: int = 120,
    from_zero: bool = False,
    may_be_log: bool = False,
    best: float | None = None,
    x_name: str = "step",
    x_log: bool = False,
    top: float | None = None,
) -> str:
    """A chart of values over optimizer steps (or something else); "" where no line has a value.

    Args:
        lines: drawn in order, the last on top.
        description: what a screen reader says in place of the picture.
        kind: of the y axis, as in `numbers.axis_labels`.
        height: of the plot, in CSS pixels.
        from_zero: the y axis starts at 0.
        may_be_log: use a logarithmic y axis where the values span more than a factor of 30.
        best: a step to mark with a vertical line and a ring on the held-out curve.
        x_name: what x is, in the singular; charts over the same thing are pointed at together.
        x_log: a logarithmic x axis, for learning rates.
        top: values above leave the picture.
    """
    extent = values_range(lines)
    if extent is None:
        return ""
    low, high = extent
    if top is not None and high > top > low:
        high = top
    log = may_be_log and low > 0 and high / low > 30
    ticks = log_ticks(low, high) if log else nice_ticks(0.0 if from_zero else low, high, max(2, height // 40))
    y_scale = Scale(ticks[0], ticks[-1], log)
    steps = sorted({x for line in lines for x, _ in line.points} | ({best} if best is not None else set()))
    first, last = steps[0], steps[-1]
    x_scale = Scale(first, last, x_log) if last > first else Scale(first - 1, last + 1)

    parts = []
    for tick, label in zip(ticks, axis_labels(ticks, "log" if log else kind), strict=True):
        y = _px(height * (1 - y_scale.fraction(tick)))
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="0" dx="-8" y="{y}" dy="4" text-anchor="end">{escape(label)}</text>')
    left, name = -26 if x_log else -18, escape(_axis_name(x_name))
    parts.append(f'<text class="tick" x="0" dx="{left}" y="{height + 20}" text-anchor="end">{name}</text>')
    for tick in _x_ticks(first, last, x_log):
        if x_scale.low * (1 - 1e-9) <= tick <= x_scale.high * (1 + 1e-9):
            x, label = _percent(x_scale.fraction(tick)), f"{tick:g}".replace("e-0", "e-") if x_log else count(tick)
            parts.append(f'<text class="tick" x="{x}" y="{height + 20}" text-anchor="middle">{label}</text>')
    if best is not None:
        x = _percent(x_scale.fraction(best))
        parts.append(f'<line class="best" x1="{x}" x2="{x}" y1="0" y2="{height}"/>')
    curves = "".join(
        f'<path class="{line.css}" d="{_path(line.points, x_scale, y_scale)}"/>' for line in lines if line.points
    )
    parts.append(
        f'<svg width="100%" height="{height}" viewBox="0 0 1000 1000" preserveAspectRatio="none" '
        f'aria-hidden="true">{curves}</svg>'
    )
    for line in lines:
        parts += _dots(line, x_scale, y_scale, height, best, x_name)
    parts.append(f'<line class="rule" x1="0" x2="0" y1="0" y2="{height}"/>')
    return _figure(parts, height, description, f"{x_name}s", _tooltips(lines, x_scale, x_name), log)


def _axis_name(x_name: str) -> str:
    """What stands left of the x axis, where there is room for a short word only."""
    return {"token": "tokens", "learning rate": "rate"}.get(x_name, x_name)


def _x_ticks(first: float, last: float, log: bool) -> list[float]:
    if last <= first:
        return [first]
    return log_ticks(first, last) if log else nice_ticks(first, last, 5, whole=True)


def _x_text(x: float, x_name: str) -> str:
    """A place on the x axis in words: step 80; 12,400 tokens; learning rate 0.0123."""
    if x_name == "token":
        return f"{x:,.0f} tokens"
    return f"{x_name} {x:,.0f}" if x_name == "step" else f"{x_name} {x:.3g}"


def histogram(edges: Sequence[float], counts: Sequence[float], *, description: str, height: int = 120) -> str:
    """Bars of ``counts`` [n] over ``edges`` [n + 1] (rising, in tokens).

    Gives "" where the two do not fit together or all bars are empty.

    Bars stand at their place on a linear axis, so bins of unequal width keep their width.
    """
    rising = all(left < right for left, right in zip(edges, edges[1:], strict=False))
    if len(edges) != len(counts) + 1 or not counts or not rising or max(counts) <= 0 or min(counts) < 0:
        return ""
    ticks = nice_ticks(0.0, max(counts), 2, whole=True)
    y_scale, x_scale = Scale(ticks[0], ticks[-1]), Scale(edges[0], edges[-1])
    parts = []
    for tick, label in zip(ticks, axis_labels(ticks, "count"), strict=True):
        y = _px(height * (1 - y_scale.fraction(tick)))
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="0" dx="-8" y="{y}" dy="4" text-anchor="end">{escape(label)}</text>')
    where: list[float] = []
    texts: list[list[str]] = []
    for left, right, number in zip(edges, edges[1:], counts, strict=False):
        start, end = x_scale.fraction(left), x_scale.fraction(right)
        tall = height * y_scale.fraction(number)
        said = f"{count(left)} to {count(right)} tokens: {count(number)} rows"
        parts.append(
            f'<rect class="bar" x="{_percent(start)}" width="{_percent(end - start)}" y="{_px(height - tall)}" '
            f'height="{_px(tall)}"><title>{escape(said)}</title></rect>'
        )
        where.append(round((start + end) / 2, 4))
        texts.append([f"{count(left)} to {count(right)} tokens", f"{count(number)} rows"])
    for tick in nice_ticks(edges[0], edges[-1], 5, whole=True):
        if edges[0] <= tick <= edges[-1]:
            x = _percent(x_scale.fraction(tick))
            parts.append(f'<text class="tick" x="{x}" y="{height + 20}" text-anchor="middle">{count(tick)}</text>')
    return _figure(parts, height, description, "", {"at": where, "step": where, "say": texts})


def length_figure(edges: Sequence[float], counts: Sequence[float]) -> str:
    """The histogram of rows by length with its caption, or "" where there is none."""
    chart = histogram(edges, counts, description=f"Rows by length in tokens, in {len(counts)} bins.")
    if not chart:
        return ""
    caption = '<figcaption><h3>Length of rows</h3><span class="caption">rows by tokens</span></figcaption>'
    return f"<figure>{caption}{chart}</figure>"


@dataclass(frozen=True)
class Stack:
    """One horizontal bar of `stacked_bars`: parts from the left, each (its colour's number from 1, name, bytes)."""

    label: str
    parts: Sequence[tuple[int, str, float]]


def stacked_bars(stacks: Sequence[Stack], *, description: str, mark: tuple[str, float] | None = None) -> str:
    """Bars of bytes, one under the other, over a common axis from 0; "" where nothing has a size.

    Args:
        mark: a name and a number of bytes at which a line stands through all bars.
    """
    totals = [sum(size for _, _, size in stack.parts) for stack in stacks]
    top = max([*totals, mark[1] if mark else 0.0], default=0.0)
    if top <= 0 or not any(totals):
        return ""
    ticks = nice_ticks(0.0, top, 5)
    scale, height = Scale(ticks[0], ticks[-1]), 46 * len(stacks)
    drawn = []
    for tick, label in zip(ticks, axis_labels(ticks, "bytes"), strict=True):
        x = _percent(scale.fraction(tick))
        drawn.append(f'<line class="grid" x1="{x}" x2="{x}" y1="0" y2="{height}"/>')
        drawn.append(f'<text class="tick" x="{x}" y="{height + 20}" text-anchor="middle">{escape(label)}</text>')
    for row, stack in enumerate(stacks):
        drawn.append(f'<text class="tick" x="0" y="{46 * row + 13}">{escape(stack.label)}</text>')
        at = 0.0
        for colour, name, held in stack.parts:
            if held <= 0:
                continue
            said = escape(f"{stack.label}: {name} {bytes_text(held)}")
            drawn.append(
                f'<rect class="part p{colour}" x="{_percent(scale.fraction(at))}" width="{_percent(scale.fraction(held))}" '
                f'y="{46 * row + 18}" height="20"><title>{said}</title></rect>'
            )
            at += held
    if mark is not None:
        x = _percent(scale.fraction(mark[1]))
        drawn.append(f'<line class="best" x1="{x}" x2="{x}" y1="0" y2="{height}"/>')
    return (
        f'<div class="stacks"><svg class="axes" role="img" aria-label="{escape(description, quote=True)}" width="100%" '
        f'height="{height + 26}">{"".join(drawn)}</svg></div>'
    )


def _figure(
    parts: Sequence[str], height: int, description: str, sync: str, tooltips: dict[str, object], log: bool = False
) -> str:
    data = escape(json.dumps(tooltips, separators=(",", ":"), ensure_ascii=True), quote=True)
    return (
        f'<div class="plot" tabindex="0" data-sync="{escape(sync)}" data-log="{int(log)}" '
        f'data-tips="{data}">'
        f'<svg class="axes" role="img" aria-label="{escape(description, quote=True)}" width="100%" height="{height}">'
        f"{''.join(parts)}</svg>"
        '<div class="tip" hidden></div></div>'
    )


def _tooltips(lines: Sequence[Line], x_scale: Scale, x_name: str) -> dict[str, object]:
    said: dict[float, list[str]] = {}
    for line in lines:
        for (x, _), text in zip(line.points, line.texts, strict=True):
            said.setdefault(x, [_x_text(x, x_name)]).append(f"{line.label} {text}")
    steps = sorted(said)
    return {
        "at": [round(x_scale.fraction(step), 4) for step in steps],
        "step": steps,
        "say": [said[step] for step in steps],
    }


def _path(points: Sequence[Point], x_scale: Scale, y_scale: Scale) -> str:
    """An SVG path in a 1000 × 1000 box; what lies outside is cut off a little beyond the edge."""
    commands, pen_down = [], False
    for x, y in points:
        if y is None:
            pen_down = False
            continue
        down = 1000 * (1 - min(max(y_scale.fraction(y), -1.0), 2.0))
        commands.append(f"{'L' if pen_down else 'M'}{_px(1000 * x_scale.fraction(x))} {_px(down)}")
        pen_down = True
    return "".join(commands)


def _dots(line: Line, x_scale: Scale, y_scale: Scale, height: int, best: float | None, x_name: str) -> list[str]:
    dots = []
    for index, (x, y) in enumerate(line.points):
        if y is None:
            continue
        before = line.points[index - 1][1] if index else None
        after = line.points[index + 1][1] if index + 1 < len(line.points) else None
        # a value between two gaps has no stroke of its own
        if line.style != "held-out" and not (before is None and after is None):
            continue
        fraction = y_scale.fraction(y)
        if not -1e-9 <= fraction <= 1 + 1e-9:
            continue
        place = f'cx="{_percent(x_scale.fraction(x))}" cy="{_px(height * (1 - fraction))}"'
        said = escape(f"{_x_text(x, x_name)}: {line.label} {line.texts[index]}")
        if line.style == "held-out" and x == best:
            dots.append(f'<circle class="ring" {place} r="7"/>')
        dots.append(f'<circle class="dot {line.css}" {place} r="3.5"><title>{said}</title></circle>')
    return dots


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}".rstrip("0").rstrip(".") + "%"
