"""`qvera info`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from qvera.cli.common import Json
from qvera.utils import formatting


def info(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="A run, an adapter directory or a merged export.")],
    as_json: Json = False,
) -> None:
    """Show the facts of a run, adapter or export.

    Example:
        qvera info runs/quickstart
    """
    from qvera.evaluation.run_info import directory_facts

    facts = directory_facts(path)
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    for name, value in facts.items():
        print(f"{name:<22}{_text(name, value)}")


def _text(name: str, value: object) -> str:
    """A fact as people read it: sizes, durations and shares with their units."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(key, inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(_text(name, inner) for inner in value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "yes" if value is True else "no" if value is False else "–" if value is None else str(value)
    if name.endswith("_bytes"):
        return formatting.size(value)
    if name == "seconds" or name.endswith("_seconds"):
        return formatting.duration(value)
    if "seed" in name or "version" in name:
        return str(value)
    return f"{value:,}" if isinstance(value, int) else formatting.significant(value)
