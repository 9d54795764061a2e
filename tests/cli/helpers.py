"""Parse a command line without running it."""

from __future__ import annotations

from typing import Any

import typer

from qvera.cli.main import build_app


def parse(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """The command that a line names, and its options as its function would get them.

    Raises an exception of Typer where main() would end with 2.
    """
    app: Any = typer.main.get_command(build_app())
    name, *rest = arguments
    context = app.make_context("qvera", [name])
    return name, app.get_command(context, name).make_context(name, rest, parent=context).params
