"""HTML pages from the templates of this directory.

A page is one file: it loads nothing and runs only its own script.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from qvera.utils.formatting import count, duration, moment, percent, significant, size

_HERE = Path(__file__).parent
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


@functools.cache
def environment() -> Environment:
    """The templates, with autoescape: every text that they print is escaped, also inside attributes."""
    found = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (_HERE / "script.js").read_text(encoding="utf-8")
    found.globals |= {
        "newline": "\n",  # browsers drop the first one of a <pre>, which else would be the text's own
        "style": Markup((_HERE / "style.css").read_text(encoding="utf-8")),
        "script": Markup(script),
        "script_sha256": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    formats: tuple[Callable[[float], str], ...] = (count, duration, percent, significant, size)
    found.filters |= {function.__name__: _or_nothing(function) for function in formats}
    found.filters |= {"moment": moment, "yaml": yaml_text, "code_spans": _code_spans}
    return found


def render(template: str, **context: object) -> str:
    """A whole page. What HTML has no place for (control characters, surrogates) becomes U+FFFD."""
    return _UNPRINTABLE.sub("\ufffd", environment().get_template(template).render(context))


def yaml_text(value: object) -> str:
    """A value of a recipe as YAML writes it, on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


def _or_nothing(text: Callable[[float], str]) -> Callable[[float | None], str]:
    """The same format, with "" for a value that is not known."""
    return lambda value: "" if value is None else text(value)


def _code_spans(text: str) -> Markup:
    """A sentence as HTML: what stands between backticks is code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))
