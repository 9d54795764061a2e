"""A disk that can be filled, for the tests."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.small_disk import fill as fill
from bench.small_disk import small_disk as mounted


@contextlib.contextmanager
def small_disk(where: Path, size_bytes: int) -> Iterator[Path]:
    """A tmpfs of that size; the test is skipped, with the reason, where none can be mounted."""
    with contextlib.ExitStack() as stack:
        try:
            disk = stack.enter_context(mounted(where, size_bytes))
        except OSError as error:
            pytest.skip(str(error))
        yield disk


@contextlib.contextmanager
def read_only(disk: Path) -> Iterator[None]:
    """For the block that disk can't be written, as one with errors that the system has mounted again."""
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
