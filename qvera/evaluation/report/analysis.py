"""The page and the tables of ``qvera analyze``."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qvera.evaluation.report.heat_map import heat_map
from qvera.evaluation.report.pages import render
from qvera.utils.formatting import count, percent, significant

Document = dict[str, Any]
"""What ``qvera analyze --json`` prints."""
ROLE_TITLES = ["linears", "intruder dimensions", "‖ΔW‖ / ‖W‖", "effective rank of ΔW"]


def role_rows(document: Document) -> list[tuple[str, list[str]]]:
    """For each kind of linear the cells of `ROLE_TITLES`; norms and ranks are medians. Then a row for all of them."""
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
    """Titles of the columns of `loss_rows`."""
    reduced = document["reduced"]
    return ["Rows", "Base", "Adapter", *([] if reduced is None else [f"Reduced to {reduced['keep']:g}"])]


def loss_rows(document: Document) -> list[tuple[str, list[str]]]:
    """For each text its rows and the losses of base, adapter and, where there is one, reduced adapter."""
    rows = []
    for losses in document["losses"]:
        models = [losses[model] for model in ("base", "adapter", "reduced") if losses[model] is not None]
        rows.append((losses["text"], [count(losses["rows"]), *(f"{loss:.4f}" for loss in models)]))
    return rows


def summary(document: Document) -> str:
    """How many intruder dimensions there are and in how many linears, in a sentence."""
    found = [len(linear["intruders"]) for linear in document["linears"]]
    total, touched = sum(found), sum(number > 0 for number in found)
    dimensions = f"{total:,} intruder dimension{'' if total == 1 else 's'}"
    where = f" in {touched:,} of {len(found):,} linears" if total else f" in {len(found):,} linears"
    return f"{dimensions}{where} (k = {document['top_k']}, ε = {document['epsilon']:g})"


def analysis_page(document: Document) -> str:
    """The page of ``qvera analyze``: heat maps over layers, tables, and every intruder dimension."""
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
        "analysis.html",
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
