"""Progress of a phase of work: a bar on a terminal, a line now and then in a log, and a file that `qvera ui` reads."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Self

from qvera.utils.formatting import duration

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

FIRST_SECONDS = 5.0
"""A phase that takes longer than this writes a line in a log."""
LINE_SECONDS = 60.0
"""The most between two lines of a phase in a log. They come at 5, 10, 20, 40, 80 seconds, and then each minute."""
_LOOK_SECONDS = 0.5


@dataclasses.dataclass
class _Count:
    """The state of a phase. ``first``, ``last``: when a step was first and last done, and how many were by then."""

    name: str
    total: int | None
    done: int = 0
    began: float = dataclasses.field(default_factory=lambda: time.monotonic())
    line_after: float = 0.0  # seconds from its beginning to its next line, but for the first
    facts: str = ""
    first: tuple[float, int] | None = None
    last: tuple[float, int] = (0.0, 0)

    def left_seconds(self, now: float) -> float | None:
        """Estimate the time left by the steps after the first one, which is often slower; None before the second."""
        if self.total is None or self.first is None or self.last[1] <= self.first[1]:
            return None
        (began, start), (then, done) = self.first, self.last
        return max(0.0, (self.total - done) * (then - began) / (done - start) - (now - then))


class Phase:
    """Shows the progress of a phase of work: call it with the number of steps that are done.

    Args:
        name: as ``answering 48 prompts with the base``.
        total: steps of the phase; None: not known.
        done: steps that an earlier process has done.
        text: writes the counts.
        file: gets ``name``, ``done``, ``total``, ``left_seconds`` and ``facts`` as JSON; removed at the end.
    """

    def __init__(
        self,
        console: Console,
        name: str,
        total: int | None = None,
        *,
        done: int = 0,
        text: Callable[[float], str] = "{:,}".format,
        file: Path | None = None,
    ) -> None:
        self.console, self._text, self._file = console, text, file
        self._now = _Count(name, total, done)
        self._lock, self._ended = threading.RLock(), threading.Event()
        self._bars: Progress | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

            columns = SpinnerColumn(), BarColumn(bar_width=24), TextColumn("{task.description}", markup=False)
            self._bars = Progress(*columns, console=self.console, transient=True)
            self._task = self._bars.add_task("")
            self._bars.start()
        self._look()
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __call__(self, done: int, total: int | None = None, name: str | None = None, facts: str = "") -> None:
        """Say that ``done`` steps are done. Another ``name`` begins another phase; ``facts`` stand behind the count."""
        with self._lock:
            if name is not None and name != self._now.name:
                self._now = _Count(name, total, done)
            count, now = self._now, time.monotonic()
            count.total = count.total if total is None else total
            if done > count.done:
                count.first = count.first or (now, done)
                count.last = now, done
            count.done, count.facts = done, facts
            self._look()

    @property
    def left_seconds(self) -> float | None:
        """The estimated seconds to the end of the phase; None while nothing is known (`_Count.left_seconds`)."""
        return self._now.left_seconds(time.monotonic())

    @contextlib.contextmanager
    def within(self, name: str, total: int | None = None) -> Iterator[None]:
        """Show another phase during the block, as an evaluation between two steps. Its time counts to no step."""
        with self._lock:
            outer, self._now = self._now, _Count(name, total)
            began = self._now.began
        try:
            yield
        finally:
            with self._lock:
                seconds = time.monotonic() - began
                # Both times move on by the length of the block, as if the clock of the outer phase had stood still.
                if outer.first is not None:
                    outer.first = outer.first[0] + seconds, outer.first[1]
                outer.last = outer.last[0] + seconds, outer.last[1]
                self._now = outer

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        with self._lock:
            if self._bars is not None:
                self._bars.stop()
            seconds = time.monotonic() - self._now.began
            if seconds >= FIRST_SECONDS:
                self._print(f"{self._line()}, {duration(seconds)}")
            if self._file is not None:
                self._file.unlink(missing_ok=True)

    def _line(self) -> str:
        now = self._now
        left = self.left_seconds
        counted = "" if now.total is None else f"{self._text(now.done)}/{self._text(now.total)}"
        parts = [counted, now.facts, "" if not left else f"{duration(left)} left"]
        return ": ".join(filter(None, (now.name, ", ".join(filter(None, parts)))))

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _look(self) -> None:
        """Move the bar, or print a line if one is due."""
        count = self._now
        passed = time.monotonic() - count.began
        if self._bars is not None:
            self._bars.update(self._task, description=self._line(), completed=count.done, total=count.total)
        elif passed >= max(FIRST_SECONDS, count.line_after):
            count.line_after = passed + min(LINE_SECONDS, max(FIRST_SECONDS, passed))
            so_far = "" if self.left_seconds is not None else f", {duration(passed)} so far"
            self._print(f"{self._line()}{so_far}")

    def _watch(self) -> None:
        """Keep the display and the file fresh from a thread, because a single step may take minutes."""
        while not self._ended.wait(_LOOK_SECONDS):
            with self._lock:
                if self._ended.is_set():
                    return
                self._look()
                if self._file is not None:
                    self._write(self._file)

    def _write(self, file: Path) -> None:
        count = self._now
        known = {"name": count.name, "done": count.done, "total": count.total, "facts": count.facts}
        known["left_seconds"] = self.left_seconds
        # Written beside it and renamed, so a reader never sees half a file.
        part = file.with_name(f"{file.name}.part")
        with contextlib.suppress(OSError):  # the disk is full, which what is written there for good will say
            part.write_text(json.dumps(known), encoding="utf-8")
            part.replace(file)


def warn(console: Console, text: str) -> None:
    """Print a sentence in yellow, as it is."""
    console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)
