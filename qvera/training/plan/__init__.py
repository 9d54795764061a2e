"""Know before you run: bytes, seconds and files of a recipe, from the model's config alone.

Order of reading: `shapes` (config → shapes), `machine` (where it would run), `activations` (one decoder layer), `memory` (the whole
run), `ranks` (one of several processes), `batches` (its longest forward pass), `seconds`, `files`, `fits` (what would make it fit),
`say` and `table`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from qvera.config.schema import Recipe
from qvera.data import CutRows, Example, lengths_of
from qvera.data.padding import repeats
from qvera.models.loader import takes_prefix_once
from qvera.models.model_config import empty_model
from qvera.models.tokenizer import ids_of, load_tokenizer
from qvera.training.plan.activations import Batch
from qvera.training.plan.alternatives import BatchOf, Change, fits, nearest_changes
from qvera.training.plan.batches import assumed_batch, batch_of, longest_rows, planned_steps, token_counts
from qvera.training.plan.file_sizes import adapter_bytes, checkpoint_bytes
from qvera.training.plan.machine import Machine, gpu_machine, parse_size, this_machine
from qvera.training.plan.memory import Memory, numbers, plan_memory, setting, trained_shapes
from qvera.training.plan.shapes import Shape, shape_of
from qvera.training.plan.sharding import ALONE, Sharing, Way, passes_of, plan_rank, plan_ways, right_way
from qvera.training.plan.timing import calibrate, step_seconds
from qvera.utils.errors import InputError

__all__ = [
    "ALONE", "Batch", "Change", "Machine", "Memory", "Plan", "Shape", "Sharing", "Way", "gpu_machine", "longest_rows", "make_plan",
    "parse_size", "plan_memory", "plan_ways", "planned_steps", "right_way", "shape_of", "this_machine", "time_step",
]  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What a run will take, and what would make it fit where it does not.

    Attributes:
        batch: the longest forward pass.
        memory: of one rank.
        changes: empty where the run fits.
        joinable: rows of a batch may be joined behind their common prefix.
        sharing: how the ranks share the model.
        seconds: parts of an optimizer step; None where nothing was timed.
        ways: every way of sharing it, where that was asked for.
    """

    shape: Shape
    machine: Machine
    batch: Batch
    memory: Memory
    adapter_bytes: int
    checkpoint_bytes: int
    trained_numbers: int
    changes: list[Change]
    joinable: bool
    sharing: Sharing = ALONE
    seconds: dict[str, float] | None = None
    ways: tuple[Way, ...] = ()

    @property
    def fits(self) -> bool:
        return fits(self.memory, self.machine)

    def to_dict(self) -> dict[str, Any]:
        """As JSON: the output of ``qvera plan --json`` and the ``plan`` object of run.json."""
        found = {
            "device": self.machine.name,
            "device_type": self.machine.device_type,
            "compute_dtype": str(self.machine.dtype).removeprefix("torch."),
            "available_bytes": self.machine.available_bytes,
            "fits": self.fits,
            "batch": {"rows": self.batch.rows, "tokens": self.batch.tokens, "source": self.batch.source},
            "parameters": self.shape.parameters,
            "trained_numbers": self.trained_numbers,
            "memory": self.memory.to_dict(),
            "adapter_bytes": self.adapter_bytes,
            "checkpoint_bytes": self.checkpoint_bytes,
            "step_seconds": None if self.seconds is None else sum(self.seconds.values()),
            "step_seconds_parts": self.seconds,
            "changes": [{"set": c.settings, "total_bytes": c.total_bytes, "fits": c.fits} for c in self.changes],
            "processes": {
                "deepspeed": self.sharing.word,
                "nodes": self.sharing.nodes,
                "per_node": self.sharing.per_node,
            },
        }
        if self.ways:
            way, why = right_way(list(self.ways), self.machine)
            found["ways"] = [one.to_dict() for one in self.ways]
            found["right_way"] = {"deepspeed": None if way is None else way.sharing.word, "why": why}
        return found


