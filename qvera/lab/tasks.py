"""Training by task (``data.sampling: task``): one task a step, and at the end a few steps on each held-out task.

Uniform over tasks, however many rows they have (multitask fine-tuning, arXiv 2203.04904).
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR

from qvera.adapters.hooks import TrainingHook
from qvera.adapters.methods import method_of
from qvera.adapters.save_load import rate_factors, trained_vectors
from qvera.config.plugins import Schedule
from qvera.data.rows import Rows, concatenated, lengths_of
from qvera.data.sampler import Batches, random_order, steps_per_epoch
from qvera.evaluation import held_out
from qvera.training.optim import build_optimizer
from qvera.utils.errors import InputError, NotFinite, did_you_mean


class Tasks(Schedule):
    """``data.sampling: task`` and ``training.adapt_steps``."""

    name = "adapt"
    keys = ("data.sampling", "training.adapt_steps")

    def divide(self, section: Any, sections: Any, sources: Any) -> tuple[list[str], dict[str, Any]] | None:
        return take_tasks(section, sections, sources) if section.sampling == "task" else None

    def batches(self, recipe: Any, rows: Any, sizes: tuple[Any, ...], common: dict[str, Any]) -> Any:
        data = recipe.data
        if data.sampling != "task" or (part_of := getattr(rows, "part_of", None)) is None:
            return None
        return TaskBatches(*sizes, **common, tasks=task_rows(data, part_of), steps_each=data.task_steps)

    def hook(self, training: Any) -> AdaptHook | None:
        return AdaptHook() if training.recipe.training.adapt_steps else None


def take_tasks(section: Any, sections: Sequence[Any], sources: Sequence[Any]) -> tuple[list[str], dict[str, Rows]]:
    """Return the names of the trained tasks, and the rows of held-out ones, which are taken out of their sources.

    Training rows get their task's number (`Rows.part_of`). InputError if tasks or ``data.held_out_tasks`` do not fit.
    """
    own, by_column = source_names(sections), bool(section.task_column)

    def tasks_of(rows: Rows, source: str) -> np.ndarray:
        names, places = rows.owners() if by_column else ([source], np.zeros(len(rows), np.int64))
        return np.array(names, dtype=object)[places]

    of_train = [tasks_of(source.train, name) for source, name in zip(sources, own, strict=True)]
    names = (sorted({name for values in of_train for name in values}) if by_column else []) or own
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
    for source, source_name, train_names in zip(sources, own, of_train, strict=True):
        eval_names = tasks_of(source.eval, source_name)
        for name, parts in found.items():
            for rows, values in ((source.train, train_names), (source.eval, eval_names)):
                if (values == name).any():
                    parts.append(rows.take(np.flatnonzero(values == name)))
        source.train = _without(source.train, train_names, found)
        numbers = [number_of[name] for name in train_names if name in number_of]
        source.train.part_of = np.array(numbers, dtype=np.int64)
        source.eval = _without(source.eval, eval_names, found)
    held_out = {name: concatenated(parts) for name, parts in found.items()}
    if single := [name for name, rows in held_out.items() if len(rows) < 2]:
        raise InputError(
            f"data.held_out_tasks: {_listed(single)}: a single row, of which none would be left to score after "
            "adapting to it. Hold out tasks with at least two rows."
        )
    return trained, held_out


def _without(rows: Rows, values: np.ndarray, names: dict[str, list[Rows]]) -> Rows:
    kept = np.array([value not in names for value in values], dtype=bool)
    return rows if kept.all() else rows.take(np.flatnonzero(kept))


def source_names(sections: Sequence[Any]) -> list[str]:
    """Name sources as tasks, by their paths. Where paths repeat, config, split or a number is added."""
    paths = [about.path for about in sections]
    names = [
        path if paths.count(path) == 1 else " ".join(filter(None, (path, about.config_name, about.split)))
        for path, about in zip(paths, sections, strict=True)
    ]
    return [name if names.count(name) == 1 else f"{name} {number}" for number, name in enumerate(names, start=1)]


def held_out_names(section: Any, names: Sequence[str]) -> list[str]:
    """List the tasks that ``data.held_out_tasks`` takes out of training; InputError if it does not fit."""
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


def task_rows(section: Any, task_of: np.ndarray) -> list[np.ndarray]:
    """List the rows of each task, int64. ``task_of`` [n] is each row's task, or its label with ``data.task_labels``.

    Tasks of labels are drawn as in MultitaskFinetuneDataset of arXiv 2203.04904, without replacement within a task.
    """
    members = [np.flatnonzero(task_of == number) for number in range(int(task_of.max()) + 1)]
    if section.task_labels is None:
        return [rows for rows in members if len(rows)]
    chooser, labels = random.Random(section.seed), range(len(members))
    tasks = [chooser.sample(labels, section.task_labels) for _ in range(section.task_count)]
    return [np.sort(np.concatenate([members[label] for label in task])) for task in tasks]


_TASK_ORDER, LEVELS = 2**30, 2**30 + 1
"""Numbers for drawing the order of tasks and the split into levels; parts of rows have lower numbers."""


@functools.lru_cache(maxsize=8)
def part_order(part: int, epoch: int, n: int, seed: int, shuffle: bool) -> np.ndarray:
    """Return the order of a part's rows in one of its epochs, int64 [n]."""
    return random_order(n, seed, (part + 1) * 2**32 + epoch) if shuffle else np.arange(n)


