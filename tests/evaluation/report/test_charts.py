"""Scales, ticks, thinning, smoothing, and the SVG that they end up in."""

from __future__ import annotations

import math
import random
import re
from typing import Literal
from xml.etree import ElementTree

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qvera.evaluation.report.charts import (
    Chart,
    Line,
    Scale,
    length_chart,
    line_chart,
    log_ticks,
    nice_ticks,
    smooth,
    stacked_bars,
    thin,
    values_range,
)
from qvera.evaluation.report.pages import environment
from qvera.evaluation.report.read import Point

finite = st.floats(-1e12, 1e12, allow_nan=False).filter(lambda x: x == 0 or abs(x) > 1e-9)


def line(points: list[Point], style: Literal["faint", "main", "held-out"] = "main", label: str = "loss") -> Line:
    return Line(label, points, style, str)


def draw(chart: Chart | None) -> ElementTree.Element:
    """The figure as XML: one that is not well-formed fails here."""
    assert chart is not None
    html = str(environment().get_template("chart.html").module.figure(chart))  # type: ignore[attr-defined]
    return ElementTree.fromstring(html.replace(" hidden>", ' hidden="">'))


def labels(root: ElementTree.Element, anchor: str, position: str) -> dict[str | None, str | None]:
    """Text of the ticks of one axis → where they are."""
    return {text.text: text.get(position) for text in root.iter("text") if text.get("text-anchor") == anchor}


def test_ticks_are_round_and_cover_their_scale() -> None:
    assert nice_ticks(0, 96, 5, whole=True) == [0, 20, 40, 60, 80, 100]
    assert nice_ticks(0.13, 2.31, 5) == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert nice_ticks(1, 3, 5, whole=True) == [1, 2, 3]
    assert log_ticks(0.036, 2.41) == pytest.approx([0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5])
    assert log_ticks(1e-4, 1e3) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1, 10, 100, 1000])
    assert log_ticks(1.0, 1.0) == pytest.approx([1, 2])
    wide = log_ticks(1e-9, 1e9)
    assert len(wide) <= 8 and wide[0] <= 1e-9 and wide[-1] >= 1e9
    assert (Scale(2, 4).fraction(3), Scale(2, 4).fraction(5)) == (0.5, 1.5)
    assert Scale(0.01, 100, log=True).fraction(1) == pytest.approx(0.5)
    assert Scale(0.01, 100, log=True).fraction(0) == -math.inf


@given(finite, finite, st.integers(2, 10))
def test_nice_ticks_hold_what_they_promise(a: float, b: float, about: int) -> None:
    low, high = min(a, b), max(a, b)
    ticks = nice_ticks(low, high, about)
    assert 2 <= len(ticks) <= about + 3
    width = ticks[1] - ticks[0]
    assert ticks[0] <= low + 1e-6 * width
    assert ticks[-1] >= high - 1e-6 * width
    leading = width / 10 ** math.floor(math.log10(width) + 1e-6)
    assert min(abs(leading - nice) for nice in (1, 2, 5)) < 1e-3
    assert all(right > left for left, right in zip(ticks, ticks[1:], strict=False))


def test_thin_keeps_ends_mean_and_gaps() -> None:
    points: list[Point] = [(float(x), float(x)) for x in range(10_000)]
    thinned = thin(points, 500)
    assert len(thinned) == 500
    assert (thinned[0], thinned[-1][0]) == ((19, 9.5), 9_999)
    assert thin(points[:500], 500) == points[:500]
    gap: list[Point] = [(float(x), None if x < 20 else 1.0) for x in range(1000)]
    assert thin(gap, 100)[:3] == [(9, None), (19, None), (29, 1.0)]


def test_smooth_follows_a_line_to_its_ends_and_drops_a_spike() -> None:
    rising: list[Point] = [(float(x), 3.0 * x) for x in range(50)]
    assert [y for _, y in smooth(rising, 3)] == pytest.approx([y for _, y in rising])
    assert smooth(rising, 0) == rising
    for at in (0, 1, 25, 48, 49):
        spike: list[Point] = [(float(x), 1000.0 if x == at else 1.0) for x in range(50)]
        assert max(y for _, y in smooth(spike, 3) if y is not None) == pytest.approx(1.0)
    # a line fitted to a steep fall would go below zero where the fall ends, which a log scale can't show
    steep: list[Point] = [(float(x), 10.0 ** -min(x, 8)) for x in range(20)]
    assert all(y is not None and y >= 1e-8 for _, y in smooth(steep, 2))
    # gaps stay gaps
    assert smooth([(0, 1.0), (1, None), (2, 3.0)], 1)[1] == (1, None)
    assert smooth([(0, None)], 1) == [(0, None)]


@pytest.mark.parametrize("last", [0.001, 0.5])
def test_the_smoothed_curve_does_not_end_at_the_last_value(last: float) -> None:
    """It used to: at its ends the window had no neighbours left, so the curve hooked up or down to a noisy value."""
    noise = random.Random(1)
    raw: list[Point] = [(float(x), 0.02 * noise.lognormvariate(0, 0.3)) for x in range(67)]
    ends = [y for _, y in smooth([*raw, (67.0, last)], 68 / 30)][-3:]
    assert all(y is not None and 0.01 < y < 0.035 for y in ends)


