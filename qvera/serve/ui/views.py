"""The runs as the pages show them. A run is read again only if it has changed."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import statistics
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple, Self

from qvera.evaluation.report.read import (
    AdapterEntry,
    ManyRun,
    RunFiles,
    entries_of,
    get,
    get_number,
    get_text,
    has_checkpoint,
    not_finite_notes,
    parse_metrics,
    process_exists,
    read_adapter_of_run,
    read_evaluation,
    read_run,
    trained_many,
)
from qvera.serve.ui.directories import RunDirectories, open_plain, unreadable
from qvera.serve.ui.metrics import MetricsFile, Read, whole_rows
from qvera.utils.errors import InputError, did_you_mean
from qvera.utils.files import ADAPTER_WEIGHTS, ADAPTERS, RECIPE_FILE, RUN_OWNER, RUN_PROGRESS, file_stamp, read_json
from qvera.utils.formatting import count, duration, significant, text_or_dash

State = Literal["running", "finished", "interrupted", "failed", "unreadable"]
"""``interrupted`` is also a run whose files have no end, and that has no process to write one."""

_ENDED: dict[str, State] = {"done": "finished", "failed": "failed"}
_ORDER: tuple[State, ...] = ("running", "interrupted", "failed", "unreadable", "finished")
_TAIL_BYTES = 64 << 10
_EVAL_BYTES = 4 << 20  # from the end, in which the last held-out loss is looked for
four_digits = functools.partial(significant, digits=4)
_SPEED_STEPS = 50  # last steps, from which the time left is estimated
MOST_VIEWS = 16
"""Runs whose curves stay in memory, at some megabytes each; the least recently viewed one goes."""
_SCORED = ("eval.json", f"adapter/{ADAPTER_WEIGHTS}")
SIGNED = (RECIPE_FILE, "run.json", *_SCORED, RUN_PROGRESS)  # files of a page, besides metrics.jsonl
Stamps = tuple[tuple[int, ...], ...]


def state_of(directory: Path, status: str) -> State:
    """The state of a run; ``status`` is that of its run.json, or "" without one.

    The process is asked first, because a resumed run has the old run.json for a moment.
    """
    owner = _small(directory / RUN_OWNER)
    # a process on another machine counts as existing
    is_running = process_exists(get_number(owner, "pid"), get_text(owner, "host"), get_text(owner, "started"))
    return "running" if is_running else _ENDED.get(status, "interrupted")


def _small(file: Path) -> object:
    """Read a small JSON file; None where it can't be read."""
    with open_plain(file) as descriptor, contextlib.suppress(OSError, ValueError, RecursionError):
        if descriptor is not None:
            return json.loads(os.read(descriptor, 4096))
    return None


class Progress(NamedTuple):
    """The phase of a run: its name, how much of it is done, and the seconds that it still takes."""

    name: str = ""
    counted: str = ""
    left_seconds: float | None = None

    @classmethod
    def of(cls, directory: Path) -> Self:
        """Read the phase that a run has written (`qvera.utils.progress.Phase`); an empty one where there is none."""
        found = _small(directory / RUN_PROGRESS)
        done, total = get_number(found, "done"), get_number(found, "total")
        counted = "" if done is None or not total else f"{count(done)} of {count(total)}"
        return cls(get_text(found, "name"), counted, get_number(found, "left_seconds"))


@dataclass(frozen=True, slots=True)
class Summary:
    """A run in the list."""

    id: str
    state: State
    cells: list[str]  # of its row: what it trains, step, losses, tokens a second, time left, last change
    changed: float  # when its files were last written, in seconds since 1970


class Summaries:
    """The list of all runs, for any number of readers."""

    def __init__(self, directories: RunDirectories) -> None:
        self._directories = directories
        self._known: dict[str, tuple[Stamps, tuple[str, list[str]]]] = {}
        self._lock = threading.Lock()

    def list(self) -> list[Summary]:
        """Every run: running ones, then unfinished, then finished ones, the newest first."""
        with self._lock:
            runs = [self._summary(id, directory) for id, directory in self._directories.find().items()]
            self._known = {run.id: self._known[run.id] for run in runs}  # without runs that are gone

        def place(run: Summary) -> tuple[int, float, str]:
            # running ones stay in the order of their ids: each of them is always the newest for a moment
            return _ORDER.index(run.state), 0.0 if run.state == "running" else -run.changed, run.id

        return sorted(runs, key=place)

    def signature(self, id: str, directory: Path) -> str:
        """Return a short hash that changes with a run's state and its files, except metrics.jsonl."""
        with self._lock:
            return signature_of(self._summary(id, directory).state, stamps_of(directory, *SIGNED))

    def _summary(self, id: str, directory: Path) -> Summary:
        stamps = stamps_of(directory, "run.json", "metrics.jsonl", RUN_PROGRESS)
        if id not in self._known or self._known[id][0] != stamps:
            self._known[id] = stamps, read_cells(directory)
        status, (*cells, left) = self._known[id][1]
        odd = unreadable(directory, "run.json", "metrics.jsonl")
        state: State = "unreadable" if odd else state_of(directory, status)
        changed = max((stamp[1] for stamp in stamps if stamp), default=0) / 1e9
        when = datetime.fromtimestamp(changed, UTC)
        date = f"{when.day} {when:%b, %H:%M}" if changed else ""
        if state == "running" and (now := Progress.of(directory)).name:
            if now.name != "training":
                cells[1] = f"{now.name} {now.counted}".strip()
            left = text_or_dash(now.left_seconds, duration)
        return Summary(id, state, [*cells, left if state == "running" else "", date], changed)


