"""`qvera compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qvera.cli.common import AdapterNames, Json, print_table, require_new_file

if TYPE_CHECKING:
    from qvera.evaluation.report.compare import Comparison


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run directories, two to eight in all.")],
    adapters: AdapterNames,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with the curves there.")] = None,
    as_json: Json = False,
) -> None:
    """Compare runs: scores, cost, recipe keys that differ.

    Reads recipe.yaml, metrics.jsonl and run.json of each run, and eval.json if `qvera eval RUN --json RUN/eval.json`
    wrote one; no model. It names what is missing and what can't be compared (another base, other held-out rows, another
    machine).

    --adapter NAME, once for each, compares adapters of runs that trained many, within a run or between runs. Their
    scores are read from an eval.json in the adapter's directory.

    Example:
        qvera compare runs/quickstart runs/other --html page.html
    """
    from qvera.evaluation.report.compare import compare_runs

    if html is not None:
        require_new_file(html)
    found = compare_runs(runs, adapters)
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
    from qvera.evaluation.report.compare import COSTS, SCORES, score_columns, table, yaml_text

    titles, rows = table([*SCORES, *COSTS], found.figures)
    print_table(["run", *(title.lower() for title in titles)], rows)
    # named as qvera eval prints them
    scored = [column._replace(title=column.key) for column in score_columns(found.runs)]
    if scored:
        titles, rows = table(scored, found.score_figures)
        print("\nScores by qvera eval")
        print_table(["run", *titles], rows)
        print()
    for key, values in found.differing.items():
        who: dict[str, list[str]] = {}
        for label, value in zip(found.runs, values, strict=True):
            who.setdefault(yaml_text(value), []).append(label)
        print(f"{key}: " + "; ".join(f"{text} ({', '.join(labels)})" for text, labels in who.items()))
    for gap in found.gaps:
        print(f"! {gap}")
