"""The page and the tables of ``qvera analyze``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qvera.evaluation.report.charts import Chart, Scale, tooltips_json
from qvera.evaluation.report.pages import render
from qvera.utils.formatting import count, percent, significant

Document = dict[str, Any]
"""What ``qvera analyze --json`` prints."""
ROLE_TITLES = ["linears", "intruder dimensions", "‖ΔW‖ / ‖W‖", "effective rank of ΔW"]


def role_rows(document: Document) -> list[tuple[str, list[str]]]:
    """The cells of `ROLE_TITLES` for each kind of linear, then for all of them; norms and ranks are medians."""
    roles: dict[str, list[dict[str, Any]]] = {}
    for linear in document["linears"]:
        roles.setdefault(linear["role"], []).append(linear)
    rows = [(role, _cells(linears)) for role, linears in roles.items()]
    return [*rows, ("all", _cells(document["linears"]))]


def _cells(linears: list[dict[str, Any]]) -> list[str]:
    return [
        count(len(linears)),
        count(sum(len(linear["intruders"]) for linear in linears)),
        significant(statistics.median(linear["relative_norm"] for linear in linears)),
        significant(statistics.median(linear["effective_rank"] for linear in linears)),
    ]


def loss_titles(document: Document) -> list[str]:
    """The column titles of `loss_rows`."""
    reduced = document["reduced"]
    return ["Rows", "Base", "Adapter", *([] if reduced is None else [f"Reduced to {reduced['keep']:g}"])]


def loss_rows(document: Document) -> list[tuple[str, list[str]]]:
    """For each text its rows, and the losses of base, adapter and reduced adapter (if there is one)."""
    rows = []
    for losses in document["losses"]:
        models = [losses[model] for model in ("base", "adapter", "reduced") if losses[model] is not None]
        rows.append((losses["text"], [count(losses["rows"]), *(f"{loss:.4f}" for loss in models)]))
    return rows


def summary(document: Document) -> str:
    """A sentence: how many intruder dimensions there are, and in how many linears."""
    found = [len(linear["intruders"]) for linear in document["linears"]]
    total, touched = sum(found), sum(number > 0 for number in found)
    dimensions = f"{total:,} intruder dimension{'' if total == 1 else 's'}"
    where = f" in {touched:,} of {len(found):,} linears" if total else f" in {len(found):,} linears"
    return f"{dimensions}{where} (k = {document['top_k']}, ε = {document['epsilon']:g})"


def analysis_page(document: Document) -> str:
    """HTML with heat maps over layers, tables, and every intruder dimension."""
    pictures: list[tuple[str, Callable[[dict[str, Any]], float], Callable[[float], str], str]] = [
        ("Intruder dimensions", lambda linear: len(linear["intruders"]), count, "among the first k singular vectors"),
        ("Size of ΔW", lambda linear: linear["relative_norm"], percent, "‖ΔW‖ / ‖W‖, Frobenius"),
        ("Effective rank of ΔW", lambda linear: linear["effective_rank"], significant, "exp of the entropy of σ / Σσ"),
    ]
    charts = []
    for title, value, text, note in pictures:
        rows: dict[str, dict[int, float]] = {}
        for linear in document["linears"]:
            if linear["layer"] is not None:
                rows.setdefault(linear["role"], {})[linear["layer"]] = value(linear)
        charts.append(heat_map(title, rows, note=note, format=text))
    intruders = [
        (
            linear["name"],
            [
                f"{index + 1} of {len(linear['cosines'])}",
                significant(linear["singular_values"][index]),
                ("" if linear["exact"][index] else "at most ") + significant(linear["cosines"][index]),
            ],
        )
        for linear in document["linears"]
        for index in linear["intruders"]
    ]
    return render(
        Path(__file__).with_name("analysis.html"),
        document=document,
        name=Path(document["subject"]["path"]).resolve().name,
        summary=summary(document),
        charts=charts,
        roles=role_rows(document),
        role_titles=[title[0].upper() + title[1:] for title in ROLE_TITLES],
        losses=loss_rows(document),
        loss_titles=loss_titles(document),
        intruders=intruders,
    )


SHADES = 9
"""Above the shade of 0: the classes h1 to h9 of style.css."""
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
    """A heat map of row → column → value, 0 or more; None without values. The largest value has the full colour."""
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
    short = name.removesuffix("_proj")
    return short if len(short) <= _LABEL_LENGTH else f"{short[: _LABEL_LENGTH - 1]}…"
