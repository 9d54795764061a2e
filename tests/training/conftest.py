"""What several modules of this room train on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qvera.training import session
from qvera.training.loop import AloneLoop
from qvera.training.plan import Machine, make_plan
from tests.conftest import small_llama, small_tokenizer
from tests.training.runs import MESSAGE


@pytest.fixture(scope="module")
def five_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with more layers than there are buffers."""
    directory = tmp_path_factory.mktemp("models") / "five-layers"
    small_llama(num_hidden_layers=5).to(torch.bfloat16).save_pretrained(directory)
    small_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def plan_on(monkeypatch: pytest.MonkeyPatch) -> Callable[[Machine], None]:
    """Let runs be planned as on a machine."""

    def arrange(machine: Machine) -> None:
        def planned(recipe: Any, _: Any, *rest: Any, **more: Any) -> Any:
            return make_plan(recipe, machine, *rest, **more)

        monkeypatch.setattr(session, "make_plan", planned)

    return arrange


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let passes of step ``step`` and later with more than ``rows`` rows run out of memory, in forward or in backward.

    The trial of the longest batch does so where ``step`` is 0.
    """
    real = AloneLoop.nll

    def arrange(step: int, rows: int, where: str = "forward", first_pass: int = 1) -> None:
        passes: dict[int, int] = {}
        hooks: list[Any] = []

        def out_of_memory(_: torch.Tensor) -> None:
            hooks.pop().remove()
            raise torch.OutOfMemoryError(MESSAGE)

        def nll(loop: AloneLoop, examples: Any, *rest: Any) -> Any:
            if loop.state.step + 1 < step or (step and not rest):
                return real(loop, examples, *rest)
            number = passes[loop.state.step] = passes.get(loop.state.step, 0) + 1
            fails = len(examples) > rows and number >= first_pass
            if fails and where == "forward":
                raise torch.OutOfMemoryError(MESSAGE)
            found, count = real(loop, examples, *rest)
            if fails:
                hooks.append(next(iter(loop.engine.vectors.values())).register_hook(out_of_memory))
            return found, count

        monkeypatch.setattr(AloneLoop, "nll", nll)

    return arrange
