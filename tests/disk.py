"""A disk that can be filled, for the tests."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def mounted(where: Path, size_bytes: int) -> Iterator[Path]:
    """A tmpfs of that size.

    Raises:
        OSError: none can be mounted; says why.
    """
    where.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(where)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"no small disk can be mounted ({done.stderr.strip()}); run as root")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


def fill(disk: Path, leave_bytes: int = 0) -> Path:
    """Take all but ``leave_bytes`` of a disk with a file, which is returned."""
    filler = disk / "filler"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    filler.write_bytes(b"x" * max(free - leave_bytes, 0))
    return filler


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
