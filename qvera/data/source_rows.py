"""The raw rows of one source: its files, which task or adapter a row belongs to, and which rows are held out."""

from __future__ import annotations

import itertools
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from qvera.config.schema import DataSection
from qvera.data.hub import class_names, load_hub
from qvera.data.readers import RawRow, adapter_files, describe, local_files, read_file, read_rows
from qvera.data.row_format import LABELLED, RowFormat, detect_format
from qvera.data.sampler import random_order
from qvera.utils.adapter_names import escape_name
from qvera.utils.errors import InputError, did_you_mean


def _split(section: DataSection, held_out: bool) -> str:
    return section.eval_split or section.split if held_out else section.split


def source_paths(section: DataSection) -> Iterator[tuple[str, str]]:
    """Path and split of all that a source reads, training rows first; the split counts for a hub dataset only."""
    yield section.path, section.split
    if section.held_out_path is not None:
        yield section.held_out_path, _split(section, True)


def source_files(section: DataSection, path: str) -> list[Path] | None:
    """The files of ``data.path`` or ``data.eval_path``; None for a hub dataset.

    Raises:
        InputError: nothing of that name, or a directory whose files can't be read as the recipe says.
    """
    return adapter_files(path) if section.adapter_files else local_files(path)


def with_label_names(section: DataSection) -> DataSection:
    """The source with the names that a hub dataset itself has for the integer labels of its classes, in their order.

    Names that the recipe or a trained model gives are kept. Names that are numbers themselves, as of MNIST, are not
    used: an integer label would be mistaken for one of them.

    Raises:
        InputError: a dataset can't be loaded; that of the held-out rows has other names than that of the training rows;
            or a dataset has the given names in another order.
    """
    if section.format not in LABELLED or section.regression is True:
        return section
    columns = [section.columns["label"]] if "label" in section.columns else ["label", "labels"]
    found = []
    for path, split in source_paths(section):
        if local_files(path) is None:
            dataset = load_hub(path, split, section.config_name, section.revision)
            found.append((path, next(filter(None, (class_names(dataset, column) for column in columns)), [])))
    if given := section.label_names:
        _require_same_names(found, given, "data.label_names or the trained model", may_rename=True)
        return section
    if not found or found[0][0] != section.path:
        return section
    names = found[0][1]
    _require_same_names(found[1:], names, section.path)
    return section.replace(label_names=[] if any(map(str.isdecimal, names)) else names)


def _require_same_names(
    found: list[tuple[str, list[str]]], names: list[str], source: str, may_rename: bool = False
) -> None:
    """Refuse a dataset (its path and its own names) in which an integer label is another class than in ``names``.

    ``may_rename``: wholly other names are fine, the same ones in another order are not.
    """
    for path, own in found:
        if own and names and own != names and not (may_rename and sorted(own) != sorted(names)):
            raise InputError(
                f"{path}: calls its classes {', '.join(own)}, and {source} calls them {', '.join(names)}: an integer "
                "label would mean two things. Take rows with the same classes in the same order, or whose labels are "
                "names."
            )


def raw_rows(section: DataSection, held_out: bool = False) -> Iterator[RawRow]:
    """The raw rows of a source, one at a time, each with its task or adapter as ``owner``.

    ``held_out``: those of ``data.held_out_path``, where there is one, in place of those of ``data.path``.

    Raises:
        InputError: a file or a row can't be read, or does not name its task or adapter.
    """
    rows: Iterator[RawRow]
    path = str(section.held_out_path) if held_out else section.path
    if held_out and section.eval_split is not None and local_files(path) is not None:
        raise InputError(
            f"data.eval_split: {section.eval_split!r} has a meaning for hub datasets only, and {path} is local. Remove "
            "the key, and name the file of held-out rows in data.eval_path."
        )
    if not held_out and section.split != "train" and local_files(path) is not None:
        raise InputError(
            f"data.split: {section.split!r} has a meaning for hub datasets only, and {path} is local. Remove the key, "
            "and name the file of that split in data.path."
        )
    if section.adapter_files:
        rows = (replace(row, owner=file.stem) for file in adapter_files(path) for row in read_file(file))
    elif path == section.path or not Path(path).expanduser().exists():
        split = _split(section, held_out)
        rows = read_rows(path, split=split, config_name=section.config_name, revision=section.revision)
    else:  # a local eval file beside a hub dataset: the hub's keys are not about it
        rows = read_rows(path)
    if section.task_column is not None:
        rows = _with_owners(rows, section.task_column, "task")
    elif section.adapter_column is not None:
        rows = _with_owners(rows, section.adapter_column, "adapter")
    limit = None if held_out else section.limit
    return _first_of_each(rows, limit) if section.has_adapters and limit else itertools.islice(rows, limit)


