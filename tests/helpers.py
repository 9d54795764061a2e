"""Helpers of many tests: processes that a test may kill, grids of which the fast suite runs a sample, the pages' commands."""

from __future__ import annotations

import io
import itertools
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["qvera.models.loader", "tests.conftest"])


def _run(environment: dict[str, str], target: Callable[..., object], arguments: tuple[object, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    target(*arguments)


class Terminal(io.StringIO):
    """Standard input of a person who has typed this."""

    def isatty(self) -> bool:
        return True


def start_process(target: Callable[..., object], *arguments: object) -> BaseProcess:
    """Call a function of a test module in a process of its own.

    It is forked from a server that has imported torch and transformers once, so it starts in a moment.
    """
    process = _context.Process(target=_run, args=(dict(os.environ), target, arguments))
    process.start()
    return process


def wait_until(holds: Callable[[], object], seconds: float = 120) -> None:
    """Wait until ``holds()`` is true, for as long as a slow machine may need."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"did not happen within {seconds} s"
        time.sleep(0.02)


def sampled(*axes: Sequence[object]) -> list[Any]:
    """The full product of the axes as test parameters: those that cover all pairs of values run always, the rest are slow."""
    open_pairs = {
        ((i, a), (j, b))
        for i, j in itertools.combinations(range(len(axes)), 2)
        for a, b in itertools.product(range(len(axes[i])), range(len(axes[j])))
    }
    cases = list(itertools.product(*(range(len(axis)) for axis in axes)))
    fast = set()
    while open_pairs:
        best = max(cases, key=lambda case: len(open_pairs & set(itertools.combinations(enumerate(case), 2))))
        fast.add(best)
        open_pairs -= set(itertools.combinations(enumerate(best), 2))
    return [
        pytest.param(
            *(axis[i] for axis, i in zip(axes, case, strict=True)), marks=() if case in fast else pytest.mark.slow
        )
        for case in cases
    ]


def commands(page: str) -> list[str]:
    """The command lines of the ``bash`` blocks of a page, and those between backquotes in a line."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return commands_of("\n".join(blocks + re.findall(r"`(qvera [a-z-]+ (?:my\.yaml|runs/my|MODEL)[^`]*)`", text)))


def commands_of(block: str) -> list[str]:
    """The commands of a block, without comments. A line that ends with a backslash goes on; ``a && b`` are two."""
    lines = [re.split(r"\s+#", line)[0].strip() for line in block.replace("\\\n", " ").splitlines()]
    return [part for line in lines if line and not line.startswith("#") for part in line.split(" && ") if part]
