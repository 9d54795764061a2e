"""The few pieces of HTML that every section is made of."""

from __future__ import annotations

import base64
import hashlib
import re
from html import escape

from qvera.evaluation.report.assets import SCRIPT, STYLE

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


def document(title: str, body: str, footer: str) -> str:
    """A whole page around ``body`` (HTML). Its policy forbids every load, and every script but its own (by hash)."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{esc(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}<footer>{footer}</footer>\n</main>\n"
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )
