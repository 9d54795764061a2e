"""The plan of a run: longest batch, memory, files and time, computed from the model's config and the recipe."""

import json
import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from qvera.config.schema import Recipe
from qvera.data import Example, Rows, batches_of, collate_prefix_once, steps_per_epoch
from qvera.data.collate import round_up_length, rounds_lengths
from qvera.models.attention import needs_padding_mask
from qvera.models.loader import takes_prefix_once
from qvera.models.model_config import empty_model
from qvera.models.tokenizer import ids_of, load_tokenizer
from qvera.training.plan.memory import RANDOM_STATE_BYTES, Memory
from qvera.training.plan.run import Batch, Machine, PlannedRun, Shape, shape_of, this_machine
from qvera.training.plan.sharding import ALONE, Sharing, Way, plan_rank, plan_ways, right_way
from qvera.utils.errors import InputError

_CONFIG_BYTES = 800  # adapter_config.json
_STATE_BYTES = 1_500  # state.json without the recipe and the steps' own results, and manifest.json
_SHORTEST_TOKENS, _SMALLEST_RANK, _SMALLEST_CHUNK = 64, 8, 32
_CANDIDATES = 200
"""How many of the longest forward passes are looked at closely."""


BatchOf = Callable[[Recipe], Batch]
"""The longest batch of a (changed) recipe."""

REFUSED_ABOVE, TIGHT_ABOVE = 1.15, 0.92
"""Shares of a GPU's memory. A plan above the first is refused. Between the two the trial of the longest batch decides:
what the allocator loses to fragmentation is in no plan, and neither is what other processes give back."""


@dataclass(frozen=True)
class Change:
    """Keys of the recipe with their new values, and what the plan then comes to."""

    settings: dict[str, Any]
    total_bytes: int
    fits: bool

    def __str__(self) -> str:
        """As the command line takes them, quoted for a shell. JSON is YAML."""
        return " ".join("--set " + shlex.quote(f"{key}={json.dumps(value)}") for key, value in self.settings.items())


@dataclass(frozen=True)
class Plan(PlannedRun):
    """What a run will take, and what would make it fit where it does not."""

    memory: Memory  # of one rank
    changes: list[Change]  # empty where the run fits
    sharing: Sharing = ALONE
    ways: tuple[Way, ...] = ()  # every way of sharing the model, where that was asked for
    seconds: dict[str, float] | None = None  # parts of an optimizer step; None where nothing was timed

    @property
    def needed_bytes(self) -> int:
        """See `Memory.needed_bytes`."""
        return self.memory.needed_bytes(self.machine)

    @property
    def fits(self) -> bool:
        """Whether the machine has the memory."""
        return self.needed_bytes <= self.machine.available_bytes

    @property
    def is_refused(self) -> bool:
        """Whether a run must not start: a GPU is too small by more than a plan can be wrong. RAM has swap behind it."""
        return self.machine.on_gpu and self.needed_bytes > REFUSED_ABOVE * self.machine.available_bytes

    @property
    def is_tight(self) -> bool:
        """Whether the run may or may not fit on the GPU, as far as a plan can tell."""
        limit = TIGHT_ABOVE * self.machine.available_bytes
        return self.machine.on_gpu and self.needed_bytes > limit and not self.is_refused

    @property
    def trained_parameters(self) -> int:
        """How many parameters are trained."""
        return sum(self.vector_sizes(trained_only=True))

    @cached_property
    def adapter_bytes(self) -> int:
        """The adapter directory: vectors in fp32 and their config."""
        return _file_bytes(self.vector_shapes(), {"format": "pt"}) + _CONFIG_BYTES

    @cached_property
    def checkpoint_bytes(self) -> int:
        """A checkpoint: vectors, AdamW's state of those that are trained, random state, position, recipe."""
        state: dict[str, tuple[int, ...]] = {}
        for name, size in self.vector_shapes(trained_only=True).items():
            state |= {f"{name}/exp_avg": size, f"{name}/exp_avg_sq": size, f"{name}/step": ()}
        written = len(json.dumps({"recipe": self.recipe.to_dict()}, indent=1)) + _STATE_BYTES + RANDOM_STATE_BYTES
        return _file_bytes(self.vector_shapes()) + _file_bytes(state) + written

    def measured(self, private_bytes: int, mapped_bytes: int) -> dict[str, Any]:
        """A run's measured peak and mapped pages as JSON, and the plan's error relative to them.

        On a CPU private memory is sampled; on CUDA it is what torch allocated, without the CUDA context.
        """
        context = sum(c.bytes for c in self.memory.peak if c.kind == "runtime") if self.machine.on_gpu else 0
        predicted, total = self.memory.total_bytes - context, private_bytes + mapped_bytes
        return {
            "private_bytes": private_bytes,
            "mapped_bytes": mapped_bytes,
            "total_bytes": total,
            "predicted_bytes": predicted,
            "relative_error": predicted / total - 1 if total else None,
        }

    def to_dict(self) -> dict[str, Any]:
        """As JSON: the output of ``qvera plan --json`` and the ``plan`` object of run.json."""
        sharing = self.sharing
        found = {
            "device": self.machine.name,
            "device_type": self.machine.device_type,
            "compute_dtype": str(self.machine.dtype).removeprefix("torch."),
            "available_bytes": self.machine.available_bytes,
            "fits": self.fits,
            "batch": {"rows": self.batch.rows, "tokens": self.batch.tokens, "source": self.batch.source},
            "parameters": self.shape.parameters,
            "trained_numbers": self.trained_parameters,
            "memory": self.memory.to_dict(),
            "adapter_bytes": self.adapter_bytes,
            "checkpoint_bytes": self.checkpoint_bytes,
            "step_seconds": None if self.seconds is None else sum(self.seconds.values()),
            "step_seconds_parts": self.seconds,
            "changes": [{"set": c.settings, "total_bytes": c.total_bytes, "fits": c.fits} for c in self.changes],
            "processes": {"deepspeed": sharing.word, "nodes": sharing.nodes, "per_node": sharing.per_node},
        }
        if self.ways:
            way, why = right_way(self.ways, self.machine)
            found["ways"] = [one.to_dict() for one in self.ways]
            found["right_way"] = {"deepspeed": None if way is None else way.sharing.word, "why": why}
        return found


