"""Runs as their pages show them: read as far as they have come, and kept for the next reader."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from qvera.evaluation.report.read import (
    AdapterEntry,
    ManyRun,
    Run,
    entries_of,
    get_text,
    not_finite_notes,
    read_adapter,
    read_evaluation,
    read_run,
    trained_many,
)
from qvera.serve.ui.directories import RunDirectories, unreadable
from qvera.serve.ui.metrics import MetricsFile, Read
from qvera.serve.ui.state import State, state_of
from qvera.serve.ui.summaries import Stamps, stamps_of
from qvera.utils.errors import InputError, did_you_mean
from qvera.utils.paths import ADAPTER_WEIGHTS, ADAPTERS, RECIPE_FILE

MOST_VIEWS = 16
"""Runs whose curves are kept in memory, of those that were looked at last: some megabytes each."""

_SCORED = ("eval.json", f"adapter/{ADAPTER_WEIGHTS}")
SIGNED = (RECIPE_FILE, "run.json", *_SCORED)
"""What a page is made of besides metrics.jsonl."""


class NotFound(Exception):
    """There is no such run or adapter (any more); says so in a sentence."""


@dataclass(frozen=True)
class View:
    """A run at a moment.

    Attributes:
        run: what its files say; of a run of many adapters, its steps are rounds.
        many: its adapters, where it trained many.
        read: what was read of metrics.jsonl.
        stamps: of `SIGNED`.
    """

    id: str
    directory: Path
    run: Run
    many: ManyRun | None
    state: State
    read: Read
    stamps: Stamps

    @property
    def signature(self) -> str:
        """Differs between two views whose files but metrics.jsonl, or whose states, differ."""
        return signature_of(self.state, self.stamps)


def signature_of(state: State, stamps: Stamps) -> str:
    """A short text of a run's state and the stamps of `SIGNED`."""
    return hashlib.sha256(repr((state, stamps)).encode()).hexdigest()[:16]


class _Reader:
    """Reads one run, again only where it changed."""

    def __init__(self, id: str, directory: Path) -> None:
        self.id, self.directory = id, directory
        self._metrics = MetricsFile(directory / "metrics.jsonl")
        self._stamps: Stamps | None = None
        self._base: Run | None = None
        self._lock = threading.Lock()

    def view(self) -> View:
        with self._lock:
            reasons = unreadable(self.directory, RECIPE_FILE, "run.json", "metrics.jsonl")
            if reasons:
                raise InputError(" ".join(reasons))
            stamps = stamps_of(self.directory, *SIGNED)
            if self._base is None or self._stamps is None or stamps[:2] != self._stamps[:2]:
                self._base = read_run(self.directory, metrics=False)
            self._stamps = stamps
            return self._view(self._base, self._metrics.update(), stamps)

    def _view(self, base: Run, read: Read, stamps: Stamps) -> View:
        many = trained_many(base.info, base.recipe)
        train = read.train.rows()
        notes = [*base.notes, *read.notes(), *([] if many else not_finite_notes(train))]
        run = dataclasses.replace(
            base, train=train, evals=read.evals.rows(), notes=notes, recorded=read.recorded(), name=self.id
        )
        state = state_of(self.directory, get_text(base.info, "status"))
        found = ManyRun(run, _entries(base, read), {}) if many else None
        return View(self.id, self.directory, run, found, state, read, stamps)


def _entries(base: Run, read: Read) -> list[AdapterEntry]:
    """The adapters that run.json lists, and those that have only begun."""
    listed = entries_of(base.info)
    known = {entry.name for entry in listed}
    return listed + [entry for entry in read.entries() if entry.name not in known]


class Views:
    """The runs that readers look at."""

    def __init__(self, directories: RunDirectories) -> None:
        self._directories = directories
        self._readers: OrderedDict[str, _Reader] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, id: str) -> View:
        """A run as it is now.

        Raises:
            NotFound: there is no such run, or no longer.
            InputError: its files are not ones that are read.
        """
        directory = self._directories.get(id)
        if directory is None:
            raise NotFound("There is no such run, or no longer.")
        with self._lock:
            reader = self._readers.get(id)
            if reader is None or reader.directory != directory:
                reader = self._readers[id] = _Reader(id, directory)
            self._readers.move_to_end(id)
            while len(self._readers) > MOST_VIEWS:
                self._readers.popitem(last=False)
        return reader.view()

    def with_scores(self, id: str) -> Run:
        """A run of one adapter with the scores of its eval.json, to compare it with others.

        Raises:
            NotFound: there is no such run.
            InputError: it trained many adapters, or its files are not ones that are read.
        """
        view = self.get(id)
        if view.many is not None:
            raise InputError(f"{id} trained many adapters: choose those to compare on its own page.")
        notes = list(view.run.notes)
        odd = unreadable(view.directory, *_SCORED)
        evaluation = None
        if not odd:
            evaluation = read_evaluation(view.directory / _SCORED[0], view.directory / _SCORED[1], notes)
        return dataclasses.replace(view.run, evaluation=evaluation, notes=notes + odd)

    def adapter(self, id: str, name: str) -> tuple[View, AdapterEntry]:
        """One adapter of a run of many, with its curve: read from the whole of metrics.jsonl.

        Raises:
            NotFound: there is no such run or adapter.
            InputError: the run's files are not ones that are read.
        """
        view = self.get(id)
        entries = [] if view.many is None else view.many.entries
        entry = next((entry for entry in entries if entry.name == name), None)
        if entry is None:
            raise NotFound(f"{id} has no adapter of this name{did_you_mean(name, [e.name for e in entries[:1000]])}")
        return view, entry

    def adapter_with_scores(self, id: str, name: str) -> Run:
        """One adapter as a run of its own, with the scores of the eval.json in its directory.

        Raises:
            NotFound: there is no such run or adapter.
            InputError: its files are not ones that are read.
        """
        view, entry = self.adapter(id, name)
        own = f"{ADAPTERS}/{entry.directory}"
        odd = unreadable(view.directory, f"{own}/eval.json", f"{own}/{ADAPTER_WEIGHTS}")
        if odd:
            raise InputError(" ".join(odd))
        return read_adapter(view.directory, name)
