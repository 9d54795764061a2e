"""Change what one module object computes by its class, where its class computes what transformers' Llama does.

A ``forward`` set on an object, as accelerate's hooks do, would keep the module alive in a cycle, and displace the hook.
Nothing changes for other objects of the class.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


class Mixin(nn.Module):
    """Mixed before a transformers module, in a class made for the pair; unpickling makes that class again."""

    @classmethod
    def members(cls, theirs: type) -> dict[str, Any]:
        """What the class made with ``theirs`` has besides what it inherits."""
        return {}

    def __reduce__(self) -> tuple[object, ...]:
        ours, theirs = type(self).__bases__
        return _new_instance, (ours, theirs), self.__dict__


@functools.cache
def mixed(ours: type[Mixin], theirs: type) -> type:
    """The class of a ``theirs`` that does as ``ours`` says."""
    return type(f"LowMemory{theirs.__name__}", (ours, theirs), {"__module__": __name__, **ours.members(theirs)})


def _new_instance(ours: type[Mixin], theirs: type) -> nn.Module:
    return object.__new__(mixed(ours, theirs))  # type: ignore[arg-type]  # a module class has its own idea of a hash


@functools.cache
def same_text(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Whether two functions compute the same, by their text: most Llama-like models copy Llama's parts."""
    try:
        return inspect.getsource(one) == inspect.getsource(other)
    except (OSError, TypeError):  # written in a notebook, say
        return False
