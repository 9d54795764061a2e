"""Read a recipe from a YAML file, and apply ``--set`` overrides.

YAML is read as by PyYAML's safe loader, with fewer surprises: ``010`` is no number (YAML 1.1 reads 8). Repeated keys,
and aliases that expand to more than a recipe can hold, are errors.
"""

import re
from pathlib import Path

import yaml

from qvera.config.schema import Recipe, parse_recipe
from qvera.utils.errors import InputError, did_you_mean

_MOST_NODES = 100_000
"""Values in a recipe after its aliases are expanded; a usual recipe has a hundred."""

_OTHERS_HELD_OUT = {
    "data.eval_path": ("eval_fraction",),
    "data.eval_split": ("eval_fraction",),
    "data.eval_fraction": ("eval_path", "eval_split"),
}
"""Override → keys of ``data`` that it replaces: other ways to hold out rows."""


class _Loader(yaml.SafeLoader):
    """Octal and base-60 numbers become texts, which no key that takes a number accepts."""

    def resolve(self, kind: type[yaml.Node], value: str, implicit: tuple[bool, bool]) -> str:
        tag = super().resolve(kind, value, implicit)
        number = tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        return "tag:yaml.org,2002:str" if number and re.fullmatch(r"[-+]?(0[0-9_]+|[0-9_]+:.*)", value) else tag


def read_yaml(text: str, source: str) -> tuple[object, dict[tuple[str, ...], int]]:
    """The values, and the line of each key by its path; InputError if the text is not valid YAML or too large."""
    loader = _Loader(text)
    loader.name = source
    lines: dict[tuple[str, ...], int] = {}
    try:
        node = loader.get_single_node()
        if node is None:
            return None, lines
        _note_lines(node, (), {}, as_written=True)
        tree = loader.construct_document(node)
        _note_lines(node, (), lines)  # again: merge keys have been replaced by what they stand for
        return tree, lines
    except yaml.YAMLError as error:
        raise InputError(f"{source}: not valid YAML: {error}") from None
    except RecursionError:
        raise InputError(
            f"{source}: not a recipe: its values are nested too deeply, or one contains itself by an alias."
        ) from None
    finally:
        loader.dispose()


def yaml_text(value: object) -> str:
    """A value on one line of YAML, with texts in quotes."""
    return yaml.safe_dump(value, default_flow_style=True, default_style='"', allow_unicode=True, width=2**31).strip()


def _note_lines(
    node: yaml.Node, path: tuple[str, ...], lines: dict[tuple[str, ...], int], as_written: bool = False
) -> None:
    """Add the line of each key below ``node``. ``as_written``, before merge keys are replaced: refuse repeated keys."""
    pairs: list[tuple[str, yaml.Node, yaml.Mark]] = []
    if isinstance(node, yaml.MappingNode):
        pairs = [(key.value, value, key.start_mark) for key, value in node.value if isinstance(key, yaml.ScalarNode)]
    elif isinstance(node, yaml.SequenceNode):
        pairs = [(str(number), value, value.start_mark) for number, value in enumerate(node.value)]
    for key, value, mark in pairs:
        place = (*path, key)
        if as_written and place in lines:
            problem = f"the key '{key}' is written twice, first in line {lines[place]}"
            raise yaml.constructor.ConstructorError(None, None, problem, mark)
        lines[place] = mark.line + 1
        if len(lines) > _MOST_NODES:
            raise InputError(
                f"{mark.name}: its aliases expand to more than {_MOST_NODES:,} values; a recipe has a hundred."
            )
        _note_lines(value, place, lines, as_written)


def load_recipe(path: str | Path, overrides: list[str] | None = None, of_a_run: bool = False) -> Recipe:
    """Read a recipe file and apply ``section.key=value`` overrides, whose values are YAML.

    An override that holds out rows replaces the recipe's own way to do so.
    With ``of_a_run`` the run has begun, maybe with an older qvera that accepted keys without effect. These are ignored.
    Raises InputError: the file can't be read, is not YAML, or is not a valid recipe.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = did_you_mean(path.name, [other.name for other in path.parent.glob("*.yaml")])
        raise InputError(f"{path}: no such recipe file{near}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: can't be read as a recipe (UTF-8 YAML): {error}") from None
    tree, lines = read_yaml(text, str(path))
    given = {override.partition("=")[0] for override in overrides or []}
    for override in overrides or []:
        tree = _override(tree, override)
        section = tree.get("data")
        for key in _OTHERS_HELD_OUT.get(override.partition("=")[0], ()):
            if isinstance(section, dict) and f"data.{key}" not in given:
                section.pop(key, None)
        lines.pop(tuple(override.partition("=")[0].split(".")), None)
    return parse_recipe(tree, str(path), lines, drop_idle_keys=of_a_run)


def _override(tree: object, override: str) -> dict[object, object]:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise InputError(f"--set {override}: expected section.key=value, for example --set training.max_steps=100.")
    value, _ = read_yaml(text, f"--set {override}")
    whole = dict(tree) if isinstance(tree, dict) else {}
    node = whole
    for part in parts[:-1]:
        child = node.get(part)
        if part in ("model", "data") and node is whole and isinstance(child, str):
            child = {"path": child}
        node[part] = dict(child) if isinstance(child, dict) else {}
        node = node[part]
    node[parts[-1]] = value
    return whole