def stamps_of(directory: Path, *names: str) -> Stamps:
    """Return cheap signs of whether files have changed; () for a missing one."""
    stamps: list[tuple[int, ...]] = []
    for name in names:
        try:
            stamps.append(tuple(file_stamp((directory / name).lstat())))
        except OSError:
            stamps.append(())
    return tuple(stamps)


def read_cells(directory: Path) -> tuple[str, list[str]]:
    """Return the status in a run's run.json, and the cells of its row, from there and the end of metrics.jsonl."""
    info: dict[str, Any] = {}
    if not unreadable(directory, "run.json"):
        with contextlib.suppress(OSError, InputError):
            info = read_json(directory / "run.json", "the summary of a run")
    rows: list[dict[str, Any]] = []
    with open_plain(directory / "metrics.jsonl") as descriptor, contextlib.suppress(OSError):
        if descriptor is not None:
            end = os.fstat(descriptor).st_size
            rows = whole_rows(descriptor, max(0, end - _TAIL_BYTES), _TAIL_BYTES)
            if not any(get_text(row, "kind") == "eval" for row in rows):
                rows = [*_last_evaluation(descriptor, end), *rows]
    rounds = [row for row in rows if get_text(row, "kind") == "round" and not row.get("rank")]
    own = [row for row in rows if not get_text(row, "adapter")]
    steps = rounds or [row for row in own if get_text(row, "kind") == "train"]
    evals = [loss for row in own if get_text(row, "kind") == "eval" and (loss := get_number(row, "loss")) is not None]
    last, result, adapters = steps[-1] if steps else None, get(info, "result"), get(info, "adapters")
    step, after = get_number(last, "round" if rounds else "step"), get_number(result, "eval_after", "loss")
    planned = None if rounds else get_number(result, "planned_steps") or get_number(info, "planned_steps")
    left = None if planned is None or step is None else left_seconds(steps, planned - step)
    model = PurePosixPath(get_text(info, "model", "path").replace("\\", "/")).name
    many = f"{count(len(adapters))} adapters" if isinstance(adapters, list) else ""
    of = f" of {planned:,.0f}" if planned else ""
    return get_text(info, "status"), [
        ", ".join(filter(None, (model, get_text(info, "adapter", "method"), many))),
        "–" if step is None else f"{'round ' if rounds else ''}{step:,.0f}{of}",
        text_or_dash(get_number(last, "loss"), four_digits),
        text_or_dash(evals[-1] if after is None and evals else after, four_digits),
        text_or_dash(get_number(last, "tokens_per_second"), count),
        text_or_dash(left, duration),
    ]


def _last_evaluation(descriptor: int, end: int) -> list[dict[str, Any]]:
    """The last evaluation before the end of a metrics.jsonl, where there is one; its lines are not all parsed."""
    start = max(0, end - _EVAL_BYTES)
    piece = os.pread(descriptor, end - start, start)
    at = piece.rfind(b'"kind": "eval"')  # as the trainer writes it
    row = parse_metrics(piece[piece.rfind(b"\n", 0, at) + 1 :].partition(b"\n")[0], ("step",)) if at >= 0 else None
    return [] if row is None else [row]


def left_seconds(steps: Sequence[dict[str, Any]], left: float) -> float | None:
    """Seconds for ``left`` more steps at the pace of the last ones; None if unknown."""
    taken = [seconds for row in steps[-_SPEED_STEPS:] if (seconds := get_number(row, "step_seconds")) is not None]
    return statistics.mean(taken) * left if taken and left >= 0 else None


class NotFound(Exception):
    """There is no such run or adapter, or no longer. Its text is a sentence."""


