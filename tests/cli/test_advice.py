"""Every key of a recipe and every command that a message names is one, and takes the options beside it."""

from __future__ import annotations

import ast
import functools
import re
from typing import Any

from qvera.cli.main import build_app
from qvera.config.schema import Recipe
from tests.helpers import ROOT

PARTS: dict[str, Any] = {name: field.annotation for name, field in Recipe.model_fields.items()}
KEY = re.compile(r"(?<![\w/.-])(model|data|adapter|training|export)\.([a-z][a-z0-9_]*)\b(?![./(])")
NO_KEYS = {"adapter.sha256"}
"""What is named like one: a key of a certificate."""


@functools.cache
def texts() -> list[tuple[str, str]]:
    """Each text of the package's code that is no docstring, with its place. The parts in braces are left out."""
    found = []
    for file in sorted((ROOT / "qvera").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        told = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
            elif isinstance(node, ast.Constant) and id(node) not in told | parts:
                text = str(node.value)
            else:
                continue
            if " " in text:
                found.append((f"{file.relative_to(ROOT)}:{node.lineno}", text))
    return found


def test_the_keys_that_messages_name_are_keys_of_a_recipe() -> None:
    wrong = [
        f"{place}: {part}.{key}"
        for place, text in texts()
        for part, key in KEY.findall(text)
        if key not in PARTS[part].model_fields and f"{part}.{key}" not in NO_KEYS
    ]
    assert wrong == []


def test_the_commands_that_messages_name_take_their_options() -> None:
    commands = dict(build_app().commands)
    commands |= {f"cache {name}": command for name, command in commands["cache"].commands.items()}
    wrong = []
    for place, text in texts():
        for line in re.findall(r"`qvera ([^`]*)`", text):
            words = line.split()
            name = next((n for n in (" ".join(words[:2]), *words[:1]) if n in commands), None)
            options = [word for word in words if re.fullmatch("--[a-z-]+", word)]
            if name is None:
                wrong += [] if words[0][0] in "{-C" else [f"{place}: {line}"]
            else:
                known = {option for param in commands[name].params for option in param.opts}
                wrong += [f"{place}: {line}" for option in options if option not in known]
    assert wrong == []
