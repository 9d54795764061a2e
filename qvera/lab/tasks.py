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

from qvera.adapters.files.save_load import rate_factors
from qvera.adapters.hooks import TrainingHook
from qvera.adapters.methods import method_of
from qvera.config.plugins import Schedule
from qvera.data.rows import Rows, concatenated, lengths_of
from qvera.data.sampler import Batches, random_order, steps_per_epoch
from qvera.evaluation import held_out
from qvera.training.engine import trained_vectors
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
    """The names of the trained tasks, and the rows of held-out ones, which are taken out of their sources.

    Training rows get their task's number (`Rows.part_of`). InputError if tasks or ``data.held_out_tasks`` do not fit.
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
        source.train.part_of = np.array([number_of[n] for n in train_names if n in number_of], dtype=np.int64)
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
    """Names for sources as tasks: their paths. Where paths repeat, config, split or a number is added."""
    paths = [about.path for about in sections]
    names = [
        path if paths.count(path) == 1 else " ".join(filter(None, (path, about.config_name, about.split)))
        for path, about in zip(paths, sections, strict=True)
    ]
    return [name if names.count(name) == 1 else f"{name} {number}" for number, name in enumerate(names, start=1)]


def held_out_names(section: Any, names: Sequence[str]) -> list[str]:
    """The tasks that ``data.held_out_tasks`` takes out of training; InputError if it does not fit."""
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
    """``count`` tasks, each of ``size`` labels that are drawn without replacement from every set of ``labels``.

    As in MultitaskFinetuneDataset of arXiv 2203.04904: all tasks of the first set are drawn from Python's generator,
    then those of the second, and so on. Task k is the union of each set's task k.
    """
    chooser = random.Random(seed)
    drawn = [[chooser.sample(list(names), size) for _ in range(count)] for names in labels]
    return [[name for tasks in drawn for name in tasks[k]] for k in range(count)]


def task_rows(section: Any, task_of: np.ndarray) -> list[np.ndarray]:
    """The rows of each task, int64. ``task_of`` [n] is each row's task, or its label with ``data.task_labels``."""
    members = [np.flatnonzero(task_of == number) for number in range(int(task_of.max()) + 1)]
    if section.task_labels is None or section.task_count is None:
        return [rows for rows in members if len(rows)]
    names = [str(number) for number in range(len(members))]
    tasks = label_tasks([names], section.task_count, section.task_labels, section.seed)
    return [np.sort(np.concatenate([members[int(name)] for name in task])) for task in tasks]


_TASK_ORDER, LEVELS = 2**30, 2**30 + 1
"""Numbers for drawing the order of tasks and the split into levels; parts of rows have lower numbers."""
_STRETCH_STEPS = 1024


@functools.lru_cache(maxsize=8)
def part_order(part: int, epoch: int, n: int, seed: int, shuffle: bool) -> np.ndarray:
    """int64 [n]: the order of a part's rows in one of its epochs."""
    return random_order(n, seed, (part + 1) * 2**32 + epoch) if shuffle else np.arange(n)


@dataclass(slots=True)
class PartBatches(Batches):
    """Each part has its own epochs: a batch never mixes two parts, and an epoch's last batch may be short."""

    def part_rows(self, part: int, members: np.ndarray, batch: int) -> list[int]:
        """Batch ``batch`` (from 0) of a part whose rows are ``members`` int64 [n]."""
        size = self.global_batch_size
        epoch, position = divmod(batch, steps_per_epoch(len(members), size))
        chosen = part_order(part, epoch, len(members), self.seed, self.shuffle)
        return members[chosen[position * size : (position + 1) * size]].tolist()

    def stretches(self, steps: int) -> Iterator[Sequence[Sequence[int]]]:
        for first in range(0, steps, _STRETCH_STEPS):
            yield [self.rows(step) for step in range(first, min(first + _STRETCH_STEPS, steps))]


@dataclass(slots=True)
class TaskBatches(PartBatches):
    """Each step trains on one task. A round over the K tasks has every task once, in random order.

    A task keeps its turn for ``steps_each`` steps; the paper trains one task after the other. A row may be in several.
    """

    _: KW_ONLY
    tasks: Sequence[np.ndarray] = ()
    steps_each: int = 1

    def turn(self, step: int) -> tuple[int, int]:
        """The task of optimizer step ``step`` (from 0), and how many steps this task had before."""
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
        """``loss_before`` and ``loss_after`` are of the query rows. None: a loss was not finite."""
        found = [_adapted(training, name, rows) for name, rows in training.datasets.set_aside.items()]
        return {"adaptation": found} if found else {}


def _adapted(loop: Any, name: str, rows: Rows) -> dict[str, Any]:
    recipe, vectors = loop.recipe, trained_vectors(loop.model)
    training, data = recipe.training, recipe.data
    support, query = split_rows(rows, training.adapt_rows, data.seed)
    query = query[: data.eval_limit]
    rate = training.adapt_learning_rate or training.learning_rate
    trained = {name: vector.detach().clone() for name, vector in vectors.items()}
    size = min(training.global_batch_size, len(support))
    pass_rows = min(training.per_device_train_batch_size, loop.batches.pass_rows)
    pack_tokens = loop.batches.pack_tokens
    batches = Batches(lengths_of(support), size, pass_rows, pack_tokens=pack_tokens, seed=data.seed)
    adapting = recipe.replace(training=training.replace(learning_rate=rate))
    own = method_of(recipe.adapter).optimizer(loop.model, adapting)
    optimizer = own or build_optimizer(adapting.training, vectors, rate_factors(loop.model, recipe))
    datasets = dataclasses.replace(loop.datasets, train=support, eval=query)
    inner = loop.branch(datasets, batches, optimizer, LambdaLR(optimizer, lambda _: 1.0))
    after: float | None = None
    try:
        before = _query_loss(inner)
        loop.model.train()
        while inner.state.step < training.adapt_steps:
            inner.train_step()
        after = _query_loss(inner)
    except NotFinite as error:  # the run itself is whole, and its adapter is written
        loop.warn(f"Held-out task {name}: {error} It has no loss afterwards. Lower training.adapt_learning_rate.")
    finally:
        inner.engine.undo()  # a step whose loss was not finite leaves its gradients
        with torch.no_grad():
            for key, vector in vectors.items():
                vector.copy_(trained[key])
    if after is not None:
        steps = training.adapt_steps
        loop.console.print(f"Held-out task {name}: loss {before:.4f}, after {steps} steps {after:.4f}")
    sizes = {"support_rows": len(support), "query_rows": len(query)}
    return {"task": name, **sizes, "loss_before": before, "loss_after": after}


def split_rows(rows: Rows, support_rows: int, seed: int) -> tuple[Rows, Rows]:
    """Support and query rows of a task, drawn by ``seed``: at most half are support rows."""
    drawn = random_order(len(rows), seed, -1)
    count = max(1, min(support_rows, len(rows) // 2))
    return rows.take(np.sort(drawn[:count])), rows.take(np.sort(drawn[count:]))


def _query_loss(loop: Any) -> float:
    with held_out.scoring(loop.model):
        return loop.held_out_loss()["loss"]
