"""Progress of a long stage whose steps are not counted."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

LINE_SECONDS = 60.0
"""Between two lines of progress in a log that is no terminal."""


@contextlib.contextmanager
def status_line(console: Console, text: str) -> Iterator[Callable[[str], None]]:
    """Yield a function that takes a new text: for a spinner on a terminal, for a line a minute in a log."""
    if console.is_terminal:
        with console.status(text) as status:
            yield status.update
        return
    next_line = time.monotonic() + LINE_SECONDS

    def update(text: str) -> None:
        nonlocal next_line
        if time.monotonic() >= next_line:
            next_line = time.monotonic() + LINE_SECONDS
            console.print(text, markup=False, highlight=False)

    yield update