def _file_bytes(shapes: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None) -> int:
    """The size of a safetensors file of a few MB with these fp32 tensors."""
    return len(save({name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}, metadata))


def make_plan(
    recipe: Recipe,
    machine: Machine | torch.device,
    rows: Rows | None = None,
    sharing: Sharing = ALONE,
    every_way: bool = False,
) -> Plan:
    """Plan a run from its recipe and the base model's config; no weights are read.

    Args:
        machine: what to plan for; a device: this process's own machine, with what it holds now.
        rows: the training rows. Without them every row is assumed to be ``data.max_length`` long.
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
    masked = needs_padding_mask(model)
    del model
    if isinstance(machine, torch.device):
        machine = this_machine(recipe.model, machine)
    batch_of = _longest_batch(rows, joinable, rounds_lengths(machine.dtype, machine.device_type), masked)
    run = PlannedRun(shape, recipe, batch_of(recipe), machine)
    memory = plan_rank(run, sharing)
    fits = memory.needed_bytes(machine) <= machine.available_bytes
    changes = [] if fits else nearest_changes(run, batch_of, sharing)
    ways = tuple(plan_ways(run, sharing.nodes, sharing.per_node)) if every_way else ()
    return Plan(shape, recipe, run.batch, machine, memory, changes, sharing, ways)


def changed(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """The recipe with ``section.key`` values replaced."""
    for key, value in settings.items():
        section, _, name = key.partition(".")
        part = getattr(recipe, section).replace(**{name: value})
        recipe = recipe.replace(**{section: part})
    return recipe


def nearest_changes(run: PlannedRun, batch_of: BatchOf, sharing: Sharing = ALONE) -> list[Change]:
    """Single changes that make the recipe fit, the mildest value of each; where no single one does, they are added up.

    The last resort, all changes at their extreme, is given even where it does not fit.
    """

    def tried(settings: dict[str, Any]) -> Change:
        other = changed(run.recipe, settings)
        memory = plan_rank(replace(run, recipe=other, batch=batch_of(other)), sharing)
        return Change(settings, memory.total_bytes, memory.needed_bytes(run.machine) <= run.machine.available_bytes)

    steps = list(_steps(run))
    found = [next((change for value in values if (change := tried({key: value})).fits), None) for key, values in steps]
    if any(found):
        return [change for change in found if change is not None]
    last: list[Change] = []
    together: dict[str, Any] = {}
    for key, values in steps:
        for value in values:
            together[key] = value
            last = [tried(dict(together))]
            if last[0].fits:
                return last
    return last


def _steps(run: PlannedRun) -> Iterator[tuple[str, list[Any]]]:
    """Each key that saves memory, with ever smaller values; in the order of what it costs the result of a run."""
    training, data, adapter = run.recipe.training, run.recipe.data, run.recipe.adapter
    rows = training.per_device_train_batch_size
    longest = data.max_length if run.batch.joined else min(data.max_length, run.batch.tokens)
    few = [name for name in ("q_proj", "v_proj") if any(x.role == name for x in run.shape.linears)]
    steps: dict[str, list[Any]] = {
        "training.gradient_checkpointing": [] if training.gradient_checkpointing else [True],
        "training.per_device_train_batch_size": [
            n for n in range(rows - 1, 0, -1) if training.global_batch_size % n == 0
        ],
        "training.loss_chunk_tokens": _halved(training.loss_chunk_tokens, _SMALLEST_CHUNK),
        "data.max_length": [n for n in _eighths(longest) if n >= _SHORTEST_TOKENS],
        "adapter.rank": [r for r in _halved(adapter.rank, _SMALLEST_RANK) if r % adapter.b_groups == 0],
        "adapter.targets": [few] if len(few) == 2 and adapter.targets != few else [],
    }
    return ((key, values) for key, values in steps.items() if values)


def _halved(value: int, least: int) -> list[int]:
    return [value >> times for times in range(1, value.bit_length()) if value >> times >= least]


def _eighths(length: int) -> list[int]:
    """Down in steps of an eighth, rounded to 8 tokens."""
    found = [length]
    while found[-1] > 8:
        found.append(min(int(found[-1] * 7 / 8) // 8 * 8, found[-1] - 8))
    return found[1:]


def _grown(shape: Shape, recipe: Recipe) -> Shape:
    """The shape with the embedding rows that added tokens need.

    Tokens that the checkpoint already has rows for need none. Without a tokenizer every added token is counted.
    """
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


def _longest_batch(rows: Rows | None, joinable: bool, rounded: bool, masked: bool) -> BatchOf:
    """The longest batch over these rows, remembered by what it depends on."""
    if rows is None:
        return assumed_batch

    found: dict[tuple[int, int], Batch] = {}

    def longest(recipe: Recipe) -> Batch:
        key = recipe.data.max_length, recipe.training.per_device_train_batch_size
        if key not in found:
            cut = rows if int(rows.lengths.max()) <= key[0] else rows.cut(key[0])
            steps = max(1, planned_steps(recipe, len(cut)))
            chosen = longest_rows(recipe, cut, joinable, steps)
            batch = batch_of([cut[i] for i in chosen], joinable, recipe.data.packing, rounded, masked)
            found[key] = replace(batch, token_counts=token_counts(recipe, cut, steps, rounded))
        return found[key]

    return longest


def planned_steps(recipe: Recipe, rows: int) -> int:
    """Optimizer steps of a run over that many training rows."""
    training = recipe.training
    per_epoch = steps_per_epoch(rows, training.global_batch_size)
    return training.max_steps if training.max_steps >= 0 else math.ceil(training.num_train_epochs * per_epoch)


def assumed_batch(recipe: Recipe) -> Batch:
    """Every row at ``data.max_length``, none padded, all of it trained but what ``data.max_target_length`` excludes."""
    data, rows, tokens = recipe.data, recipe.training.per_device_train_batch_size, recipe.data.max_length
    source = f"data.max_length: {rows} x {tokens:,} tokens"
    targets = rows
    if data.packing:  # one full sequence; two rows in it, so that attention has a mask of its own
        source, rows, targets = f"data.max_length: packed into {tokens:,} tokens", 1, 2
    trained = rows * tokens
    if data.train_on != "all" and data.max_target_length:
        trained = min(targets * min(data.max_target_length, tokens), trained)
    return Batch(rows, tokens, trained, False, data.packing, source, tokens, 1 if data.packing else 0)


def longest_rows(recipe: Recipe, rows: Sequence[Example], joinable: bool, steps: int) -> list[int]:
    """The rows of the forward pass with the most tokens (padding included) among the first ``steps`` steps.

    ``joinable``: rows of a batch may be joined behind their common prefix (`qvera.data.collate`).
    """
    candidates: dict[tuple[int, ...], int] = {}
    for passes, row_tokens in _epochs(recipe, rows, steps):
        sizes = row_tokens * np.array([1 if recipe.data.packing else len(p) for p in passes], dtype=np.int64)
        for i in np.argsort(-sizes, kind="stable")[:_CANDIDATES]:
            candidates[tuple(passes[i])] = int(sizes[i])
    best, best_tokens = [], -1
    for members, padded in sorted(candidates.items(), key=lambda item: -item[1])[:_CANDIDATES]:
        if padded <= best_tokens:
            break  # joining only makes it less
        tokens = batch_of([rows[i] for i in members], joinable, recipe.data.packing).all_tokens
        if tokens > best_tokens:
            best, best_tokens = list(members), tokens
    return best


def token_counts(recipe: Recipe, rows: Sequence[Example], steps: int, rounded: bool) -> int:
    """How many different token counts the forward passes of ``steps`` steps have. Joined rows count as padded ones.

    ``rounded``: their lengths are rounded up (`qvera.data.collate`).
    """
    found: set[tuple[int, int]] = set()
    for passes, row_tokens in _epochs(recipe, rows, steps):
        tokens = [round_up_length(int(n)) for n in row_tokens] if rounded else row_tokens.tolist()
        found |= set(zip((1 if recipe.data.packing else len(p) for p in passes), tokens, strict=True))
    return max(1, len(found))


def _epochs(recipe: Recipe, rows: Sequence[Example], steps: int) -> Iterator[tuple[list[list[int]], np.ndarray]]:
    """The forward passes of the first ``steps`` steps, epoch by epoch, with the tokens of a row in each.

    With packing it is the tokens of the whole pass, and no pass has rows of two global batches.
    """
    data, batches = recipe.data, batches_of(recipe, rows)
    size = batches.global_batch_size
    for epoch in range(-(-steps // batches.per_epoch)):
        chosen = batches.epoch_order(epoch)[: (steps - epoch * batches.per_epoch) * size]
        # without packing a global batch is a multiple of a forward pass, so an epoch can be cut as a whole
        whole = size if data.packing else len(chosen)
        passes = [p for at in range(0, len(chosen), whole) for p in batches.cut(chosen[at : at + whole].tolist())]
        counts = np.array([len(p) for p in passes], dtype=np.int64)
        tokens = np.add if data.packing else np.maximum
        yield passes, tokens.reduceat(batches.lengths[chosen], np.cumsum(counts) - counts)
        if data.shuffle is False:
            break


def batch_of(
    examples: Sequence[Example], joinable: bool, packing: bool = False, rounded: bool = False, masked: bool = False
) -> Batch:
    """These rows as one forward pass, ``rounded`` as in `token_counts`, ``masked`` where padding needs a mask."""
    lengths = [len(e.input_ids) for e in examples]
    trained, rows, longest = sum(e.trained_tokens for e in examples), len(lengths), max(lengths)
    if (joinable or packing) and (joined := collate_prefix_once(examples, packing=packing)) is not None:
        joined_tokens = joined["input_ids"].shape[1]
        tokens = round_up_length(joined_tokens) if rounded else joined_tokens
        source = f"the longest batch of the data: {rows} rows joined into {tokens:,} tokens"
        return Batch(1, tokens, trained, False, True, source, longest, rows if packing else 0)
    tokens = round_up_length(longest) if rounded else longest
    source = f"the longest batch of the data: {rows} x {tokens:,} tokens"
    return Batch(rows, tokens, trained, masked and min(lengths) < longest, False, source, longest)
