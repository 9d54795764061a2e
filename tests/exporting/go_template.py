"""As much of Go's text/template as qvera's Modelfiles use, read strictly: anything else is an error.

Written after pkg.go.dev/text/template. The templates were also run once by Go itself (1.27), with the same texts.
"""

from __future__ import annotations

import re
from typing import Any

_ACTION = re.compile(r"\{\{(?P<left>- )?(?P<body>.*?)(?P<right> -)?\}\}", re.DOTALL)
_WORD = re.compile(r'\(|\)|"(?:[^"\\]|\\.)*"|:=|=|,|[$.\w]+')


def render(template: str, messages: list[dict[str, str]]) -> str:
    """What Ollama sends to the model for these messages."""
    parts: list[tuple[str, Any]] = []
    place, trim = 0, False
    for found in _ACTION.finditer(template):
        text = template[place : found.start()]
        text = text.lstrip() if trim else text
        parts.append(("text", text.rstrip() if found["left"] else text))
        parts.append(("action", _WORD.findall(found["body"])))
        place, trim = found.end(), bool(found["right"])
    parts.append(("text", template[place:].lstrip() if trim else template[place:]))
    tree, rest = _block(parts, 0)
    assert rest == len(parts), "an end too many"
    dot = {"Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages]}
    return "".join(_run(tree, dot, [{"$": dot}]))


def _block(parts: list[tuple[str, Any]], at: int) -> tuple[list[Any], int]:
    """Nodes up to an end or else, and the place of that."""
    nodes: list[Any] = []
    while at < len(parts):
        kind, body = parts[at]
        if kind == "text":
            nodes.append(("text", body))
        elif body[0] in ("end", "else"):
            return nodes, at
        elif body[0] == "range":
            assert [body[2], body[4]] == [",", ":="]
            inner, at = _block(parts, at + 1)
            assert parts[at][1] == ["end"]
            nodes.append(("range", body[1], body[3], body[5:], inner))
        elif body[0] == "if":
            branches, condition = [], body[1:]
            while True:
                inner, at = _block(parts, at + 1)
                branches.append((condition, inner))
                closing = parts[at][1]
                if closing == ["end"]:
                    break
                condition = closing[2:] if closing[1:2] == ["if"] else ["true"]
            nodes.append(("if", branches))
        elif len(body) > 1 and body[1] in (":=", "="):
            nodes.append(("set", *body[:2], body[2:]))
        else:
            nodes.append(("value", body))
        at += 1
    return nodes, at


def _run(nodes: list[Any], dot: Any, scopes: list[dict[str, Any]]) -> list[str]:
    out: list[str] = []
    for node in nodes:
        if node[0] == "text":
            out.append(node[1])
        elif node[0] == "value":
            value = _value(node[1], dot, scopes)
            assert isinstance(value, str)
            out.append(value)
        elif node[0] == "set":
            value = _value(node[3], dot, scopes)
            scope = scopes[-1] if node[2] == ":=" else next(s for s in reversed(scopes) if node[1] in s)
            scope[node[1]] = value
        elif node[0] == "range":
            for number, item in enumerate(_value(node[3], dot, scopes)):
                out += _run(node[4], item, [*scopes, {node[1]: number, node[2]: item}])
        else:
            for condition, inner in node[1]:
                if _value(condition, dot, scopes):
                    out += _run(inner, dot, [*scopes, {}])
                    break
    return out


def _value(words: list[str], dot: Any, scopes: list[dict[str, Any]]) -> Any:
    terms: list[Any] = []
    rest = list(words)

    def term() -> Any:
        word = rest.pop(0)
        if word == "(":
            depth, inner = 1, []
            while depth:
                depth += {"(": 1, ")": -1}.get(rest[0], 0)
                inner.append(rest.pop(0))
            return _value(inner[:-1], dot, scopes)
        if word[0] == '"':
            return word[1:-1]
        if word.isdigit():
            return int(word)
        if word in ("true", "false"):
            return word == "true"
        name, _, field = word.partition(".")
        found = dot if name == "" else next(s for s in reversed(scopes) if name in s)[name]
        return found[field] if field else found

    functions: dict[str, Any] = {
        "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "and": lambda a, b: a and b, "not": lambda a: not a,
        "len": len, "slice": lambda items, start: items[start:],
    }  # fmt: skip
    function = functions[rest.pop(0)] if rest[0] in functions else None
    while rest:
        terms.append(term())
    if function is not None:
        return function(*terms)
    (only,) = terms
    return only