@dataclass(frozen=True)
class View:
    """A run at a moment."""

    directory: Path
    run: RunFiles  # in a run of many adapters, steps are rounds
    many: ManyRun | None
    state: State
    read: Read
    stamps: Stamps  # of `SIGNED`

    @property
    def signature(self) -> str:
        """Differs if the state differs, or any file of the run but metrics.jsonl."""
        return signature_of(self.state, self.stamps)


def signature_of(state: State, stamps: Stamps) -> str:
    """A short hash of a run's state and the stamps of `SIGNED`."""
    return hashlib.sha256(repr((state, stamps)).encode()).hexdigest()[:16]


class _Reader:
    """A run that somebody looks at. Its files are read again only if they have changed."""

    def __init__(self, id: str, directory: Path) -> None:
        self.id, self.directory = id, directory
        self._metrics = MetricsFile(directory / "metrics.jsonl")
        self._others: dict[Path, MetricsFile] = {}  # of the other processes that share out adapters, until the run ends
        self._base: tuple[Stamps, RunFiles] | None = None
        self._lock = threading.Lock()

    def view(self) -> View:
        with self._lock:
            reasons = unreadable(self.directory, RECIPE_FILE, "run.json", "metrics.jsonl")
            if reasons:
                raise InputError(" ".join(reasons))
            stamps = stamps_of(self.directory, *SIGNED)
            if self._base is None or stamps[:2] != self._base[0]:  # recipe and run.json
                self._base = stamps[:2], read_run(self.directory, metrics=False)
            base, read = self._base[1], self._metrics.update()
            is_many, train = trained_many(base.info, base.recipe), read.train.rows()
            state = state_of(self.directory, get_text(base.info, "status"))
            missing = [] if state == "running" and not stamps[1] else base.notes  # run.json: it is about to write them
            notes = [*missing, *read.notes(), *([] if is_many else not_finite_notes(train))]
            run = dataclasses.replace(
                base,
                train=train,
                evals=read.evals.rows(),
                notes=notes,
                recorded=read.recorded(),
                name=self.id,
                has_checkpoint=has_checkpoint(self.directory),  # since recipe and run.json were read
            )
            many = None
            if is_many:  # with the adapters that have only begun, which run.json does not list yet
                others = self.directory.glob("metrics.rank-*.jsonl")
                parts = [read, *(self._others.setdefault(path, MetricsFile(path)).update() for path in sorted(others))]
                listed = entries_of(base.info)
                known = {entry.name for entry in listed}
                begun = [entry for part in parts for entry in part.entries() if entry.name not in known]
                many = ManyRun(run, listed + begun, {})
            return View(self.directory, run, many, state, read, stamps)


class Views:
    """The runs that readers look at.

    Methods raise NotFound if there is no such run or adapter, and InputError if its files can't be read or the run is
    of another kind.
    """

    def __init__(self, directories: RunDirectories) -> None:
        self._directories = directories
        self._readers: OrderedDict[str, _Reader] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, id: str) -> View:
        """A run as it is now."""
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

    def with_scores(self, id: str) -> RunFiles:
        """A run of one adapter with the scores of its eval.json, for a comparison."""
        view = self.get(id)
        if view.many is not None:
            raise InputError(f"{id} trained many adapters: choose those to compare on its own page.")
        notes, odd = list(view.run.notes), unreadable(view.directory, *_SCORED)
        evaluation, weights = (view.directory / name for name in _SCORED)
        scores = None if odd else read_evaluation(evaluation, weights, notes)
        return dataclasses.replace(view.run, evaluation=scores, notes=notes + odd)

    def adapter(self, id: str, name: str) -> tuple[View, AdapterEntry]:
        """One adapter of a run of many."""
        view = self.get(id)
        entries = [] if view.many is None else view.many.entries
        entry = next((entry for entry in entries if entry.name == name), None)
        if entry is None:
            raise NotFound(f"{id} has no adapter of this name{did_you_mean(name, [e.name for e in entries[:1000]])}")
        return view, entry

    def adapter_with_scores(self, id: str, name: str) -> RunFiles:
        """One adapter as a run of its own, with its curve and the scores of its eval.json."""
        view, entry = self.adapter(id, name)
        if odd := unreadable(view.directory, *_scored_files(entry)):
            raise InputError(" ".join(odd))
        return read_adapter_of_run(view.directory, name)

    def stamps_of_scores(self, id: str, name: str) -> Stamps:
        """Signs of whether the files have changed that `adapter_with_scores` reads beside the run's own."""
        view, entry = self.adapter(id, name)
        return stamps_of(view.directory, *_scored_files(entry))


def _scored_files(entry: AdapterEntry) -> list[str]:
    return [f"{ADAPTERS}/{entry.directory}/{name}" for name in ("eval.json", ADAPTER_WEIGHTS)]