def make_plan(
    recipe: Recipe,
    machine: Machine | torch.device,
    rows: Sequence[Example] | None = None,
    sharing: Sharing = ALONE,
    every_way: bool = False,
) -> Plan:
    """Plan a run from its recipe and the base model's config; no weights are read.

    Args:
        machine: what to plan for; a device: this process's own machine, with what it holds now.
        rows: the training rows where they are at hand; without them every row is taken to be ``data.max_length`` long.
        sharing: how many ranks there are and what each holds; the plan is that of one of them.
        every_way: plan the other ways of sharing on as many ranks too.

    Raises:
        InputError: the config can't be read, it is no decoder of linears, or a target matches nothing.
    """
    with torch.random.fork_rng(devices=[]):
        model = empty_model(recipe.model)
    shape = _grown(shape_of(model), recipe)
    attention = recipe.model.attn_implementation
    joinable = recipe.data.prefix_once and attention != "flash_attention_2" and takes_prefix_once(model)
    del model
    if isinstance(machine, torch.device):
        machine = this_machine(recipe.model, machine)
    longest = _batches(rows, joinable, repeats(machine.dtype, machine.device_type))
    batch = longest(recipe)
    memory = plan_rank(shape, recipe, batch, machine, sharing)
    trained = sum(numbers(trained_shapes(shape.adapted(recipe.adapter.targets), recipe.adapter)))
    changes = [] if fits(memory, machine) else nearest_changes(shape, recipe, longest, machine, sharing)
    return Plan(
        shape,
        machine,
        batch,
        memory,
        adapter_bytes(shape, recipe),
        checkpoint_bytes(shape, recipe),
        trained,
        changes,
        joinable,
        sharing,
        ways=tuple(plan_ways(shape, recipe, batch, machine, sharing.nodes, sharing.per_node)) if every_way else (),
    )


def _grown(shape: Shape, recipe: Recipe) -> Shape:
    """With the rows that added tokens need beyond those the checkpoint has; all of them where the tokenizer is out of reach."""
    tokens = recipe.model.added_tokens
    if not tokens:
        return shape
    try:
        last = max(ids_of(load_tokenizer(recipe.model), tokens).values())
    except InputError:
        last = shape.vocabulary + len(tokens) - 1
    grown = max(0, last + 1 - shape.vocabulary)
    more = grown * shape.hidden * (1 if shape.tied else 2)
    return replace(
        shape, vocabulary=shape.vocabulary + grown, dense_numbers=shape.dense_numbers + more, grown_rows=grown
    )


def _batches(rows: Sequence[Example] | None, joinable: bool, repeating: bool) -> BatchOf:
    """The longest batch over these rows, remembered by what it depends on."""
    if rows is None:
        return assumed_batch

    found: dict[tuple[int, int], Batch] = {}

    def longest(recipe: Recipe) -> Batch:
        key = recipe.data.max_length, recipe.training.per_device_train_batch_size
        if key not in found:
            short = int(lengths_of(rows).max()) <= key[0]
            cut = rows if short else CutRows(rows, key[0])
            steps = max(1, planned_steps(recipe, len(cut)))
            chosen = longest_rows(recipe, cut, joinable, steps)
            batch = batch_of([cut[i] for i in chosen], joinable, recipe.data.packing, repeating)
            found[key] = replace(batch, token_counts=token_counts(recipe, cut, steps, repeating))
        return found[key]

    return longest


def time_step(plan: Plan, recipe: Recipe, device: torch.device) -> dict[str, float]:
    """Seconds of one optimizer step in parts, from a calibration of ``device`` (2 to 5 seconds).

    With several ranks: of one on a device like this one for each, without what the network takes.
    """
    a = setting(plan.shape, recipe, plan.batch, plan.machine)
    times = passes_of(recipe, plan.sharing.world_size, plan.batch.packed_rows)
    return step_seconds(a, recipe, calibrate(a, recipe, device), times)
