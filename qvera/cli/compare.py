"""`qvera compare`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qvera.cli.common import Json, require_new_file

if TYPE_CHECKING:
    from rich.table import Table

    from qvera.evaluation.report.compare import Comparison


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Two to eight run directories.")],
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with the curves there.")] = None,
    as_json: Json = False,
) -> None:
    """Compare runs: scores, cost, recipe keys that differ.

    Reads recipe.yaml, metrics.jsonl and run.json of each run, and eval.json if `qvera eval RUN --json RUN/eval.json`
    wrote one; no model. It names what is missing and what can't be compared (another base, other held-out rows, another
    machine).

    Example:
        qvera compare runs/quickstart runs/other --html page.html
    """
    from qvera.evaluation.report.compare import compare_runs

    if html is not None:
        require_new_file(html)
    found = compare_runs(runs)
    if html is not None:
        from qvera.evaluation.report.pages import compare_page
        from qvera.utils.atomic import replace_text

        replace_text(html, compare_page(found))
    if as_json:
        print(json.dumps(found.to_dict(), indent=1, ensure_ascii=False))
        return
    _print_runs(found)
    if html is not None:
        print(f"\n{html}: the same with the curves")


def _print_runs(found: Comparison) -> None:
    """A row for each run, its scores by `qvera eval`, the keys that differ, and what can't be compared."""
    from rich.console import Console

    from qvera.evaluation.report.compare import COSTS, SCORES, score_columns, table, yaml_text

    # a pipe has no width, and its reader can cut columns better than we could
    out = Console(width=None if sys.stdout.isatty() else 250, highlight=False, markup=False)
    columns = [column._replace(title=column.title.lower()) for column in (*SCORES, *COSTS)]
    out.print(_run_table(*table(columns, found.figures)))
    # named as qvera eval prints them
    scored = [column._replace(title=column.key) for column in score_columns(found.runs)]
    if scored:
        out.print("\nScores by qvera eval")
        out.print(_run_table(*table(scored, found.score_figures)))
        out.print()
    for key, values in found.differing.items():
        who: dict[str, list[str]] = {}
        for label, value in zip(found.runs, values, strict=True):
            who.setdefault(yaml_text(value), []).append(label)
        out.print(f"{key}: " + "; ".join(f"{text} ({', '.join(labels)})" for text, labels in who.items()))
    for gap in found.gaps:
        out.print(f"! {gap}")


def _run_table(titles: list[str], rows: list[tuple[str, list[str]]]) -> Table:
    from rich.table import Column, Table

    columns = [Column(title, justify="right") for title in titles]
    table = Table(Column("run", overflow="fold"), *columns, box=None, pad_edge=False)
    for label, cells in rows:
        table.add_row(label, *cells)
    return table
