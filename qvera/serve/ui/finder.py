"""Rows of a long table: found by name, a page of them at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlencode

T = TypeVar("T")
PAGE_ROWS = 100


@dataclass(frozen=True)
class Finder:
    """What the form above a table shows, for the macro `finder` of templates/parts.html.

    Attributes:
        action: the page's path.
        text: part of a name, which all rows have.
        flagged: only rows that a person should look at.
        page: from 0.
    """

    action: str
    text: str
    flagged: bool
    page: int
    found: int = 0

    @property
    def shown(self) -> str:
        """Which rows are shown, of how many that were found."""
        first, last = self.page * PAGE_ROWS, min(self.found, (self.page + 1) * PAGE_ROWS)
        return f"{first + 1:,} to {last:,} of {self.found:,}" if last else "none found"

    @property
    def links(self) -> list[tuple[str, str]]:
        """To the pages before and after, with their titles."""
        links = [("Previous", self.page - 1)] if self.page else []
        if (self.page + 1) * PAGE_ROWS < self.found:
            links.append(("Next", self.page + 1))
        kept = {"q": self.text, **({"flagged": "1"} if self.flagged else {})}
        return [(title, f"{self.action}?{urlencode({**kept, 'page': page})}") for title, page in links]


def find(
    rows: Sequence[T], asked: Finder, name: Callable[[T], str], is_flagged: Callable[[T], bool] = lambda row: True
) -> tuple[list[T], Finder]:
    """The rows that a form asks for, and the form with how many there are."""
    wanted = asked.text.strip().lower()
    fitting = [row for row in rows if wanted in name(row).lower() and (not asked.flagged or is_flagged(row))]
    page = min(asked.page, max(0, (len(fitting) - 1) // PAGE_ROWS))
    finder = Finder(asked.action, asked.text, asked.flagged, page, len(fitting))
    return fitting[page * PAGE_ROWS : (page + 1) * PAGE_ROWS], finder
