"""Measure on the fake accelerator in a process of its own, which the tests and their backend need."""

from __future__ import annotations

import json
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers import start_process


def measured(measure: Callable[..., Any], *arguments: object) -> Any:
    """What ``measure(fake, *arguments)`` returns in a new process, by way of JSON; ``fake`` is a `FakeAccelerator`.

    ``measure`` is a function of a module, so that the process finds it by its name.

    Raises:
        AssertionError: it raised; with its traceback.
    """
    with tempfile.TemporaryDirectory() as directory:
        answer = Path(directory) / "answer.json"
        process = start_process(_measure, answer, measure, arguments)
        process.join()
        found = json.loads(answer.read_text()) if answer.is_file() else {"error": f"exit code {process.exitcode}"}
    assert "error" not in found, found["error"]
    return found["value"]


def _measure(answer: Path, measure: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    from tests.gpu.fake_accelerator import FakeAccelerator

    try:
        with FakeAccelerator() as fake:
            found = {"value": measure(fake, *arguments)}
    except BaseException:
        found = {"error": traceback.format_exc()}
    answer.write_text(json.dumps(found))
