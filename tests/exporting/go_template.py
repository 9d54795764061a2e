"""As much of Go's text/template as qvera's Modelfiles use, rewritten as Jinja; anything else is an error.

Written after pkg.go.dev/text/template. The templates were also run once by Go itself (1.27), with the same texts.
"""

from __future__ import annotations

import re
from typing import Any

from jinja2 import Environment, StrictUndefined

_WORD = re.compile(r'\(|\)|"(?:[^"\\]|\\.)*"|[$.\w]+')
_FUNCTIONS: dict[str, Any] = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "and": lambda a, b: a and b, "not": lambda a: not a,
    "len": len, "slice": lambda items, start: items[start:],
}  # fmt: skip


def render(template: str, messages: list[dict[str, str]]) -> str:
    """What Ollama sends to the model for these messages."""
    open_blocks: list[str] = []

    def rewritten(action: re.Match[str]) -> str:
        body, left, right = action["body"], "-" if action["left"] else "", "-" if action["right"] else ""
        kind = body.partition(" ")[0]
        if found := re.fullmatch(r"range \$(\w+), \$(\w+) := (.+)", body):
            open_blocks.append("for")
            first, second = f"set go.{found[1]} = loop.index0", f"set go.{found[2]} = item"
            return f"{{%{left} for item in {_expression(found[3])} %}}{{% {first} %}}{{% {second} {right}%}}"
        if found := re.fullmatch(r"\$(\w+) :?= (.+)", body):
            statement = f"set go.{found[1]} = {_expression(found[2])}"
        elif kind == "end":
            statement = f"end{open_blocks.pop()}"
        elif kind == "if":
            open_blocks.append("if")
            statement = f"if {_expression(body.removeprefix('if '))}"
        elif kind == "else":
            statement = body if body == "else" else f"elif {_expression(body.removeprefix('else if '))}"
        else:
            return f"{{{{{left} {_expression(body)} {right}}}}}"
        return f"{{%{left} {statement} {right}%}}"

    source = re.sub(r"\{\{(?P<left>- )? ?(?P<body>.*?) ?(?P<right> -)?\}\}", rewritten, template, flags=re.DOTALL)
    assert not open_blocks
    jinja = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    root = {"Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages]}
    functions = {f"go_{name}": function for name, function in _FUNCTIONS.items()}
    return jinja.from_string("{% set go = namespace() %}" + source).render(root=root, **functions)


def _expression(text: str) -> str:
    words = _WORD.findall(text)
    found = _call(words)
    assert not words
    return found


def _call(words: list[str]) -> str:
    """A function with its arguments, or one value."""
    if words[0] not in _FUNCTIONS:
        return _term(words)
    name, arguments = words.pop(0), []
    while words and words[0] != ")":
        arguments.append(_term(words))
    return f"go_{name}({', '.join(arguments)})"


def _term(words: list[str]) -> str:
    word = words.pop(0)
    if word == "(":
        found = _call(words)
        assert words.pop(0) == ")"
        return found
    return re.sub(r"^\$?\.", "root.", word) if word.startswith((".", "$.")) else word.replace("$", "go.")
