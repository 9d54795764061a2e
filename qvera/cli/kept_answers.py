"""Answers that are kept beside the file they are for, so that a command that was stopped goes on from them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from qvera.utils.errors import InputError, Interrupted
from qvera.utils.files import disk_errors, replace_text


class KeptAnswers:
    """Answers by the number of their question, from 0.

    The first line of the hidden file is a hash of all that the answers depend on; each further one has a number and
    an answer, in the order in which they were finished. A kill may cut the last line off, which is then left out.

    Attributes:
        found: the answers so far.

    Args:
        out: the file that gets all answers; None: nothing is kept.
        asked: questions and settings, as something whose repr tells them.
        total: how many questions there are.

    Raises:
        InputError: what is kept was asked otherwise.
    """

    def __init__(self, out: Path | None, asked: object, total: int) -> None:
        self.found: dict[int, str] = {}
        self._out, self._total = out, total
        if out is None:
            return
        self._file = out.with_name(f".{out.name}.unfinished")
        self._first = json.dumps(hashlib.sha256(repr(asked).encode("utf-8", "surrogatepass")).hexdigest()) + "\n"
        if not self._file.exists():
            return
        content = self._file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        first, *lines = whole.decode("ascii", "replace").splitlines(keepends=True) or [self._first]
        if first != self._first:
            raise InputError(
                f"{self._file}: holds answers to other prompts, or by another model or other settings, that were not "
                "finished. Delete it, or name another --out."
            )
        self.found = dict(map(json.loads, lines))
        os.truncate(self._file, len(whole))

    def left(self) -> list[int]:
        """The numbers of the questions without an answer."""
        return [number for number in range(self._total) if number not in self.found]

    def said(self) -> str:
        """How many answers are kept, and where."""
        return f"{len(self.found)} of {self._total} answers are in {self._file}"

    def add(self, number: int, answer: str) -> None:
        """Keep an answer. RunFailed: the disk is full; the others are kept."""
        if self._out is not None:
            line = json.dumps([number, answer]) + "\n"
            kept = f"{self.said()}: make room, and the same command goes on."
            with (
                disk_errors(str(self._out), kept),
                self._file.open("a" if self.found else "w", encoding="utf-8") as stream,
            ):
                stream.write(line if self.found else self._first + line)
        self.found[number] = answer

    def interrupted(self) -> Interrupted | KeyboardInterrupt:
        """What Ctrl-C raises."""
        if self._out is None or not self.found:
            return KeyboardInterrupt()
        return Interrupted(f"interrupted. {self.said()}: the same command goes on.")

    def write(self, text: str) -> None:
        """Write the file that all this is for, and remove what was kept. RunFailed: the disk is full."""
        assert self._out is not None
        with disk_errors(str(self._out), f"{self.said()}: make room, and the same command goes on."):
            replace_text(self._out, text)
        self._file.unlink(missing_ok=True)
