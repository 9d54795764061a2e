"""The bank of a run of many adapters: how many slots it has, and what they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qvera.config.schema import Recipe

if TYPE_CHECKING:
    from qvera.training.plan.run import PlannedRun
    from qvera.training.plan.shape import Linear


def wanted_slots(recipe: Recipe, adapter_rows: Sequence[int] = ()) -> int:
    """How many adapters are in flight at most: those that the recipe says, or as many as fill a pass.

    Args:
        recipe: 0 where it trains one adapter.
        adapter_rows: the training rows of each adapter; where they are not known, each has enough for a whole step.
    """
    training = recipe.training
    if not recipe.data.has_adapters:
        return 0
    if training.adapters_at_once != "auto":
        return min(training.adapters_at_once, len(adapter_rows) or training.adapters_at_once)
    size, room = training.global_batch_size, training.per_device_train_batch_size
    if not adapter_rows:
        return max(1, room // size)
    return slots_to_fill([min(rows, size) for rows in adapter_rows], room)


def slots_to_fill(step_rows: Sequence[int], pass_rows: int) -> int:
    """How many adapters, whose steps have so many rows each, fill a pass of ``pass_rows`` rows at most; at least one.

    Those of few rows may all be in flight together, so they count.
    """
    slots = 0
    for rows in sorted(step_rows):
        pass_rows -= rows
        if pass_rows < 0:
            break
        slots += 1
    return max(1, slots)


def slot_bytes(run: PlannedRun) -> int:
    """Bytes of one slot: vectors, and of those that are trained the gradient and AdamW's two moments, all fp32.

    The vectors of the best step (``training.load_best_model_at_end``) are kept in RAM.
    """
    best = run.recipe.training.load_best_model_at_end and not run.machine.on_gpu
    return 4 * sum(run.vector_sizes()) * (2 if best else 1) + 12 * sum(run.vector_sizes(trained_only=True))


def with_fitting_slots(run: PlannedRun, needed_bytes: int) -> PlannedRun:
    """The run with as many of its slots as memory allows, at least one; as it is where the recipe says how many."""
    excess = needed_bytes - run.machine.available_bytes
    if excess <= 0 or not run.slots or run.recipe.training.adapters_at_once != "auto":
        return run
    return replace(run, slots=max(1, run.slots - -(-excess // slot_bytes(run))))


def row_bytes(run: PlannedRun, x: Linear) -> int:
    """What autograd keeps of one linear for the adapters of a pass, in fp32 (`qvera.adapters.products.slots`)."""
    numbers = run.rank + run.recipe.adapter.b_groups * x.m + (x.n if run.recipe.adapter.input_scale else 0)
    return 4 * min(run.slots, run.recipe.training.per_device_train_batch_size) * numbers


def row_product_bytes(run: PlannedRun, x: Linear) -> int:
    """The most that one linear's products take for the moment: z scaled, u, and in fp32 what is added up."""
    return run.batch.all_tokens * (x.m * (run.itemsize + 4) + 2 * run.rank * run.itemsize)
