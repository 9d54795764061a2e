"""Kernels on CPU tensors, in Triton's interpreter, by the same way that an accelerator takes; on a card, there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qvera.kernels import choice
from tests import device

pytest.importorskip("triton")


class Calls(TorchDispatchMode):
    """Names of the operators that ran, views and allocations left out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.sizes: list[tuple[str, int]] = []  # name, elements of the largest tensor that it takes or gives

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        if not func.is_view and name not in ("aten::empty", "aten::new_empty", "aten::_unsafe_view", "aten::detach"):
            self.names.append(name)
            out = func(*args, **(kwargs or {}))
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.sizes.append((name, max((t.numel() for t in tensors), default=0)))
            return out
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _plain_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of `as_on_an_accelerator` a card runs the plain code too, which kernels are compared with."""
    if device.NAME != "cpu":
        monkeypatch.setattr(choice, "switch", "off")


@pytest.fixture
def as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """A context in which tensors of the test's device take the kernels."""

    @contextmanager
    def kernels() -> Iterator[None]:
        with monkeypatch.context() as patch:
            if device.NAME == "cpu":
                patch.setattr(choice.accelerator, "is_accelerator", lambda device: True)
            patch.setattr(choice, "switch", "on")
            yield

    return kernels
