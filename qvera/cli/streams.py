"""Standard streams that always exist, and that do not end a run when nobody reads them any more."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO


class LossyStream:
    """A stream that drops failed writes: its reader is gone (`2>&1 | head`), or its disk is full.

    After the first failure all later writes go to the null device, also those of processes that are started then.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Return the length of ``text``, written or not."""
        self._try(self._stream.write, text)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write or drop each line."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Flush, where somebody still reads."""
        self._try(self._stream.flush)

    def close(self) -> None:
        """Do nothing: the stream is the process's, and a log handler that outlives the command may close it."""

    def _try(self, call: Callable[..., object], *values: str) -> None:
        try:
            call(*values)
        except BlockingIOError:  # a reader that is slow for a moment, on a pipe that does not wait
            pass
        except OSError:
            drop(self._stream)

    def __getattr__(self, name: str) -> Any:
        if name == "_stream":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self._stream, name)


def drop(stream: TextIO) -> None:
    """Send a stream's buffer and all later writes to the null device."""
    with contextlib.suppress(OSError, ValueError):
        number = stream.fileno()
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), number)


@contextlib.contextmanager
def for_who_still_reads() -> Iterator[None]:
    """Drop the output of the block where nobody reads standard output any more: the work it tells of is done."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        drop(sys.stdout)


@contextlib.contextmanager
def command_streams() -> Iterator[None]:
    """Give a command streams that it can write to.

    A closed one (`>&-`) becomes the null device. A terminal without UTF-8 shows ? for an arrow. Standard error, where
    progress goes, is a `LossyStream`, so that hours of training don't end with their `tee`.
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
