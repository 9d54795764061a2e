"""Changes to a recipe that make a run fit: one key with its mildest value, or several keys together."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from qvera.config.schema import Recipe
from qvera.models.checkpointing import Mode
from qvera.training.plan.checkpointing import modes_of
from qvera.training.plan.longest import BatchOf, pass_rows
from qvera.training.plan.run import PlannedRun
from qvera.training.plan.sharding import plan_rank
from qvera.utils.errors import InputError

_SHORTEST_TOKENS, _SMALLEST_RANK, _SMALLEST_CHUNK = 64, 8, 32


@dataclass(frozen=True)
class Change:
    """Keys of the recipe with their new values, and what the plan then comes to."""

    settings: dict[str, Any]
    total_bytes: int
    fits: bool

    def __str__(self) -> str:
        """As the command line takes them, quoted for a shell. JSON is YAML."""
        return " ".join("--set " + shlex.quote(f"{key}={json.dumps(value)}") for key, value in self.settings.items())


def changed(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """The recipe with ``section.key`` values replaced."""
    for key, value in settings.items():
        section, _, name = key.partition(".")
        part = getattr(recipe, section).replace(**{name: value})
        recipe = recipe.replace(**{section: part})
    return recipe


def nearest_changes(run: PlannedRun, batch_of: BatchOf) -> list[Change]:
    """Single changes that make the recipe fit, the mildest value of each; where no single one does, they are added up.

    The last resort, all changes at their extreme, is given even where it does not fit.
    """

    def tried(settings: dict[str, Any]) -> Change | None:
        try:
            other = changed(run.recipe, settings)
        except InputError:  # the recipe's task or objective has no such key, or does not take the value
            return None
        memory = plan_rank(replace(run, recipe=other, batch=batch_of(other)))
        return Change(settings, memory.total_bytes, memory.needed_bytes(run.machine) <= run.machine.available_bytes)

    steps = list(_steps(run))
    alone = ((tried({key: value}) for value in values) for key, values in steps)
    found = [next((change for change in of_key if change is not None and change.fits), None) for of_key in alone]
    if any(found):
        return [change for change in found if change is not None]
    last: Change | None = None
    for key, values in steps:
        for value in values:
            together = tried({**(last.settings if last else {}), key: value})
            last = together or last
            if last is not None and last.fits:
                return [last]
    return [] if last is None else [last]


def _steps(run: PlannedRun) -> Iterator[tuple[str, list[Any]]]:
    """Each key that saves memory, with ever smaller values; in the order of what it costs the result of a run."""
    training, data, adapter = run.recipe.training, run.recipe.data, run.recipe.adapter
    rows = pass_rows(run.recipe)
    fewer_rows = [n for n in range(rows - 1, 0, -1) if training.global_batch_size % n == 0]
    if data.has_adapters:  # whose rows are cut into passes together, which need not divide a step of one
        fewer_rows = _eighths(rows, 1)
    longest = data.max_length if run.batch.joined else min(data.max_length, run.batch.tokens)
    few = [name for name in ("q_proj", "v_proj") if any(x.role == name for x in run.shape.linears)]
    steps: dict[str, list[Any]] = {
        "training.gradient_checkpointing": _slower_modes(run),
        "model.stream": [True] if run.can_stream and not run.streams else [],
        "training.per_device_train_batch_size": [] if data.packing else fewer_rows,
        "training.loss_chunk_tokens": _halved(training.loss_chunk_tokens, _SMALLEST_CHUNK),
        "data.max_length": [n for n in _eighths(longest, 8) if n >= _SHORTEST_TOKENS],
        "adapter.rank": [r for r in _halved(adapter.rank, _SMALLEST_RANK) if r % adapter.b_groups == 0],
        "adapter.targets": [few] if len(few) == 2 and adapter.targets != few else [],
    }
    return ((key, values) for key, values in steps.items() if values)


def _slower_modes(run: PlannedRun) -> list[Mode]:
    modes = list(modes_of(run))
    return modes[modes.index(run.checkpointing) + 1 :]


def _halved(value: int, least: int) -> list[int]:
    return [value >> times for times in range(1, value.bit_length()) if value >> times >= least]


def _eighths(value: int, multiple: int) -> list[int]:
    """Down in steps of an eighth, rounded to a multiple."""
    found = [value]
    while found[-1] > multiple:
        found.append(min(found[-1] * 7 // 8 // multiple * multiple, found[-1] - multiple))
    return found[1:]
