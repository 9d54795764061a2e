"""The page of a learning-rate range test: loss over the rate, with what is suggested and where it diverged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvera.evaluation.report.charts import Line, line_chart
from qvera.evaluation.report.markup import document, esc, fact_list, section
from qvera.evaluation.report.points import Point
from qvera.evaluation.report.read import number
from qvera.utils.atomic import replace_text
from qvera.utils.formatting import duration, significant

if TYPE_CHECKING:
    from qvera.training.lr_curve import Found


def write_ramp(path: Path, title: str, name: str, found: Found, facts: dict[str, Any]) -> None:
    """Write the page in one rename; see `ramp_page`."""
    replace_text(path, ramp_page(title, name, found, facts))


def ramp_page(title: str, name: str, found: Found, facts: dict[str, Any]) -> str:
    """The page as HTML.

    Args:
        title: the model's name; name: the output directory's.
        facts: ``rule`` of the suggestion, the recipe's own ``learning_rate``, ``data``, and the ``ramp``.
    """
    points, ramp = found.points, facts["ramp"]
    score = (
        f'<p class="score"><span class="to">{esc(rate_text(found.suggestion))}</span></p>'
        f'<p class="caption">Suggested: {esc(facts["rule"])}. Worth a try down to the steepest fall.</p>'
        if found.suggestion is not None
        else '<p class="soft">No suggestion: the loss never fell. Start lower, or take more steps.</p>'
    )
    ended = (
        f"{rate_text(found.diverged)} (step {len(points)} of {ramp.steps})"
        if found.diverged is not None
        else f"not up to {rate_text(ramp.end)}; a higher --lr-to would show where"
    )
    seconds = sum(number(point, "step_seconds") or 0.0 for point in points)
    table = fact_list(
        [
            ("Steepest fall at", rate_text(found.steepest) if found.steepest is not None else ""),
            ("Diverged at", esc(ended)),
            ("The recipe says", rate_text(facts["learning_rate"])),
            ("Ramp", f"{rate_text(ramp.start)} to {rate_text(ramp.end)}, {ramp.steps} steps"),
            ("Rows from", esc(facts["data"])),
            ("Time", duration(seconds)),
        ]
    )
    head = (
        f'<header>\n<p class="eyebrow">qvera learning-rate range test <b>{esc(name)}</b></p>\n<h1>{esc(title)}</h1>\n'
        f'<div class="outcome"><div>{score}</div><div>{table}</div></div>\n</header>\n'
    )
    figures = _loss(found) + _norm(found)
    return document(
        f"{title} · learning rates · {name} · qvera",
        head + section("Loss by learning rate", figures),
        "Written by qvera train --find-lr. Nothing of this training was kept.",
    )


def rate_text(rate: float) -> str:
    """A learning rate: 0.0123, 0.02, 4.1e-5."""
    return f"{rate:.3g}".replace("e-0", "e-").replace("e+0", "e")


def _loss(found: Found) -> str:
    raw = _points(found, "loss")
    soft = _points(found, "smoothed_loss")
    lines = [_line("loss", raw, "faint"), _line("smoothed", soft, "main")]
    legend = [("faint", "loss of each step"), ("main", "smoothed")]
    if found.suggestion is not None:
        at = min((x for x, y in soft if y is not None), key=lambda x: abs(x - (found.suggestion or 0.0)))
        lines.append(_line("suggested", [(x, y) for x, y in soft if x == at], "held-out"))
        legend.append(("held-out", f"suggested, {rate_text(found.suggestion)}"))
    known = [y for _, y in soft if y is not None]
    said = f"from {significant(known[0])}, lowest {significant(min(known))}" if known else "not a number"
    # a loss that has diverged would press everything else flat
    top = max(known[0] * 1.1, known[0] + 0.5 * (known[0] - min(known))) if known else None
    chart = line_chart(
        lines,
        description=f"Loss by learning rate: {said}.",
        height=300,
        top=top,
        best=found.suggestion,
        x_name="learning rate",
        x_log=True,
    )
    return _figure("Loss", "nats a trained token", legend, chart)


def _norm(found: Found) -> str:
    line = _line("gradient norm", _points(found, "grad_norm"), "main")
    chart = line_chart(
        [line],
        description="Gradient norm by learning rate.",
        may_be_log=True,
        x_name="learning rate",
        x_log=True,
    )
    return _figure("Gradient norm", "before clipping", [], chart)


def _points(found: Found, key: str) -> list[Point]:
    return [(point["learning_rate"], number(point, key)) for point in found.points]


def _line(label: str, points: list[Point], style: Any) -> Line:
    return Line(label, points, style, [significant(y) if y is not None else "not a finite number" for _, y in points])


def _figure(title: str, unit: str, legend: list[tuple[str, str]], chart: str) -> str:
    if not chart:
        return ""
    keys = "".join(f'<span class="legend"><i class="{style}"></i>{esc(text)}</span>' for style, text in legend)
    caption = f'<figcaption><h3>{title}</h3><span class="caption">{unit}</span>{keys}</figcaption>'
    return f"<figure>{caption}{chart}</figure>"
