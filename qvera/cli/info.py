"""`qvera info`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from qvera.cli.common import AdapterName, Json, print_table
from qvera.utils import formatting
from qvera.utils.adapter_names import shown_name

MAX_ADAPTERS = 50
"""A run of more adapters shows as many of them, those that a person should look at first."""


def info(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="A run, adapter, merged export, or a hub id.")],
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
        print(json.dumps(facts, indent=1))
        return
    adapters = facts.pop("adapters", None)
    for name, value in facts.items():
        print(f"{name:<22}{_text(name, value)}")
    if adapters is not None:
        _print_adapters(path, adapters)


def _print_adapters(path: Path, adapters: list[dict[str, Any]]) -> None:
    """A row for each adapter: its rows, steps, losses and how it ended."""
    from qvera.evaluation.report.read import entries_of

    entries = entries_of({"adapters": adapters})
    shown = (
        sorted(entries, key=lambda entry: not entry.is_flagged)[:MAX_ADAPTERS]
        if len(entries) > MAX_ADAPTERS
        else entries
    )
    rows = []
    for entry in shown:
        counts = [
            formatting.text_or_dash(value, formatting.count) for value in (entry.rows, entry.eval_rows, entry.steps)
        ]
        losses = (entry.loss_before, entry.loss_after, entry.train_loss_first, entry.train_loss_last)
        cells = [*counts, *(formatting.text_or_dash(loss, "{:.4f}".format) for loss in losses)]
        rows.append(
            (
                shown_name(entry.name),
                [*cells, "; ".join([*([entry.status_text] if entry.status else []), *entry.flags])],
            )
        )
    titles = ["adapter", "rows", "held out", "steps", "loss before", "loss after", "first", "last", "ended"]
    print()
    print_table(titles, rows)
    if len(shown) < len(entries):
        print(f"{len(entries) - len(shown):,} more: `qvera info {path} --json` has all, and report.html of a run.")


def _text(name: str, value: object) -> str:
    """A fact as people read it: sizes, durations and shares with their units."""
    if value in ([], {}):
        return "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(key, inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(_text(name, inner) for inner in value)
    if name == "name":
        return shown_name(str(value))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "yes" if value is True else "no" if value is False else "–" if value is None else str(value)
    if name.endswith("_bytes"):
        return formatting.size(value)
    if name == "seconds" or name.endswith("_seconds"):
        return formatting.duration(value)
    if "seed" in name or "version" in name:
        return str(value)
    return f"{value:,}" if isinstance(value, int) else formatting.significant(value)
