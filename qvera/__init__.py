"""qvera: fine-tune a Llama in 4-bit with VeRA.

    result = qvera.train(qvera.Recipe(model="MODEL", data="rows.jsonl"), "runs/my")
    answers = qvera.load("runs/my").generate(["Three red mugs for Friday, please."])

Importing it is light: torch, transformers and PEFT are imported when they are needed. It teaches PEFT the adapter type
``QVERA`` at once where PEFT has been imported, else as soon as it is.
"""

import functools
import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qvera.utils.post_import import around_import

if TYPE_CHECKING:
    from qvera.adapters import QveraConfig, QveraModel, accelerate_peft, restore_peft
    from qvera.api import Model, evaluate, export, find_lr, generate, load, train
    from qvera.config.schema import Recipe
    from qvera.utils.errors import InputError, Interrupted, QveraError, RunFailed

_MODULES = {
    "qvera.api": ("Model", "evaluate", "export", "find_lr", "generate", "load", "train"),
    "qvera.config.schema": ("Recipe",),
    "qvera.adapters": ("QveraConfig", "QveraModel", "accelerate_peft", "restore_peft"),
    "qvera.utils.errors": ("InputError", "Interrupted", "QveraError", "RunFailed"),
}

__version__ = "0.1.0"
__all__ = [
    "InputError",
    "Interrupted",
    "Model",
    "QveraConfig",
    "QveraError",
    "QveraModel",
    "Recipe",
    "RunFailed",
    "__version__",
    "accelerate_peft",
    "evaluate",
    "export",
    "find_lr",
    "generate",
    "load",
    "restore_peft",
    "train",
]


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'qvera' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


@contextmanager
def _quiet_and_lazy_bitsandbytes() -> Iterator[None]:
    """While bitsandbytes is imported, it logs no advice about an optional kernel package, and what it compiles waits.

    It asks for four functions to be compiled at once, which imports torch's compiler: two seconds that most commands
    never need. They are compiled when they are first called.
    """
    import torch

    logger = logging.getLogger("bitsandbytes")
    level, compile = logger.level, torch.compile

    def compile_later(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        if function is None:
            return functools.partial(compile_later, **options)
        compiled = functools.cache(lambda: compile(function, **options))
        return functools.wraps(function)(lambda *arguments, **named: compiled()(*arguments, **named))

    logger.setLevel(logging.ERROR)
    torch.compile = compile_later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile
        logger.setLevel(level)


@contextmanager
def _teach_peft() -> Iterator[None]:
    """Once PEFT is imported, it learns QVERA."""
    try:
        yield
    finally:
        importlib.import_module("qvera.adapters")


around_import("bitsandbytes", _quiet_and_lazy_bitsandbytes)
around_import("peft", _teach_peft)
