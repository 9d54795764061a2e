"""qvera: fine-tune a Llama in 4-bit with VeRA.

    result = qvera.train(qvera.Recipe(model="MODEL", data="rows.jsonl"), "runs/my")
    answers = qvera.load("runs/my").generate(["Three red mugs for Friday, please."])

Importing it is light: torch, transformers and PEFT are imported when they are needed. It teaches PEFT the adapter type
``QVERA`` at once where PEFT has been imported, else as soon as it is.
"""

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

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
    from qvera.utils.errors import did_you_mean

    raise AttributeError(f"module 'qvera' has no attribute {name!r}{did_you_mean(name, __all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


@contextmanager
def _teach_peft() -> Iterator[None]:
    """While PEFT is imported, bitsandbytes logs no advice about an optional kernel package; then PEFT learns QVERA."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
    importlib.import_module("qvera.adapters")


around_import("peft", _teach_peft)
