"""Changes to a recipe that does not fit: the nearest ones that make it fit, each with its new total."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from qvera.config.schema import Recipe
from qvera.training.plan.activations import Batch
from qvera.training.plan.machine import Machine
from qvera.training.plan.memory import Memory
from qvera.training.plan.shapes import Shape
from qvera.training.plan.sharding import ALONE, Sharing, plan_rank

BatchOf = Callable[[Recipe], Batch]
"""The longest batch of a (changed) recipe."""

_SHORTEST_TOKENS, _SMALLEST_RANK, _SMALLEST_CHUNK = 64, 8, 32


@dataclass(frozen=True)
class Change:
    """Keys of the recipe with their new values, and what the plan then comes to."""

    settings: dict[str, Any]
    total_bytes: int
    fits: bool

    def arguments(self) -> str:
        """As the command line takes them, quoted for a shell."""
        return " ".join("--set " + shlex.quote(f"{key}={_yaml(value)}") for key, value in self.settings.items())

    def __str__(self) -> str:
        return ", ".join(f"{key}={_yaml(value)}" for key, value in self.settings.items())


def fits(memory: Memory, machine: Machine) -> bool:
    """On a GPU everything has to fit; on a CPU what is private: mapped pages are dropped and read again."""
    needed = memory.total_bytes if machine.device_type == "cuda" else memory.private_bytes
    return needed <= machine.available_bytes


def changed(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """The recipe with ``section.key`` values replaced."""
    for key, value in settings.items():
        section, _, name = key.partition(".")
        part = getattr(recipe, section).replace(**{name: value})
        recipe = recipe.replace(**{section: part})
    return recipe


def nearest_changes(
    shape: Shape, recipe: Recipe, batch_of: BatchOf, machine: Machine, sharing: Sharing = ALONE
) -> list[Change]:
    """Single changes that make the recipe fit, the mildest value of each; where no single one does, they are added up.

    The last resort, all changes at their extreme, is given even where it does not fit.
    """

    def tried(settings: dict[str, Any]) -> Change:
        other = changed(recipe, settings)
        memory = plan_rank(shape, other, batch_of(other), machine, sharing)
        return Change(settings, memory.total_bytes, fits(memory, machine))

    found: list[Change] = []
    together: dict[str, Any] = {}
    for key, values in _ways(shape, recipe, batch_of(recipe)):
        hit = next((change for value in values if (change := tried({key: value})).fits), None)
        if hit is not None:
            found.append(hit)
    if found:
        return found
    last: list[Change] = []
    for key, values in _ways(shape, recipe, batch_of(recipe)):
        for value in values:
            last = [tried({**together, key: value})]
            if last[0].fits:
                return last
        together[key] = values[-1]
    return last


def _ways(shape: Shape, recipe: Recipe, batch: Batch) -> Iterator[tuple[str, list[Any]]]:
    """Each key that saves memory, with ever smaller values; in the order of what it costs the result of a run."""
    training = recipe.training
    if not training.gradient_checkpointing:
        yield "training.gradient_checkpointing", [True]
    size = training.per_device_train_batch_size
    smaller = [n for n in range(size - 1, 0, -1) if training.global_batch_size % n == 0]
    if smaller:
        yield "training.per_device_train_batch_size", smaller
    chunks = _halved(training.loss_chunk_tokens, _SMALLEST_CHUNK)
    if chunks:
        yield "training.loss_chunk_tokens", chunks
    longest = recipe.data.max_length if batch.joined else min(recipe.data.max_length, batch.tokens)
    lengths = [n for n in _eighths(longest) if n >= _SHORTEST_TOKENS]
    if lengths:
        yield "data.max_length", lengths
    ranks = [r for r in _halved(recipe.adapter.rank, _SMALLEST_RANK) if r % recipe.adapter.b_groups == 0]
    if ranks:
        yield "adapter.rank", ranks
    few = [name for name in ("q_proj", "v_proj") if any(x.role == name for x in shape.linears)]
    if len(few) == 2 and recipe.adapter.targets != few:
        yield "adapter.targets", [few]


def _halved(value: int, least: int) -> list[int]:
    found = []
    while value // 2 >= least:
        value //= 2
        found.append(value)
    return found


def _eighths(length: int) -> list[int]:
    """Down in steps of an eighth, rounded to 8 tokens."""
    found = [length]
    while found[-1] > 8:
        found.append(min(int(found[-1] * 7 / 8) // 8 * 8, found[-1] - 8))
    return found[1:]


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(value)}]" if isinstance(value, list) else str(value)
