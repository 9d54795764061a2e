"""The batches of a recipe: which rows its steps train on, and how many steps there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qvera.config import plugins
from qvera.data.rows import lengths_of
from qvera.data.sampler import Batches, steps_per_epoch

if TYPE_CHECKING:
    from qvera.config.schema import Recipe
    from qvera.data.adapter_rows import AdapterRows
    from qvera.data.dataset import Datasets
    from qvera.data.rows import Example


def batches_of(recipe: Recipe, rows: Sequence[Example]) -> Batches:
    """The batches of a run over its training rows.

    Raises:
        InputError: there are too few rows for the schedule that the recipe asks for.
    """
    data, training = recipe.data, recipe.training
    sizes = lengths_of(rows), training.global_batch_size, training.per_device_train_batch_size
    common: dict[str, Any] = {
        "pack_tokens": data.max_length if data.packing else None,
        "seed": data.seed,
        "shuffle": data.shuffle,
    }
    for schedule in plugins.schedules():
        if (batches := schedule.batches(recipe, rows, sizes, common)) is not None:
            return batches
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
