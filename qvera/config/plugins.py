"""What packages beside the core bring, found by the entry points of their pyproject.toml.

- ``qvera.methods``: the name of a method → its class or instance (`qvera.adapters.methods.Method`)
- ``qvera.recipe``: any name → a module with keys for the sections of a recipe, which must import fast: `extensible`
- ``qvera.schedules``: any name → a `Schedule`
- ``qvera.commands``: any name → the function of a command of ``qvera``, which must import fast
- ``qvera.caches``: any name → a `qvera.utils.cache_dir.DiskCache` for ``qvera cache``

A part that can't be imported is left out with a warning, and an error says why where a recipe asks for it by name.
qvera's own research methods come this way too, from the package that stands beside the core.
"""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable
from importlib.metadata import EntryPoint, distributions
from typing import Any, TypeVar

from qvera.utils.errors import InputError, first_line

_logger = logging.getLogger(__name__)
Class = TypeVar("Class", bound=type)


@functools.cache
def entry_points() -> dict[str, dict[str, EntryPoint]]:
    """Group → name → entry point."""
    groups: dict[str, dict[str, EntryPoint]] = {}
    for distribution in distributions():
        for point in distribution.entry_points:
            if point.group.startswith("qvera."):
                groups.setdefault(point.group, {}).setdefault(point.name, point)
    return groups


def names(group: str) -> list[str]:
    """The names in a group; nothing is imported."""
    return list(entry_points().get(group, {}))


@functools.cache
def load(group: str, name: str) -> Any:
    """What stands under a name of a group.

    Raises:
        InputError: it can't be imported.
    """
    point = entry_points()[group][name]
    try:
        return point.load()
    except Exception as error:
        package = f" of the package {point.dist.name}" if point.dist is not None else ""
        raise InputError(f"{name}: {point.value}{package} can't be loaded: {first_line(error)}") from error


@functools.cache
def load_all(group: str) -> tuple[Any, ...]:
    """Everything in a group that can be imported, in the order of its names."""
    loaded = []
    for name in sorted(names(group)):
        try:
            loaded.append(load(group, name))
        except InputError as error:
            _logger.warning("%s. It is left out (%s).", error, group)
    return tuple(loaded)


def extensible(name: str) -> Callable[[Class], Class]:
    """Adds what plug-ins have under this name in their ``qvera.recipe`` to a class: fields, and checks that call super.

    ``AdapterKeys``, ``DataKeys``, ``TrainingKeys`` and ``RecipeKeys`` are `qvera.config.fields.Section`; the dataclass
    ``ConfigFields`` has what adapter_config.json holds beside them. A key with the name of a core's key replaces it.
    """

    def extend(core: Class) -> Class:
        more = [keys for module in load_all("qvera.recipe") if (keys := getattr(module, name, None)) is not None]
        if not more:
            return core
        about = {key: getattr(core, key) for key in ("__module__", "__qualname__", "__doc__")}
        return types.new_class(core.__name__, (*more, core), exec_body=lambda namespace: namespace.update(about))  # type: ignore[return-value]

    return extend