@dataclass(slots=True)
class PartBatches(Batches):
    """Each part has its own epochs: a batch never mixes two parts, and an epoch's last batch may be short."""

    def part_rows(self, part: int, members: np.ndarray, batch: int) -> list[int]:
        """Return the rows of batch ``batch`` (from 0) of a part whose rows are ``members``, int64 [n]."""
        size = self.global_batch_size
        epoch, position = divmod(batch, steps_per_epoch(len(members), size))
        chosen = part_order(part, epoch, len(members), self.seed, self.shuffle)
        return members[chosen[position * size : (position + 1) * size]].tolist()

    def stretches(self, steps: int) -> Iterator[Sequence[Sequence[int]]]:
        for first in range(0, steps, 1024):
            yield [self.rows(step) for step in range(first, min(first + 1024, steps))]


@dataclass(slots=True)
class TaskBatches(PartBatches):
    """Each step trains on one task. A round over the K tasks has every task once, in random order.

    A task keeps its turn for ``steps_each`` steps; the paper trains one task after the other. A row may be in several.
    """

    _: KW_ONLY
    tasks: Sequence[np.ndarray] = ()
    steps_each: int = 1

    def turn(self, step: int) -> tuple[int, int]:
        """Return the task of optimizer step ``step`` (from 0), and the number of steps that it had before."""
        turn, within = divmod(step, self.steps_each)
        round_, place = divmod(turn, len(self.tasks))
        task = part_order(_TASK_ORDER, round_, len(self.tasks), self.seed, self.shuffle)[place]
        return int(task), round_ * self.steps_each + within

    def rows(self, step: int) -> list[int]:
        task, before = self.turn(step)
        return self.part_rows(task, self.tasks[task], before)


class AdaptHook(TrainingHook):
    """At the end of a run, adapts to each held-out task from the trained vectors, then restores them.

    Support rows get ``training.adapt_steps`` steps with a fresh optimizer and a constant rate; query rows are scored.
    """

    def finish(self, training: Any) -> dict[str, Any]:
        """Adapt to each held-out task. ``loss_before`` and ``loss_after`` are of its query rows; None if not finite."""
        found = [_adapted(training, name, rows) for name, rows in training.datasets.set_aside.items()]
        return {"adaptation": found} if found else {}


def _adapted(loop: Any, name: str, rows: Rows) -> dict[str, Any]:
    recipe, vectors, model = loop.recipe, trained_vectors(loop.model), loop.model
    training, data, batches = recipe.training, recipe.data, loop.batches
    support, query = split_rows(rows, training.adapt_rows, data.seed)
    query = query[: data.eval_limit]
    # Each task starts from what the run has trained, so that is kept and put back at the end.
    trained = {key: vector.detach().clone() for key, vector in vectors.items()}
    # A task may have fewer rows than a batch.
    sizes = min(training.global_batch_size, len(support)), min(training.per_device_train_batch_size, batches.pass_rows)
    own_batches = Batches(lengths_of(support), *sizes, pack_tokens=batches.pack_tokens, seed=data.seed)
    rate = training.adapt_learning_rate or training.learning_rate
    adapting = recipe.replace(training=training.replace(learning_rate=rate))
    own = method_of(recipe.adapter).optimizer(model, adapting)
    optimizer = own or build_optimizer(adapting.training, vectors, rate_factors(model, recipe))
    datasets = dataclasses.replace(loop.datasets, train=support, eval=query)
    inner = loop.branch(datasets, own_batches, optimizer, LambdaLR(optimizer, lambda _: 1.0))

    def query_loss() -> float:
        with held_out.scoring(model):
            return inner.held_out_loss()["loss"]

    before, after = None, None
    try:
        before = query_loss()
        model.train()
        while inner.state.step < training.adapt_steps:
            inner.train_step()
        after = query_loss()
        loop.session.console.print(
            f"Held-out task {name}: loss {before:.4f}, after {inner.state.step} steps {after:.4f}"
        )
    except NotFinite as error:  # the run itself is whole, and its adapter is written
        loop.warn(f"Held-out task {name}: {error} It has no loss afterwards. Lower training.adapt_learning_rate.")
    finally:
        inner.engine.undo()  # a step whose loss was not finite leaves its gradients
        with torch.no_grad():
            for key, vector in vectors.items():
                vector.copy_(trained[key])
    losses = {"loss_before": before, "loss_after": after}
    return {"task": name, "support_rows": len(support), "query_rows": len(query), **losses}


def split_rows(rows: Rows, support_rows: int, seed: int) -> tuple[Rows, Rows]:
    """Divide a task's rows into support and query rows, drawn by ``seed``: at most half are support rows."""
    drawn = random_order(len(rows), seed, -1)
    count = max(1, min(support_rows, len(rows) // 2))
    return rows.take(np.sort(drawn[:count])), rows.take(np.sort(drawn[count:]))
