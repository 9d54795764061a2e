"""The few pieces of HTML that every section is made of."""

from __future__ import annotations

import re
from html import escape

_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def esc(value: object) -> str:
    """Text for HTML, also in quotes. What HTML has no place for (control characters, surrogates) becomes U+FFFD."""
    return escape(_UNSEEN.sub("\ufffd", str(value)), quote=True)


def section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{esc(title)}</h2>\n{''.join(parts)}\n</section>\n" if any(parts) else ""


def fact_list(pairs: list[tuple[str, str]]) -> str:
    """A definition list of (name, HTML); pairs without a value are left out."""
    rows = "".join(f"<dt>{esc(name)}</dt><dd>{value}</dd>" for name, value in pairs if value)
    return f'<dl class="facts">{rows}</dl>' if rows else ""
