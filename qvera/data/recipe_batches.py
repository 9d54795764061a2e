"""The batches of a recipe: which rows its steps train on, and how many steps there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qvera.data.parts import BilevelBatches, TaskBatches
from qvera.data.rows import lengths_of
from qvera.data.sampler import Batches, steps_per_epoch
from qvera.data.sampling_by_task import task_rows
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from qvera.config.schema import Recipe
    from qvera.data.adapter_rows import AdapterRows
    from qvera.data.dataset import Datasets
    from qvera.data.rows import Example


def batches_of(recipe: Recipe, rows: Sequence[Example]) -> Batches:
    """The batches of a run over its training rows.

    Raises:
        InputError: there are too few rows for ``training.bilevel``.
    """
    data, training = recipe.data, recipe.training
    sizes = lengths_of(rows), training.global_batch_size, training.per_device_train_batch_size
    common: dict[str, Any] = {
        "pack_tokens": data.max_length if data.packing else None,
        "seed": data.seed,
        "shuffle": data.shuffle,
    }
    task_of = getattr(rows, "task_of", None)
    if task_of is not None:
        return TaskBatches(*sizes, **common, tasks=task_rows(data, task_of), steps_each=data.task_steps)
    if training.bilevel:
        if len(rows) < 2:
            raise InputError("training.bilevel: cuts the rows into two parts, and there is one row. Remove it.")
        steps = planned_steps(recipe, len(rows))
        retraining = round(steps * training.bilevel_retrain)
        return BilevelBatches(
            *sizes,
            **common,
            upper_share=training.bilevel_share,
            lower_steps=training.bilevel_lower_steps,
            upper_steps=training.bilevel_upper_steps,
            retrain_from=steps - retraining if retraining else None,
        )
    return Batches(*sizes, **common, by_length=data.group_by_length)


def adapter_batches(recipe: Recipe, datasets: Datasets, adapter: AdapterRows) -> Batches:
    """The batches of one of many adapters: what a recipe of its rows alone would have.

    Row i of a batch is row ``adapter.train[i]`` of ``datasets.train``.
    """
    data, training = recipe.data, recipe.training
    lengths = datasets.train.lengths[adapter.train]
    sizes = training.global_batch_size, training.per_device_train_batch_size
    return Batches(lengths, *sizes, seed=data.seed, shuffle=data.shuffle, by_length=data.group_by_length)


def planned_steps(recipe: Recipe, rows: int) -> int:
    """Optimizer steps of a run over that many training rows."""
    training = recipe.training
    per_epoch = steps_per_epoch(rows, training.global_batch_size)
    return training.max_steps if training.max_steps >= 0 else math.ceil(training.num_train_epochs * per_epoch)
