"""`qvera info` and `qvera compare`: what the files of runs say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from qvera.cli.common import (
    AdapterName,
    AdapterNames,
    HtmlFile,
    Json,
    argument,
    print_json,
    print_table,
    require_new_file,
)
from qvera.utils import formatting
from qvera.utils.adapter_names import shown_name

if TYPE_CHECKING:
    from qvera.evaluation.report.compare import Comparison


MAX_ADAPTERS = 50
"""A run of more adapters shows this many, those that need attention first."""


def info(
    path: Annotated[Path, argument("DIR", "A run, adapter, merged export, or a hub id.")],
    adapter: AdapterName = None,
    as_json: Json = False,
) -> None:
    """Show the facts of a run, adapter or export.

    A run that trained many adapters has a table of them; --adapter NAME shows one.

    Example:
        qvera info runs/quickstart
    """
    from qvera.evaluation.run_info import directory_facts

    facts = directory_facts(path, adapter)
    if as_json:
        print_json(facts)
        return
    adapters = facts.pop("adapters", None)
    for name, value in facts.items():
        print(f"{name:<22}{_text(name, value)}")
    if adapters is not None:
        _print_adapters(path, adapters)


def _print_adapters(path: Path, adapters: list[dict[str, Any]]) -> None:
    from qvera.evaluation.report.read import entries_of

    entries = entries_of({"adapters": adapters})
    shown = entries if len(entries) <= MAX_ADAPTERS else sorted(entries, key=lambda one: not one.remarks)
    shown, dash, rows = shown[:MAX_ADAPTERS], formatting.text_or_dash, []
    for one in shown:
        counts = [dash(value, formatting.count) for value in (one.rows, one.eval_rows, one.steps)]
        losses = (one.loss_before, one.loss_after, one.train_loss_first, one.train_loss_last)
        ended = "; ".join([*([one.status_text] if one.status else []), *one.flags])
        rows.append((shown_name(one.name), [*counts, *(dash(loss, "{:.4f}".format) for loss in losses), ended]))
    titles = ["adapter", "rows", "held out", "steps", "loss before", "loss after", "first", "last", "ended"]
    print()
    print_table(titles, rows)
    if len(shown) < len(entries):
        print(f"{len(entries) - len(shown):,} more: `qvera info {path} --json` has all, and report.html of a run.")


def _text(name: str, value: object) -> str:
    if value in ([], {}):
        return "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(key, inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(_text(name, inner) for inner in value)
    if name == "name":
        return shown_name(str(value))
    if not formatting.is_number(value):
        return "yes" if value is True else "no" if value is False else "–" if value is None else str(value)
    if name.endswith("_bytes"):
        return formatting.size(value)
    if name == "seconds" or name.endswith("_seconds"):
        return formatting.duration(value)
    if "seed" in name or "version" in name:
        return str(value)
    return f"{value:,}" if isinstance(value, int) else formatting.significant(value)


def compare(
    runs: Annotated[list[Path], argument("RUN", "Run directories, two to eight in all.")],
    adapters: AdapterNames,
    html: HtmlFile = None,
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

    require_new_file(html, ".html")
    found = compare_runs(runs, adapters)
    if html is not None:
        from qvera.evaluation.report.pages import compare_page
        from qvera.utils.files import replace_text

        replace_text(html, compare_page(found))
    if as_json:
        print_json(found.to_dict())
        return
    _print_runs(found)
    if html is not None:
        print(f"\n{html}: the same with the curves")


def _print_runs(found: Comparison) -> None:
    from qvera.evaluation.report.compare import COSTS, SCORES, plain_yaml, score_columns, table

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
            who.setdefault(plain_yaml(value), []).append(label)
        print(f"{key}: " + "; ".join(f"{text} ({', '.join(labels)})" for text, labels in who.items()))
    for gap in found.gaps:
        print(f"! {gap}")
