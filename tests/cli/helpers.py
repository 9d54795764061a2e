"""Parse a command line without running it, and stop one that answers."""

from __future__ import annotations

from typing import Any

import pytest

from qvera.cli.generate import KeptAnswers
from qvera.cli.main import build_app


def parse(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """The command that a line names, and its options as its function would get them.

    Raises an exception of Typer where main() would end with 2.
    """
    app, (name, *rest) = build_app(), arguments
    context = app.make_context("qvera", [name])
    return name, app.get_command(context, name).make_context(name, rest, parent=context).params


def stopped_after(answers: int, error: BaseException, patch: pytest.MonkeyPatch) -> None:
    """Let the command that keeps answers meet ``error`` in place of the next one."""
    add = KeptAnswers.add

    def stop(self: KeptAnswers, number: int, answer: str) -> None:
        if len(self.found) == answers:
            raise error
        add(self, number, answer)

    patch.setattr(KeptAnswers, "add", stop)
