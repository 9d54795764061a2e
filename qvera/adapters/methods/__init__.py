"""The methods of adaptation, by their names in a recipe, and rates at which they learn."""

from __future__ import annotations

import difflib
import math
from itertools import pairwise
from typing import TYPE_CHECKING

from qvera.adapters.methods.base import LinearSpec, Method, Source
from qvera.adapters.methods.lora import Lora
from qvera.adapters.methods.vera import Vera
from qvera.config import plugins
from qvera.config.schema import Recipe
from qvera.config.sections import AdapterSection
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from qvera.adapters.methods.base import AdapterSettings


__all__ = ["LinearSpec", "Method", "Source", "check_recipe", "method_of", "names", "register"]

_CORE: dict[str, Method] = {method.name: method for method in (Vera(), Lora())}
_GROUP = "qvera.methods"


def register(method: Method) -> None:
    """Add a method in this process only. Packages declare theirs as entry points."""
    plugins.registered[_GROUP][method.name] = method


def names() -> list[str]:
    """All methods' names."""
    return sorted({*_CORE, *plugins.names(_GROUP)})


def method_of(adapter: AdapterSettings) -> Method:
    """The method of an adapter's config or of a recipe's adapter section; InputError if it can't be had."""
    name = adapter.method
    method = _CORE.get(name)
    if name in plugins.names(_GROUP):  # a plug-in's method may take the place of the core's
        try:
            found = plugins.load(_GROUP, name)
            method = found() if isinstance(found, type) else found
        except InputError as error:
            if method is None:
                raise InputError(f"adapter.method: {error}") from None
    if method is None:
        close = difflib.get_close_matches(name, names(), n=1)
        meant = f" Did you mean {close[0]!r}?" if close else ""
        raise InputError(f"adapter.method: takes one of {', '.join(names())}, got {name!r}.{meant}")
    return method.variant(adapter)


def check_recipe(recipe: Recipe) -> None:
    """Check that a recipe's adapter section suits its method.

    InputError: the method is unknown or does not read a key that is set, or a key without default is missing.
    """
    section, method = recipe.adapter, method_of(recipe.adapter)
    of_all = {"method", "rank", "targets", "dropout", "seed", "init_from"}
    # keys that the method does not read; one that is set to its default changes nothing, and is let through
    for key in sorted(section.model_fields_set - of_all - method.keys.keys()):
        if getattr(section, key) != AdapterSection.model_fields[key].get_default(call_default_factory=True):
            known = (*_CORE.values(), *plugins.load_all(_GROUP))
            readers = dict.fromkeys(other.name for other in known if key in other.keys)
            raise InputError(
                f"adapter.{key}: is read by {', '.join(readers)} only, and adapter.method is {section.method}. Remove "
                "one of the two."
            )
    # the recipe's defaults are VeRA's; another method's rank and rate have to be written down
    given = {"adapter": section.model_fields_set, "training": recipe.training.model_fields_set}
    missing = []
    needed = ("adapter.rank", "training.learning_rate", *method.usual) if section.method != Vera.name else ()
    for key in dict.fromkeys(needed):
        part, _, name = key.partition(".")
        if name not in given[part]:
            usual = f" {method.usual[key]:g} is a usual value." if key in method.usual else ""
            missing.append(
                f"{key}: has no default for adapter.method {section.method}, since it depends on the model, and what "
                f"suits another method does not suit this one. Set it too.{usual}"
            )
    if missing:
        raise InputError("\n".join(missing))
    if recipe.data.has_adapters and method.peft_type is None:
        raise InputError(
            "adapter.method: only vera without magnitude and lora train many adapters in one run, and this is "
            f"{section.method}. Train one (remove data.adapter_column or data.adapter_files), or choose one of these."
        )
    for schedule in plugins.schedules_of(data=recipe.data, adapter=section, training=recipe.training):
        schedule.check(recipe, method)


MEASURED: dict[str, dict[int, float]] = {
    Vera.name: {384: 0.03, 576: 0.05, 1280: 0.02, 4096: 4e-3},
    Lora.name: {384: 2e-3, 576: 3e-3, 4096: 2e-4},
}
"""Method → hidden size of a base → the best learning rate known there, for texts and for classes.

At 384 (MiniLM, heads) and 576 (SmolLM2-135M: E2E, Alpaca, heads): bench/results/quality.jsonl, where the best rates of
a method lie within a factor of 2 of this one; LoRA's is for r=4 to r=16, and after 150 steps of Alpaca a third of it is
best. VeRA at 1,280 (GPT-2 large) and 4,096 (Llama 7B): of its paper, arXiv 2310.11454. LoRA at 4,096: what is usual for
a 7B.
"""
HEAD_RATE = 4e-3
"""The learning rate of a classifier's head beside VeRA, measured at hidden sizes of 384 and 576
(docs/classification.md)."""


def measured_rate(method: str, hidden_size: int) -> float | None:
    """The learning rate for a base of that hidden size; None: none is known for the method.

    Between two measured sizes the rate is interpolated, both axes logarithmic. Beyond them it is the nearest size's.
    """
    points = sorted(MEASURED.get(method, {}).items())
    if not points:
        return None
    hidden_size = min(max(hidden_size, points[0][0]), points[-1][0])
    for (size, rate), (next_size, next_rate) in pairwise(points):
        if hidden_size <= next_size:
            part = math.log(hidden_size / size) / math.log(next_size / size)
            return float(f"{rate * (next_rate / rate) ** part:.2g}")
    return points[0][1]
