"""Run something when another package is imported, without importing it now.

A finder at the head of `sys.meta_path` waits for one name, asks the other finders, and wraps what they found.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib.machinery import ModuleSpec
from types import ModuleType


def around_import(name: str, around: Callable[[], AbstractContextManager[object]]) -> None:
    """Run the code of the top-level package ``name`` inside ``around()``, when it is imported.

    If that has happened already, ``around()`` is entered and left now. The package need not be installed.
    """
    if name not in sys.modules:
        sys.meta_path.insert(0, _Finder(name, around))
        return
    with around():
        pass


class _Finder:
    def __init__(self, name: str, around: Callable[[], AbstractContextManager[object]]) -> None:
        self.name, self.around = name, around
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
                if module.__name__ != self.name:  # a zip file has one loader for all of its modules
                    return execute(module)
                with self.around():
                    execute(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