def test_one_spike_does_not_set_the_axis() -> None:
    raw: list[Point] = [(float(x), 900.0 if x == 60 else 2.0 - x / 100) for x in range(100)]
    low, high = values_range([line(raw, "faint"), line(smooth(raw, 4), "main")]) or (0, 0)
    assert 0.5 < low <= 1.03
    assert 2.0 <= high < 3
    # an evaluation is never cut off
    assert values_range([line(raw, "faint"), line([(50.0, 40.0)], "held-out")]) == (low, 40.0)
    assert values_range([line([(1.0, None)])]) is None


def test_line_chart_places_its_points_and_rings_the_best() -> None:
    root = draw(line_chart("Loss", [line([(0.0, 0.0), (5.0, 10.0), (10.0, 5.0)])], height=100))
    assert [path.get("d") for path in root.iter("path")] == ["M0 1000L500 0L1000 500"]
    descriptions = [svg.get("aria-label") for svg in root.iter("svg") if svg.get("role")]
    assert descriptions == ["Loss by step. loss from 0.0 at step 0 to 5.0 at step 10."]
    y_axis, x_axis = labels(root, "end", "y"), labels(root, "middle", "x")
    assert (y_axis["0"], y_axis["10"]) == ("100%", "0%")
    assert "step" in y_axis
    assert (x_axis["0"], x_axis["4"], x_axis["10"]) == ("0%", "40%", "100%")
    root = draw(line_chart("x", [line([(0.0, 2.0), (10.0, 1.0), (20.0, 1.5)], "held-out")], best=10))
    (ring,) = [circle for circle in root.iter("circle") if circle.get("class") == "ring"]
    assert ring.get("cx") == "50%"
    assert [mark.get("x1") for mark in root.iter("line") if mark.get("class") == "best"] == ["50%"]


def test_line_chart_breaks_at_gaps_and_dots_lone_points() -> None:
    points: list[Point] = [(0.0, 1.0), (1.0, 2.0), (2.0, None), (3.0, 1.5), (4.0, None), (5.0, 1.0), (6.0, 1.2)]
    root = draw(line_chart("x", [line(points)]))
    (path,) = [element.get("d") or "" for element in root.iter("path")]
    assert path.count("M") == 3
    assert [circle.get("cx") for circle in root.iter("circle")] == ["50%"]
    for value in (0.0, 2.3, -4.0, 1e-12, 1e15):
        root = draw(line_chart("x", [line([(7.0, value)])], may_be_log=True))
        (circle,) = root.iter("circle")
        assert circle.get("cx") == "50%"
        assert "7" in labels(root, "middle", "x")


def test_log_axis_only_where_allowed_and_needed() -> None:
    steep: list[Point] = [(float(x), 2.0 * 0.9**x) for x in range(60)]
    flat: list[Point] = [(float(x), 2.0 * 0.99**x) for x in range(60)]
    for points, may_be_log, log in ((steep, True, True), (steep, False, False), (flat, True, False)):
        text = "".join(draw(line_chart("x", [line(points)], may_be_log=may_be_log)).itertext())
        assert ("(log scale)" in text) == log


def test_histogram_bars_have_their_width_and_height() -> None:
    root = draw(length_chart([0, 100, 400], [50, 100]))
    bars = [(bar.get("x"), bar.get("width"), bar.get("y"), bar.get("height")) for bar in root.iter("rect")]
    assert bars == [("0%", "25%", "50%", "50%"), ("25%", "75%", "0%", "100%")]
    assert labels(root, "end", "y") == {"0": "100%", "50": "50%", "100": "0%"}
    assert [title.text for title in root.iter("title")] == ["0 to 100 tokens: 50 rows", "100 to 400 tokens: 100 rows"]


def test_charts_without_values_are_nothing() -> None:
    for points in ([], [(3.0, None)]):
        assert line_chart("x", [line(points)]) is None
    empty: list[tuple[list[float], list[float]]] = [([], []), ([0, 1], []), ([0, 1, 2], [3]), ([0, 1], [0])]
    for edges, counts in [*empty, ([1, 0], [3]), ([0, 1], [-1])]:
        assert length_chart(edges, counts) is None
    assert stacked_bars("Memory", {"Loss": [("p1", "a", 0.0)]}) is None


def test_stacked_bars_stand_side_by_side_and_the_mark_crosses_them() -> None:
    rows = {"Backward": [("p1", "base", 300.0), ("p2", "loss", 0.0), ("p3", "rest", 100.0)], "Loss": [("p1", "a", 1.0)]}
    root = draw(stacked_bars("Memory", rows, mark_bytes=200.0))
    bars = [(bar.get("class"), bar.get("x"), bar.get("width")) for bar in root.iter("rect")]
    assert bars == [("bar p1", "0%", "75%"), ("bar p3", "75%", "25%"), ("bar p1", "0%", "0.25%")]
    assert [mark.get("x1") for mark in root.iter("line") if mark.get("class") == "best"] == ["50%"]


@example([(0, 0.0), (1, 900719925475.0), (2, 900719925474.9999)])
@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.none() | finite), min_size=1, max_size=40))
def test_no_points_make_a_broken_chart(raw: list[tuple[int, float | None]]) -> None:
    points: list[Point] = [(float(x), y) for x, y in sorted(dict(raw).items())]
    chart = line_chart("x", [line(points, "faint"), line(smooth(points, 2))], may_be_log=True)
    assert (chart is None) == all(y is None for _, y in points)
    if chart is not None:
        drawn = " ".join(element.get("d") or "" for element in draw(chart).iter("path"))
        assert not re.search(r"nan|inf|e[+-]?\d", drawn)
