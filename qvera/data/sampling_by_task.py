"""Which tasks the rows of a run belong to, and which tasks are held out (``data.sampling: task``)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from qvera.config.schema import DataSection
from qvera.data.rows import Rows, concatenated
from qvera.data.sampler import random_order
from qvera.data.source import TokenizedSource
from qvera.utils.errors import InputError, did_you_mean


@dataclass(slots=True)
class Tasks:
    """What tasks a run's rows belong to.

    Attributes:
        names: of the tasks that are trained.
        held_out: the rows of each task that is not trained, by its name.
    """

    names: list[str] = field(default_factory=list)
    held_out: dict[str, Rows] = field(default_factory=dict)


def take_tasks(section: DataSection, sections: Sequence[DataSection], sources: Sequence[TokenizedSource]) -> Tasks:
    """The tasks of all rows; training rows get their numbers (`Rows.task_of`).

    The rows of held-out tasks, evaluation rows too, are taken out of their source.

    Args:
        section: the recipe's ``data``.
        sections: of each source.

    Raises:
        InputError: there is one task alone, fewer labels than a task has, or ``data.held_out_tasks`` does not fit or
        has a task of a single row.
    """
    own = source_names(sections)
    of_train, of_eval = (
        [
            np.array(rows.owners() if section.task_column else [name] * len(rows), dtype=object)
            for name, rows in zip(own, parts, strict=True)
        ]
        for parts in ([s.train for s in sources], [s.eval for s in sources])
    )
    names = sorted({name for values in of_train for name in values}) if section.task_column else []
    names = names or own
    if len(names) < 2:
        raise InputError(
            f"data.sampling: task needs several tasks, and all rows are of {names[0]!r}. Remove it, or name another "
            "data.task_column."
        )
    if (section.task_labels or 0) > len(names):
        raise InputError(
            f"data.task_labels: a task would have {section.task_labels} values of the column {section.task_column!r}, "
            f"which has {len(names)} in all: {_listed(names)}."
        )
    found: dict[str, list[Rows]] = {name: [] for name in held_out_names(section, names)}
    trained = [name for name in names if name not in found]
    number_of = {name: number for number, name in enumerate(trained)}
    for source, train_names, eval_names in zip(sources, of_train, of_eval, strict=True):
        for name, parts in found.items():
            for rows, values in ((source.train, train_names), (source.eval, eval_names)):
                if (values == name).any():
                    parts.append(rows.take(np.flatnonzero(values == name)))
        source.train = _without(source.train, train_names, found)
        source.train.task_of = np.array([number_of[n] for n in train_names if n in number_of], dtype=np.int64)
        source.eval = _without(source.eval, eval_names, found)
    held_out = {name: concatenated(parts) for name, parts in found.items()}
    if single := [name for name, rows in held_out.items() if len(rows) < 2]:
        raise InputError(
            f"data.held_out_tasks: {_listed(single)}: a single row, of which none would be left to score after "
            "adapting to it. Hold out tasks with at least two rows."
        )
    return Tasks(trained, held_out)


def _without(rows: Rows, values: np.ndarray, names: dict[str, list[Rows]]) -> Rows:
    kept = np.array([value not in names for value in values], dtype=bool)
    return rows if kept.all() else rows.take(np.flatnonzero(kept))


def source_names(sections: Sequence[DataSection]) -> list[str]:
    """What the sources are called as tasks: by their paths, and where these repeat by what else tells them apart."""
    paths = [about.path for about in sections]
    names = [
        path if paths.count(path) == 1 else " ".join(filter(None, (path, about.config_name, about.split)))
        for path, about in zip(paths, sections, strict=True)
    ]
    return [name if names.count(name) == 1 else f"{name} {number}" for number, name in enumerate(names, start=1)]


def held_out_names(section: DataSection, names: Sequence[str]) -> list[str]:
    """The tasks that ``data.held_out_tasks`` takes out of training, in the order of ``names``.

    Raises:
        InputError: a task that is not there, or none would be left to train on.
    """
    asked = section.held_out_tasks
    if isinstance(asked, int):
        chosen = {names[i] for i in random_order(len(names), section.seed, -1)[:asked].tolist()}
    else:
        chosen = set(asked)
        for name in asked:
            if name not in names:
                hint = did_you_mean(name, names)
                raise InputError(f"data.held_out_tasks: no task is named {name!r}{hint} Tasks: {_listed(names)}.")
    if len(chosen) == len(names):
        raise InputError(f"data.held_out_tasks: holds out all {len(names)} tasks. Leave at least one to train on.")
    return [name for name in names if name in chosen]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def label_tasks(labels: Sequence[Sequence[str]], count: int, size: int, seed: int) -> list[list[str]]:
    """``count`` tasks, each of ``size`` labels that are drawn without replacement from every set of labels.

    The construction of multitask fine-tuning (arXiv 2203.04904, MultitaskFinetuneDataset of its code): all tasks of the
    first set are drawn, then those of the second, and so on, from Python's generator; task k is the union of each set's
    task k. A label may be in many tasks.

    Args:
        labels: of each set, in the order that the draws count in.
    """
    chooser = random.Random(seed)
    drawn = [[chooser.sample(list(names), size) for _ in range(count)] for names in labels]
    return [[name for tasks in drawn for name in tasks[k]] for k in range(count)]


def task_rows(section: DataSection, task_of: np.ndarray) -> list[np.ndarray]:
    """The rows of each task to train, int64.

    Args:
        task_of: int64 [n], the task of each row; with ``data.task_labels`` its label, of which a task has several.
    """
    members = [np.flatnonzero(task_of == number) for number in range(int(task_of.max()) + 1)]
    if section.task_labels is None or section.task_count is None:
        return [rows for rows in members if len(rows)]
    names = [str(number) for number in range(len(members))]
    tasks = label_tasks([names], section.task_count, section.task_labels, section.seed)
    return [np.sort(np.concatenate([members[int(name)] for name in task])) for task in tasks]
