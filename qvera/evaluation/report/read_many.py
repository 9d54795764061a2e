"""Read a run that trained many adapters: each of them from run.json, its curve from metrics.jsonl.

metrics.jsonl may have a million lines. They are read one after the other, and of each only the numbers of a curve are
kept.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qvera.evaluation.report.read import Run, get, get_number, get_text, read_evaluation, read_rows, read_run
from qvera.utils.adapter_names import shown_name
from qvera.utils.errors import InputError, did_you_mean
from qvera.utils.paths import ADAPTER_WEIGHTS, ADAPTERS

STATUS_TEXTS = {
    "done": "done",
    "stopped_early": "stopped early",
    "not_finite": "not finite",
    "no_rows": "no rows",
}
"""A status of run.json → how people read it. An adapter without one has not finished."""

_TRAIN_KEYS = ("step", "loss", "learning_rate", "grad_norm", "input_tokens")
_EVAL_KEYS = ("step", "loss", "perplexity", "rows")


@dataclass(frozen=True, slots=True)
class AdapterEntry:
    """One adapter of a run that trained many, as run.json has it; None for a number that it does not say.

    Attributes:
        name: as the data has it.
        directory: of its files in ``adapters/``, and of its page; "" where it has none.
        status: a key of `STATUS_TEXTS`; "" for one that has not finished.
        flags: what a person should look at, in words.
        tree: the whole entry of run.json.
    """

    name: str
    directory: str
    status: str = ""
    rows: float | None = None
    eval_rows: float | None = None
    steps: float | None = None
    best_step: float | None = None
    train_loss_first: float | None = None
    train_loss_last: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    flags: tuple[str, ...] = ()
    tree: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def status_text(self) -> str:
        """The status as people read it."""
        return STATUS_TEXTS.get(self.status, self.status or "unfinished")

    @property
    def ended_badly(self) -> bool:
        """Whether there is nothing of it that could be used."""
        return self.status in ("not_finite", "no_rows")

    @property
    def is_flagged(self) -> bool:
        """Whether a person should look at it."""
        return self.ended_badly or bool(self.flags)


_NUMBERS = ("rows", "eval_rows", "steps", "best_step", "train_loss_first", "train_loss_last")


def entries_of(info: object) -> list[AdapterEntry]:
    """The adapters of a run.json, in its order; what is no adapter is left out."""
    listed = get(info, "adapters")
    entries = []
    for tree in listed if isinstance(listed, list) else ():
        name, flags = get_text(tree, "name"), get(tree, "flags")
        if not name:
            continue
        entries.append(
            AdapterEntry(
                name=name,
                directory=_plain_name(get_text(tree, "directory")),
                status=get_text(tree, "status"),
                **{key: get_number(tree, key) for key in _NUMBERS},
                loss_before=get_number(tree, "eval_before", "loss"),
                loss_after=get_number(tree, "eval_after", "loss"),
                flags=tuple(str(flag) for flag in flags) if isinstance(flags, list) else (),
                tree=tree,
            )
        )
    return entries


def _plain_name(directory: str) -> str:
    """The name of a directory, or "" where it leads elsewhere: run.json may come from anywhere."""
    return directory if directory == Path(directory).name and not directory.startswith(".") else ""


@dataclass(slots=True)
class Curve:
    """The numbers of one adapter's lines in metrics.jsonl, in the order of the file; NaN for one that is not known."""

    train: array[float] = field(default_factory=lambda: array("d"))
    evals: array[float] = field(default_factory=lambda: array("d"))

    def add(self, row: dict[str, Any]) -> None:
        """Keep what `rows` gives back of a line."""
        if row.get("kind") == "train":
            self.train.extend(_values(row, _TRAIN_KEYS))
        elif row.get("kind") == "eval":
            self.evals.extend(_values(row, _EVAL_KEYS))

    def rows(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Training steps and evaluations by rising step, each step once: the last one that was written."""
        return _rows(self.train, _TRAIN_KEYS), _rows(self.evals, _EVAL_KEYS)


def _values(row: dict[str, Any], keys: Sequence[str]) -> list[float]:
    found = [get_number(row, key) for key in keys]
    return [math.nan if value is None else value for value in found]


def _rows(values: array[float], keys: Sequence[str]) -> list[dict[str, Any]]:
    width = len(keys)
    by_step: dict[int, dict[str, Any]] = {}
    for start in range(0, len(values), width):
        step, *others = values[start : start + width]
        by_step[int(step)] = {"step": int(step), **dict(zip(keys[1:], others, strict=True))}
    return [by_step[step] for step in sorted(by_step)]


@dataclass(frozen=True)
class ManyRun:
    """A run that trained many adapters.

    Attributes:
        run: the files of the run as a whole. Its steps are the rounds of the first process, each once.
        entries: its adapters, in the order of the data. Of a run that was killed, those that have begun.
        curves: by name of the adapter.
    """

    run: Run
    entries: list[AdapterEntry]
    curves: dict[str, Curve]

    def statuses(self) -> dict[str, int]:
        """How people read a status → how many adapters have it; those that occur."""
        return dict(Counter(entry.status_text for entry in self.entries).most_common())

    def flags(self) -> dict[str, list[AdapterEntry]]:
        """What a person should look at, in words → the adapters."""
        found: dict[str, list[AdapterEntry]] = {}
        for entry in self.entries:
            for flag in [*([entry.status_text] if entry.ended_badly else []), *entry.flags]:
                found.setdefault(flag, []).append(entry)
        return found

    def median(self, key: str) -> float | None:
        """The median of a number over the adapters that have a held-out loss both before and after training."""
        values = [
            getattr(entry, key)
            for entry in self.entries
            if entry.loss_before is not None and entry.loss_after is not None
        ]
        return statistics.median(values) if values else None

    def adapter_run(self, entry: AdapterEntry) -> Run:
        """One adapter as a run of its own, for its page and for comparisons."""
        train, evals = self.curves.get(entry.name, Curve()).rows()
        info = {key: self.run.info.get(key) for key in ("model", "adapter", "device", "versions", "processes")}
        keys = ("steps", "best_step", "train_loss_first", "train_loss_last", "eval_before", "eval_after")
        status = "done" if entry.status in ("done", "stopped_early") else entry.status
        info |= {"status": status, "result": {key: entry.tree.get(key) for key in keys}}
        return dataclasses.replace(self.run, name=entry.name, info=info, train=train, evals=evals, notes=[])


def trained_many(info: object, recipe: object) -> bool:
    """Whether a run trained many adapters, as its run.json or its recipe says."""
    named = get_text(recipe, "data", "adapter_column") or get(recipe, "data", "adapter_files") is True
    return bool(named) or isinstance(get(info, "adapters"), list)


def read_many(run_dir: str | Path, only: str | None = None) -> ManyRun:
    """Read what `qvera train` has written so far of a run of many adapters.

    Args:
        only: keep the curve of this adapter alone, and no rounds.

    Raises:
        InputError: there is no such directory, or no run has written to it.
    """
    root = Path(run_dir)
    run = read_run(root, metrics=False)
    entries = entries_of(run.info)
    rounds: dict[int, dict[str, Any]] = {}
    curves: dict[str, Curve] = {}
    written = "" if only is None else json.dumps(only)  # as the trainer writes it
    for row in read_rows(root / "metrics.jsonl", ("step", "round"), run.notes, containing=written):
        if row.get("kind") == "round":
            if not row.get("rank"):
                rounds[int(get_number(row, "round") or 0)] = row
        elif (name := get_text(row, "adapter")) and (only is None or name == only):
            curves.setdefault(name, Curve()).add(row)
    known = {entry.name for entry in entries}
    entries += [AdapterEntry(name, "") for name in curves if name not in known]
    weights = next((root / ADAPTERS / entry.directory / ADAPTER_WEIGHTS for entry in entries if entry.directory), None)
    size = weights.stat().st_size if weights is not None and weights.is_file() else None
    in_order = [rounds[number] for number in sorted(rounds)]
    run = dataclasses.replace(run, adapter_file_bytes=size, train=[round_as_step(row) for row in in_order])
    return ManyRun(run, entries, curves)


def read_adapter(run_dir: Path, name: str) -> Run:
    """One adapter of a run that trained many, as a run of its own, with the scores of an eval.json in its directory.

    Raises:
        InputError: there is no such run, or it trained no adapter of this name.
    """
    many = read_many(run_dir, only=name)
    entry = next((entry for entry in many.entries if entry.name == name), None)
    if entry is None:
        known = [entry.name for entry in many.entries]
        what = "has no adapter of this name" if known else "did not train many adapters"
        raise InputError(f"--adapter {shown_name(name)}: {run_dir} {what}{did_you_mean(name, known)}")
    run = many.adapter_run(entry)
    directory = run_dir / ADAPTERS / entry.directory
    evaluation = read_evaluation(directory / "eval.json", directory / ADAPTER_WEIGHTS, run.notes)
    return dataclasses.replace(run, evaluation=evaluation)


def round_as_step(row: dict[str, Any]) -> dict[str, Any]:
    """A line of a round with the keys of one of a step, by which `Run.totals` counts."""
    seconds, speed = get_number(row, "step_seconds"), get_number(row, "tokens_per_second")
    tokens = None if seconds is None or speed is None else seconds * speed
    return {**row, "step": row["round"], "input_tokens": tokens}
