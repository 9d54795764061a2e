"""Run something when another package is imported, without importing that package now.

Python finds a module through the finders of `sys.meta_path`. The finder here stands first among them. For one name it
asks the others, and wraps what they found so that an action runs right after the module's own code. All other names
pass through.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.machinery import ModuleSpec
from types import ModuleType


def after_import(
    name: str,
    action: Callable[[], object],
    around: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Call ``action()`` once the package ``name`` has been imported: now, if it has been already.

    Args:
        name: a top-level package. It need not be installed.
        action: runs in the importing thread, after the package's own code. What it raises, the import raises.
        around: a context manager for the time in which the package's own code runs.
    """
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Finder(name, action, around))


class _Finder:
    """Finds one package as the other finders do, and adds the action to its loader."""

    def __init__(
        self, name: str, action: Callable[[], object], around: Callable[[], AbstractContextManager[object]]
    ) -> None:
        self.name, self.action, self.around = name, action, around
        self.searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name or self.searching:
            return None
        self.searching = True  # the search below comes back here first
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                with self.around():
                    execute(module)
                if module.__name__ == self.name:  # a zip file has one loader for all of its modules
                    self.action()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
