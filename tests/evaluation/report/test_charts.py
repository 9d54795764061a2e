"""Scales, ticks, thinning, smoothing, and the SVG that they end up in."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvera.evaluation.report.charts import Line, histogram, line_chart, values_range
from qvera.evaluation.report.points import Point, median_of_five, smooth, thin
from qvera.evaluation.report.scales import Scale, log_ticks, nice_ticks

finite = st.floats(-1e12, 1e12, allow_nan=False).filter(lambda x: x == 0 or abs(x) > 1e-9)


def line(points: list[Point], style: str = "main", label: str = "loss") -> Line:
    return Line(label, points, style, [f"{y}" for _, y in points])  # type: ignore[arg-type]


def parse(svg: str) -> ElementTree.Element:
    """The chart as XML: a chart that is not well-formed fails here."""
    return ElementTree.fromstring(svg.replace(" hidden>", ' hidden="">'))


def test_nice_ticks_are_round_and_cover() -> None:
    assert nice_ticks(0, 96, 5, whole=True) == [0, 20, 40, 60, 80, 100]
    assert nice_ticks(0.13, 2.31, 5) == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert nice_ticks(1, 3, 5, whole=True) == [1, 2, 3]
    assert nice_ticks(0, 0.3, 3) == pytest.approx([0, 0.1, 0.2, 0.3])


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


def test_log_ticks() -> None:
    assert log_ticks(0.036, 2.41) == pytest.approx([0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5])
    assert log_ticks(1e-4, 1e3) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1, 10, 100, 1000])
    assert log_ticks(1.0, 1.0) == pytest.approx([1, 2])
    wide = log_ticks(1e-9, 1e9)
    assert len(wide) <= 8
    assert wide[0] <= 1e-9
    assert wide[-1] >= 1e9


def test_scale() -> None:
    assert Scale(2, 4).fraction(3) == 0.5
    assert Scale(2, 4).fraction(5) == 1.5
    assert Scale(0.01, 100, log=True).fraction(1) == pytest.approx(0.5)
    assert Scale(0.01, 100, log=True).fraction(0) == -math.inf


def test_thin_keeps_ends_mean_and_gaps() -> None:
    points: list[Point] = [(float(x), float(x)) for x in range(10_000)]
    thinned = thin(points, 500)
    assert len(thinned) == 500
    assert thinned[-1][0] == 9_999
    assert thinned[0] == (19, 9.5)
    assert thin(points[:500], 500) == points[:500]
    gap: list[Point] = [(float(x), None if x < 20 else 1.0) for x in range(1000)]
    assert thin(gap, 100)[:3] == [(9, None), (19, None), (29, 1.0)]


def test_smooth_follows_a_line_and_drops_a_spike() -> None:
    ramp: list[Point] = [(float(x), 3.0 * x) for x in range(50)]
    for (_, smoothed), (_, y) in zip(smooth(ramp, 3)[3:-3], ramp[3:-3], strict=True):
        assert smoothed == pytest.approx(y)
    assert smooth(ramp, 0) == ramp
    spike: list[Point] = [(float(x), 1000.0 if x == 25 else 1.0) for x in range(50)]
    assert max(y for _, y in smooth(spike, 3) if y is not None) == pytest.approx(1.0)


def test_gaps_stay_gaps() -> None:
    points: list[Point] = [(0, 1.0), (1, None), (2, 3.0)]
    assert [y is None for _, y in median_of_five(points)] == [False, True, False]
    assert [y is None for _, y in smooth(points, 1)] == [False, True, False]


def test_one_spike_does_not_set_the_axis() -> None:
    raw: list[Point] = [(float(x), 900.0 if x == 60 else 2.0 - x / 100) for x in range(100)]
    low, high = values_range([line(raw, "faint"), line(smooth(raw, 4), "main")]) or (0, 0)
    assert 0.5 < low <= 1.03
    assert 2.0 <= high < 3
    # an evaluation is never cut off
    assert values_range([line(raw, "faint"), line([(50.0, 40.0)], "held-out")]) == (low, 40.0)
    assert values_range([line([(1.0, None)])]) is None


def test_line_chart_places_its_points() -> None:
    svg = line_chart([line([(0.0, 0.0), (5.0, 10.0), (10.0, 5.0)])], description="Loss by step.", height=100)
    root = parse(svg)
    paths = [element.get("d") for element in root.iter("path")]
    assert paths == ["M0 1000L500 0L1000 500"]
    assert [axes.get("aria-label") for axes in root.iter("svg") if axes.get("role")] == ["Loss by step."]
    labels = [text.text for text in root.iter("text")]
    assert {"0", "10", "step"} <= set(labels)
    heights = {text.text: text.get("y") for text in root.iter("text") if text.get("text-anchor") == "end"}
    assert (heights["0"], heights["10"]) == ("100", "0")
    places = {text.text: text.get("x") for text in root.iter("text") if text.get("text-anchor") == "middle"}
    assert (places["0"], places["4"], places["10"]) == ("0%", "40%", "100%")


def test_line_chart_breaks_at_gaps_and_dots_lone_points() -> None:
    points: list[Point] = [(0.0, 1.0), (1.0, 2.0), (2.0, None), (3.0, 1.5), (4.0, None), (5.0, 1.0), (6.0, 1.2)]
    root = parse(line_chart([line(points)], description="x"))
    (path,) = [element.get("d") or "" for element in root.iter("path")]
    assert path.count("M") == 3
    assert "nan" not in path.lower()
    assert [circle.get("cx") for circle in root.iter("circle")] == ["50%"]


@pytest.mark.parametrize("points", [[], [(3.0, None)]])
def test_line_chart_without_values_is_nothing(points: list[Point]) -> None:
    assert line_chart([line(points)], description="x") == ""


@pytest.mark.parametrize("value", [0.0, 2.3, -4.0, 1e-12, 1e15])
def test_line_chart_of_one_point(value: float) -> None:
    root = parse(line_chart([line([(7.0, value)])], description="x", may_be_log=True))
    (circle,) = root.iter("circle")
    assert circle.get("cx") == "50%"
    assert "7" in [text.text for text in root.iter("text")]


def test_best_step_is_ringed() -> None:
    held_out: list[Point] = [(0.0, 2.0), (10.0, 1.0), (20.0, 1.5)]
    root = parse(line_chart([line(held_out, "held-out")], description="x", best=10))
    (ring,) = [circle for circle in root.iter("circle") if circle.get("class") == "ring"]
    assert ring.get("cx") == "50%"
    assert [mark.get("x1") for mark in root.iter("line") if mark.get("class") == "best"] == ["50%"]


def test_log_axis_only_where_allowed_and_needed() -> None:
    steep: list[Point] = [(float(x), 2.0 * 0.9**x) for x in range(60)]
    flat: list[Point] = [(float(x), 2.0 * 0.99**x) for x in range(60)]
    assert 'data-log="1"' in line_chart([line(steep)], description="x", may_be_log=True)
    assert 'data-log="0"' in line_chart([line(steep)], description="x")
    assert 'data-log="0"' in line_chart([line(flat)], description="x", may_be_log=True)


def test_tooltips_say_every_line_of_a_step() -> None:
    lines = [line([(1.0, 2.0), (2.0, 1.0)], label="training <b>"), line([(2.0, 0.5)], "held-out", "held-out")]
    root = parse(line_chart(lines, description="x"))
    tips = json.loads(root.get("data-tips") or "")
    assert tips["step"] == [1, 2]
    assert tips["at"] == [0, 1]
    assert tips["say"] == [["step 1", "training <b> 2.0"], ["step 2", "training <b> 1.0", "held-out 0.5"]]


def test_histogram_bars_have_their_width_and_height() -> None:
    root = parse(histogram([0, 100, 400], [50, 100], description="Rows by length.", height=100))
    bars = [(bar.get("x"), bar.get("width"), bar.get("height")) for bar in root.iter("rect")]
    assert bars == [("0%", "25%", "50"), ("25%", "75%", "100")]
    heights = {text.text: text.get("y") for text in root.iter("text") if text.get("text-anchor") == "end"}
    assert heights == {"0": "100", "50": "50", "100": "0"}
    assert [title.text for title in root.iter("title")] == ["0 to 100 tokens: 50 rows", "100 to 400 tokens: 100 rows"]


@pytest.mark.parametrize(
    ("edges", "counts"), [([], []), ([0, 1], []), ([0, 1, 2], [3]), ([0, 1], [0]), ([1, 0], [3]), ([0, 1], [-1])]
)
def test_histogram_that_fits_nothing_is_nothing(edges: list[float], counts: list[float]) -> None:
    assert histogram(edges, counts, description="x") == ""


@given(st.lists(st.tuples(st.integers(0, 10**6), st.none() | finite), min_size=1, max_size=40))
def test_no_points_make_a_broken_chart(raw: list[tuple[int, float | None]]) -> None:
    points: list[Point] = [(float(x), y) for x, y in sorted(dict(raw).items())]
    svg = line_chart([line(points, "faint"), line(smooth(points, 2))], description="x", may_be_log=True)
    assert (svg == "") == all(y is None for _, y in points)
    if svg:
        drawn = " ".join(element.get("d") or "" for element in parse(svg).iter("path"))
        assert not re.search(r"nan|inf|e[+-]?\d", drawn)
