"""Run something when another package is imported, without importing that package now.

Python finds a module through the finders of `sys.meta_path`. The finder here stands first among them. For one name it
asks the others, and wraps what they found. All other names pass through.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib.machinery import ModuleSpec
from types import ModuleType


def around_import(name: str, around: Callable[[], AbstractContextManager[object]]) -> None:
    """Run the code of the package ``name`` inside ``around()`` once it is imported.

    If it has been imported already, ``around()`` is entered and left now. ``name`` is a top-level package that need not
    be installed. What ``around()`` raises, the import raises.
    """
    if name not in sys.modules:
        sys.meta_path.insert(0, _Finder(name, around))
        return
    with around():
        pass


class _Finder:
    """Finds one package as the other finders do, and wraps its loader."""

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
