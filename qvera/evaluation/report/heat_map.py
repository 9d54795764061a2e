"""A grid of values as shades, for templates/chart.html: a row for each kind of linear, a column for each layer."""

import math
from collections.abc import Callable, Mapping

from qvera.evaluation.report.charts import Chart, Scale, tooltips_json
from qvera.utils.formatting import significant

SHADES = 9
"""Shades above that of 0: the classes h1 to h9 of style.css."""
_ROW_HEIGHT = 24
_MOST_LABELS = 12
_LABEL_LENGTH = 9


def heat_map(
    title: str,
    rows: Mapping[str, Mapping[int, float]],
    *,
    note: str = "",
    format: Callable[[float], str] = significant,
) -> Chart | None:
    """A heat map; None where there is no value.

    Args:
        rows: Name of each row → column (a layer) → value, 0 or more. The largest value has the full colour. Where a row
            has no value there is no cell.
        note: Text beside the heading.
        format: How a value is written in tooltips.
    """
    columns = sorted({column for values in rows.values() for column in values})
    if not columns:
        return None
    largest = max(value for values in rows.values() for value in values.values())
    across, down = Scale(0.0, len(columns)), Scale(0.0, len(rows))
    bars = []
    for number, (name, values) in enumerate(rows.items()):
        for place, column in enumerate(columns):
            if column in values:
                shade = math.ceil(SHADES * values[column] / largest) if largest > 0 else 0
                text = f"layer {column}: {name} {format(values[column])}"
                cell = across.percent(place), across.percent(1), down.percent(number), down.percent(1)
                bars.append((f"bar h{shade}", *cell, text))
    texts = [
        [f"layer {column}", *(f"{name} {format(values[column])}" for name, values in rows.items() if column in values)]
        for column in columns
    ]
    middles = [place + 0.5 for place in range(len(columns))]
    stride = -(-len(columns) // _MOST_LABELS)
    return {
        "title": title,
        "note": note,
        "description": f"{title} by layer and kind of linear, from 0 to {format(largest)}.",
        "height": _ROW_HEIGHT * len(rows),
        "legend": [("swatch h0", "0"), (f"swatch h{SHADES}", format(largest))],
        "y_ticks": [(down.percent(number + 0.5), _label(name)) for number, name in enumerate(rows)],
        "x_ticks": [
            (across.percent(middle), str(column))
            for middle, column in list(zip(middles, columns, strict=True))[::stride]
        ],
        "x_name": "layer",
        "bars": bars,
        "sync": "layers",
        "tooltips": tooltips_json(across, list(zip(middles, texts, strict=True))),
    }


def _label(name: str) -> str:
    """A name as short as the margin: q of q_proj."""
    short = name.removesuffix("_proj")
    return short if len(short) <= _LABEL_LENGTH else f"{short[: _LABEL_LENGTH - 1]}…"
