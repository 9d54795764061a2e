"""The methods of adaptation, by their names in a recipe."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from qvera.adapters.methods.base import LinearSpec, Method, Source
from qvera.adapters.methods.lora import Lora
from qvera.adapters.methods.vera import Vera
from qvera.config import plugins
from qvera.config.schema import AdapterSection, Recipe
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from qvera.adapters.methods.base import AdapterSettings

__all__ = ["LinearSpec", "Method", "Source", "check_recipe", "method_of", "names", "register"]

_METHODS: dict[str, Method] = {method.name: method for method in (Vera(), Lora())}
_GROUP = "qvera.methods"


def register(method: Method) -> None:
    """Make a method known under its name, for this process; a package's methods are known by their entry points."""
    _METHODS[method.name] = method


def names() -> list[str]:
    """The names of all methods."""
    return sorted({*_METHODS, *plugins.names(_GROUP)})


def method_of(adapter: AdapterSettings) -> Method:
    """The method of an adapter's config or of a recipe's adapter section.

    Raises:
        InputError: there is none of that name, or the package that brings it can't be imported.
    """
    name = adapter.method
    method = _METHODS.get(name)
    if method is None:
        if name not in plugins.names(_GROUP):
            close = difflib.get_close_matches(name, names(), n=1)
            meant = f" Did you mean {close[0]!r}?" if close else ""
            raise InputError(f"adapter.method: takes one of {', '.join(names())}, got {name!r}.{meant}")
        try:
            method = plugins.load(_GROUP, name)()
        except InputError as error:
            raise InputError(f"adapter.method: {error}") from None
    return method.variant(adapter)


_EVERY_METHOD = frozenset({"method", "rank", "targets", "dropout", "seed", "init_from"})


def check_recipe(recipe: Recipe) -> None:
    """Check that a recipe's adapter section suits its method.

    Raises:
        InputError: there is no such method, a key is set that it does not read, or one is missing whose default is
            VeRA's.
    """
    section = recipe.adapter
    method = method_of(section)
    for key in sorted(section.model_fields_set - _EVERY_METHOD - method.keys):
        if getattr(section, key) != AdapterSection.model_fields[key].get_default(call_default_factory=True):
            known = {**{each.name: each for each in plugins.load_all(_GROUP)}, **_METHODS}
            readers = [name for name, other in known.items() if key in other.keys]
            raise InputError(
                f"adapter.{key}: is read by {', '.join(readers)} only, and adapter.method is {section.method}. Remove "
                "one of the two."
            )
    if section.method != Vera.name:
        given = {"adapter": section.model_fields_set, "training": recipe.training.model_fields_set}
        for key, value in method.usual.items():
            part, _, name = key.partition(".")
            if name not in given[part]:
                raise InputError(
                    f"{key}: has no default for adapter.method {section.method}, since it depends on the model. "
                    f"{value:g} is a usual value."
                )
    if recipe.data.has_adapters and not method.is_banked:
        raise InputError(
            "adapter.method: only vera without magnitude trains many adapters in one run, and this is "
            f"{section.method}. Train one (remove data.adapter_column or data.adapter_files), or choose vera."
        )
    _check_schedules(recipe, method)
    method.check(recipe)


def _check_schedules(recipe: Recipe, method: Method) -> None:
    """Check that the schedules of the training section suit the method."""
    section, training = recipe.adapter, recipe.training
    if training.sample_tokens and not method.keeps_input:
        raise InputError(
            f"training.sample_tokens: there is nothing to save with adapter.method {method.name}. A is frozen, so "
            f"backward keeps no input x for its gradient, only z = A x, {section.rank} numbers a token. Remove it."
        )
    if training.sample_tokens and not method.samples_tokens:
        raise InputError(
            f"training.sample_tokens: adapter.method {method.name}, as it is set here, keeps its inputs for more than "
            "the gradient of a trained A. Remove it."
        )
    if training.resample_every and not method.can_resample:
        raise InputError(
            "training.resample_every: phases are those of VeRA's b and d without adapter.magnitude, and adapter.method "
            f"is {section.method}. Remove one of the two."
        )
    if training.bilevel and not any(method.is_trained(kind, section) for kind in method.upper_kinds):
        more = "train d as well (adapter.train_d)" if method.upper_kinds else "choose adapter.method bilora"
        raise InputError(
            f"training.bilevel: needs two groups of trained parameters, and adapter.method {method.name} has one here. "
            f"Remove it, or {more}."
        )
