"""What other packages add, found by the entry points of their pyproject.toml.

- ``qvera.methods``: the name of a method → its class or instance (`qvera.adapters.methods.Method`)
- ``qvera.recipe``: any name → a module with keys for the sections of a recipe, which must import fast: `extensible`
- ``qvera.schedules``: any name → a `Schedule`
- ``qvera.commands``: any name → the function of a command of ``qvera``, which must import fast
- ``qvera.caches``: any name → a `qvera.utils.cache_dir.DiskCache` for ``qvera cache``

A part that can't be imported is left out with a warning. If a recipe asks for it by name, an error says why. qvera's
own research methods come this way too.
"""

import functools
import logging
import types
from collections import defaultdict
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


registered: defaultdict[str, dict[str, Any]] = defaultdict(dict)
"""Group → name → object, added by this process. They go before entry points of the same name."""


def names(group: str) -> list[str]:
    """The names in a group; nothing is imported."""
    return [*{**entry_points().get(group, {}), **registered[group]}]


def load(group: str, name: str) -> Any:
    """The object under a name of a group; InputError if it can't be imported."""
    return registered[group][name] if name in registered[group] else _load(entry_points()[group][name])


@functools.cache
def _load(point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:
        package = f" of the package {point.dist.name}" if point.dist is not None else ""
        raise InputError(f"{point.name}: {point.value}{package} can't be loaded: {first_line(error)}") from error


def load_all(group: str) -> list[Any]:
    """Everything in a group that can be imported, in the order of the names."""
    loaded = []
    for name in sorted(names(group)):
        try:
            loaded.append(load(group, name))
        except InputError as error:
            _warn(f"{error} It is left out ({group}).")
    return loaded


@functools.cache
def _warn(text: str) -> None:
    """Cached, so that each text is logged once."""
    _logger.warning(text)


class Schedule:
    """A way to train that the recipe switches on: subclasses under ``qvera.schedules`` override what they need."""

    name = ""
    """Prefix of its hook's state in a checkpoint."""
    keys: tuple[str, ...] = ()
    """Keys of a recipe, as ``section.key`` or ``section.key=value``. Only recipes that set one of them ask it; all do,
    if it has none."""
    plans_steps = True
    """Whether what a step does may depend on how many there are, so that a run can't be made longer."""

    def check(self, recipe: Any, method: Any) -> None:
        """Raise InputError where the recipe does not suit the adapter's method."""

    def whole(self, recipe: Any, rows: int) -> Any:
        """The recipe of a run over ``rows`` rows that needs as much memory as this one does at its end."""
        return recipe

    def config(self, recipe: Any, rows: int) -> dict[str, Any]:
        """Fields of `QveraConfig` that differ from the recipe in a run over ``rows`` rows."""
        return {}

    def note(self, recipe: Any) -> str | None:
        """What a plan without rows does not know."""
        return None

    def kept_share(self, recipe: Any) -> float | None:
        """The share of an input's tokens that backward keeps for a trained A."""
        return None

    def divide(self, section: Any, sections: Any, sources: Any) -> tuple[list[str], dict[str, Any]] | None:
        """Divide tokenized rows into parts: each training row gets a part's number (`Rows.part_of`).

        Args:
            section: the recipe's ``data``.
            sections: of each source.
            sources: `TokenizedSource`, whose rows may be replaced.

        Returns:
            The names of the parts by number, and rows that are set aside, by name.

        Raises:
            InputError: the rows can't be divided as the recipe asks.
        """
        return None

    def batches(self, recipe: Any, rows: Any, sizes: tuple[Any, ...], common: dict[str, Any]) -> Any:
        """The `qvera.data.Batches` of the run, made of ``sizes`` and ``common``."""
        return None

    def hook(self, training: Any) -> Any:
        """A `qvera.adapters.hooks.TrainingHook`; model, batches and optimizer exist by now."""
        return None


def schedules_of(**sections: Any) -> list[Schedule]:
    """The schedules that sections of a recipe switch on, such as ``training=recipe.training``."""

    def is_set(key: str) -> bool:
        key, _, value = key.partition("=")
        part, _, name = key.partition(".")
        section = sections.get(part)
        if section is None:
            return False
        found = getattr(section, name)
        return bool(found == value if value else found != type(section).model_fields[name].default)

    schedules = [schedule() for schedule in load_all("qvera.schedules")]
    return [schedule for schedule in schedules if not schedule.keys or any(map(is_set, schedule.keys))]


def added_keys(section: Any) -> dict[str, Any]:
    """The keys that plug-ins add to a section, with their defaults."""
    core = next(each for each in reversed(type(section).__mro__) if each.__name__ == type(section).__name__)
    fields = type(section).model_fields
    return {key: fields[key].get_default(call_default_factory=True) for key in fields if key not in core.model_fields}  # type: ignore[attr-defined]


def facts() -> dict[str, Any]:
    """The plug-ins' ``FACTS``: fields of adapter_config.json that reports show → their defaults."""
    return {key: value for module in load_all("qvera.recipe") for key, value in getattr(module, "FACTS", {}).items()}


def extensible(name: str) -> Callable[[Class], Class]:
    """Add to a class what plug-ins have under ``name`` in their ``qvera.recipe`` module: fields, and checks.

    ``AdapterKeys``, ``DataKeys``, ``TrainingKeys`` and ``RecipeKeys`` are `qvera.config.fields.Section`; their checks
    call super. The dataclass ``ConfigFields`` is for adapter_config.json. A plug-in's key replaces a core key of the
    same name.
    """

    def extend(core: Class) -> Class:
        more = [keys for module in load_all("qvera.recipe") if (keys := getattr(module, name, None)) is not None]
        # a class of its own without plug-ins too: a second @dataclass on the same one would miss its factories
        about = {key: getattr(core, key) for key in ("__module__", "__qualname__", "__doc__")}
        return types.new_class(core.__name__, (*more, core), exec_body=lambda namespace: namespace.update(about))  # type: ignore[return-value]

    return extend
