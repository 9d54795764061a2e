"""Standard streams of a command: there from its first line, and no reason to end a run once nobody reads them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class LossyStream:
    """A text stream whose failed writes are dropped: its reader is gone (`2>&1 | head`), or its disk is full.

    After the first failed write all later ones go to the null device, and those of processes started from then on too.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write or drop ``text``; returns its length."""
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write or drop each of ``lines``."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Flush, where somebody still reads."""
        with self._dropping():
            self._stream.flush()

    def close(self) -> None:
        """Leave it open: it is the process's, and a log handler that outlives the command may close what it has."""

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:  # a reader that is slow for a moment, on a pipe that does not wait
            pass
        except OSError:
            drop(self._stream)

    def __getattr__(self, name: str) -> Any:
        if name == "_stream":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self._stream, name)


def drop(stream: TextIO) -> None:
    """Send what a stream still holds, and all that is written to it from now on, to the null device."""
    with contextlib.suppress(OSError, ValueError):
        number = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, number)
        finally:
            os.close(null)


@contextlib.contextmanager
def for_who_still_reads() -> Iterator[None]:
    """A context whose output is dropped where nobody reads standard output any more: what it tells of is done."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        drop(sys.stdout)


@contextlib.contextmanager
def command_streams() -> Iterator[None]:
    """Give a command streams that it can write to.

    One that is closed (`>&-`) is replaced by the null device. A terminal without UTF-8 gets a ? in place of an arrow.
    Standard error, where progress goes, is a `LossyStream`: hours of training don't end with their `tee`.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # for as long as the process lives
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    stderr = sys.stderr
    sys.stderr = LossyStream(stderr)  # type: ignore[assignment]  # a TextIO by what it does, not by its class
    try:
        yield
    finally:
        sys.stderr = stderr
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # else Python says so once more when it ends, with an exit code of its own
                drop(stream)