def _with_owners(rows: Iterator[RawRow], column: str, kind: str) -> Iterator[RawRow]:
    for row in rows:
        if column not in row.fields:
            raise InputError(
                f"{row.source}: no column {column!r} (data.{kind}_column){did_you_mean(column, row.fields)} Columns "
                f"found: {', '.join(map(str, row.fields)) or 'none'}. Each row names its {kind}."
            )
        value = row.fields[column]
        if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
            is_missing = value is None or value != value or value == ""  # a missing number is a NaN
            raise InputError(
                f"{row.source}: the column {column!r} (data.{kind}_column) names the row's {kind} by a text or a whole "
                f"number, got {'nothing' if is_missing else describe(value)}. Fill it in, or remove the row."
            )
        yield replace(row, owner=str(value))


def _first_of_each(rows: Iterator[RawRow], limit: int) -> Iterator[RawRow]:
    """The first ``limit`` rows of each owner."""
    seen: Counter[str | None] = Counter()
    for row in rows:
        seen[row.owner] += 1
        if seen[row.owner] <= limit:
            yield row


@dataclass(frozen=True, slots=True)
class Survey:
    """What one pass over the raw rows of a source finds.

    Attributes:
        first: the first row.
        format: what the rows look like.
        count: how many there are.
        names: the adapters in order of first appearance; empty where the rows name none.
        members: for each adapter, the numbers of its rows, int64.
    """

    first: RawRow
    format: RowFormat
    count: int
    names: list[str]
    members: list[np.ndarray]


def survey(section: DataSection, held_out: bool = False) -> Survey:
    """Read all rows of `raw_rows` once.

    Raises:
        InputError: as `raw_rows` and `detect_format`; the name of an adapter can't be a directory's (`escape_name`); or
            the first rows of two adapters are of different formats.
    """
    firsts: dict[frozenset[str], RawRow] = {}  # by their columns: the first row of all, and of each adapter
    count, numbers, owner_of = 0, dict[str, int](), array("q")
    for row in raw_rows(section, held_out):
        count += 1
        if not firsts:
            firsts[frozenset(row.fields)] = row
        if section.has_adapters:
            name = row.owner or ""
            if name not in numbers:
                firsts.setdefault(frozenset(row.fields), row)
                try:
                    escape_name(name)
                except InputError as error:
                    raise InputError(f"{row.source}: {error}") from None
            owner_of.append(numbers.setdefault(name, len(numbers)))
    first, *others = firsts.values()  # readers refuse what holds no rows
    format = detect_format(first, section.format, section.columns)
    for other in others:
        if (name := detect_format(other, section.format, section.columns).name) != format.name:
            raise InputError(
                f"{other.source}: the row looks like {name}, and {first.source} like {format.name}. All adapters of a "
                "run have rows of one format: convert them, or set data.format if both can be read as one."
            )
    members = members_of(np.frombuffer(owner_of, dtype=np.int64), len(numbers)) if numbers else []
    return Survey(first, format, count, list(numbers), members)


def members_of(numbers: np.ndarray, count: int) -> list[np.ndarray]:
    """The rows of each of ``count`` owners, in order: int64 arrays.

    Args:
        numbers: int64 [rows]; the owner's number of each row.
    """
    by_owner = np.argsort(numbers, kind="stable")
    return np.split(by_owner, np.cumsum(np.bincount(numbers, minlength=count))[:-1])


def choose_rows(section: DataSection, rows: Survey, eval_rows: Survey | None) -> tuple[np.ndarray, np.ndarray]:
    """Which raw rows are trained on and which are held out; of many adapters, each by itself.

    Args:
        rows: of ``data.path``.
        eval_rows: of ``data.held_out_path``; None: the held-out rows are drawn from ``rows``.

    Returns:
        bool [raw rows of ``data.path``] and bool [raw rows that held-out rows come from].
    """
    if eval_rows is not None:
        held = np.zeros(eval_rows.count, dtype=bool)
        for members in eval_rows.members or [np.arange(eval_rows.count)]:
            held[members[: section.eval_limit]] = True
        return np.ones(rows.count, dtype=bool), held
    trained, held = np.ones(rows.count, dtype=bool), np.zeros(rows.count, dtype=bool)
    for members in (rows.members or [np.arange(rows.count)]) if section.eval_fraction > 0 else ():
        chosen = members[hold_out(len(members), section.eval_fraction, section.seed)]
        trained[chosen] = False
        held[chosen[: section.eval_limit]] = True
    return trained, held


def hold_out(count: int, fraction: float, seed: int) -> np.ndarray:
    """Which rows are held out: bool [count], at least one of each kind where any are; of a single row none.

    Args:
        fraction: of them to hold out, 0 <= fraction < 1; 0 holds out none.
        seed: decides which.
    """
    held = np.zeros(count, dtype=bool)
    if fraction > 0:
        chosen = min(max(1, round(count * fraction)), count - 1)
        held[random_order(count, seed, -1)[:chosen]] = True
    return held
