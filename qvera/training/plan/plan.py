"""The plan of a run from its recipe and the model's config: longest batch, memory, files and time, also as text.

Seconds: a few matrix products are timed on this machine, then all products of the step are counted.
"""

import json
import timeit
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from peft import LoraConfig
from rich.console import Console
from rich.table import Column, Table
from transformers import PreTrainedModel

from qvera.adapters.methods import Source, check_recipe, measured_rate
from qvera.adapters.peft_compat import other_places, require_kept
from qvera.adapters.products.fused import gradient_cost
from qvera.config import plugins
from qvera.config.schema import Recipe
from qvera.data import Datasets, Rows, lengths_of
from qvera.data.rows import rounds_lengths
from qvera.models.attention import compilable, implementation_on, joining_of, needs_padding_mask
from qvera.models.experts import expert_specs
from qvera.models.model_class import empty_model
from qvera.models.quantization import quantized_reader
from qvera.models.quantize_checkpoint import how_stored
from qvera.models.safetensors_stream import packed_header
from qvera.models.stream import CHUNK_BYTES
from qvera.models.structure import context_note, expert_weights, mixed_rope_note, require_positions
from qvera.models.tokenizer import ids_of, load_tokenizer
from qvera.tasks import task_of
from qvera.training.plan.activations import offloaded_bytes, recurrences
from qvera.training.plan.decisions import (
    BatchOf,
    Change,
    Checkpointing,
    Streaming,
    decide,
    hold_weights,
    longest_batch,
    nearest_changes,
    wanted_slots,
    with_fitting_slots,
)
from qvera.training.plan.memory import (
    ETHERNET_BYTES_PER_SECOND,
    host_bytes,
    plan_ways,
    right_way,
    slot_bytes,
    stream_bytes,
    traffic,
)
from qvera.training.plan.run import ALONE, Linear, Machine, PlannedRun, Shape, Sharing, shape_of, this_machine
from qvera.utils import accelerator
from qvera.utils.errors import InputError
from qvera.utils.formatting import count, duration, size
from qvera.utils.safetensors_io import TensorSpec

_CONFIG_BYTES, _PAIR_NUMBER_BYTES = 1_250, 21  # adapter_config.json, and a line of its pair_numbers without the name
_STATE_BYTES = 6_500  # state.json without the recipe and the steps' own results, manifest.json, and random state

REFUSED_ABOVE, TIGHT_ABOVE = 1.15, 0.92
"""Shares of a GPU's memory: above the first a plan is refused, between them the trial of the longest batch decides.
No plan knows what the allocator loses to fragmentation, or what other processes give back."""


@dataclass(frozen=True, kw_only=True)
class Plan(PlannedRun):
    """The memory, files and time of a run, and changes that make it fit where it does not."""

    changes: list[Change]  # empty where the run fits
    batch_of: BatchOf  # the longest batch of a changed recipe
    kept_keys: tuple[str, ...]  # that no change may name
    decided: Checkpointing  # `recipe` has its mode written out
    streaming: Streaming  # `recipe` has this decision written out too
    ways: Sequence[PlannedRun] = ()  # every way of sharing the model, where these were asked for
    seconds: dict[str, float] | None = None  # parts of an optimizer step; None where nothing was timed
    notices: Sequence[str] = ()  # on rows that are longer than the base's context, and on what stock PEFT can't read

    def within(self, available_bytes: int) -> Self:
        """Return the plan of this run for so much memory, with the changes that make it fit."""
        plan = replace(self, machine=replace(self.machine, available_bytes=available_bytes))
        return replace(plan, changes=[] if plan.fits else nearest_changes(plan, self.batch_of, self.kept_keys))

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
    def notes(self) -> list[str]:
        """Sentences of schedules about what the plan does not know: only the rows tell how these go on."""
        schedules = plugins.schedules_of(training=self.recipe.training)
        return [note for schedule in schedules if (note := schedule.note(self.recipe)) is not None]

    @property
    def warnings(self) -> list[str]:
        """Sentences about rows that are too long, what PEFT can't read, and a rank or a rate far above any measured."""
        rank, rate = self.recipe.adapter.rank, self.recipe.training.learning_rate
        highest = max(min(x.n, x.m) for x in (*self.adapted, *self.adapted_experts))
        found, name = list(self.notices), self.recipe.adapter.method
        # with random projections, ranks a few times above the layers' own size are usual
        if rank > highest * (4 if self.method.source is Source.SEEDED else 1):
            found.append(f"adapter.rank: {rank:,} is above what the layers hold, which is {highest:,} at most.")
        usual = measured_rate(name, self.shape.hidden) or self.method.usual.get("training.learning_rate")
        if usual is not None and rate >= 100 * usual:
            found.append(
                f"training.learning_rate: {rate:g} is {rate / usual:,.0f} times what is known for {name} at this "
                f"hidden size ({usual:g} at {self.shape.hidden:,}). --find-lr measures it on these rows."
            )
        return found

    @property
    def trained_parameters(self) -> int:
        """The number of trained parameters of the adapter, without those of a head."""
        return sum(t.numel for t in self.tensors(trained_only=True)) - self.shape.head_numbers

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the adapter directory: vectors and config, with a line for each pair of A and B that is made."""
        numbered = self.adapted if self.method.source is Source.OWN else []
        lines = sum(len(x.name) + _PAIR_NUMBER_BYTES for x in numbered)
        return _file_bytes(self.tensors()) + _CONFIG_BYTES + lines

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of a checkpoint; with many adapters, of the slots of all, without each adapter's results."""
        written = len(json.dumps({"recipe": self.recipe.to_dict()}, indent=1)) + _STATE_BYTES
        if self.slots:
            return self.slots * (slot_bytes(self) - 4 * self.trained_parameters) + written
        trained = self.tensors(trained_only=True)  # in the optimizer's file: two averages, and a number's header
        return _file_bytes(self.tensors()) + 2 * _file_bytes(trained) + len(packed_header(trained)) + written

    def measured(self, peak_bytes: int, mapped_bytes: int, tensor_bytes: int | None = None) -> dict[str, Any]:
        """Return a run's measured peak (`memory.PeakWatch`) as JSON, and the plan's error relative to it.

        On a CPU the plan is of private memory and mapped pages. On a GPU it is of tensors, without the context and
        NCCL; what the allocator held beyond ``tensor_bytes`` is fragmentation, which no plan knows.
        """
        predicted = self.memory.total_bytes - self.machine.context_bytes - self.collective_bytes
        total = peak_bytes + mapped_bytes
        return {
            "private_bytes": peak_bytes,
            "mapped_bytes": mapped_bytes,
            "total_bytes": total,
            "tensor_bytes": tensor_bytes,
            "predicted_bytes": predicted,
            "relative_error": predicted / total - 1 if total else None,
            "relative_error_of_tensors": predicted / tensor_bytes - 1 if tensor_bytes else None,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON, for ``qvera plan --json`` and run.json."""
        sharing = self.sharing
        document = {
            "device": self.machine.name,
            "device_type": self.machine.device_type,
            "compute_dtype": str(self.machine.dtype).removeprefix("torch."),
            "available_bytes": self.machine.available_bytes,
            "fits": self.fits,
            "batch": {"rows": self.batch.rows, "tokens": self.batch.tokens, "source": self.batch.source},
            "gradient_checkpointing": asdict(self.decided),
            "stream": asdict(self.streaming),
            "pinned_bytes": offloaded_bytes(self),
            "parameters": self.shape.parameters,
            "trained_numbers": self.trained_parameters,
            "head_numbers": self.shape.head_numbers or None,
            "adapters_at_once": self.slots or None,
            "first_phase_only": bool(self.notes),
            "memory": self.memory.to_dict(),
            "adapter_bytes": self.adapter_bytes,
            "checkpoint_bytes": self.checkpoint_bytes,
            "step_seconds": None if self.seconds is None else sum(self.seconds.values()),
            "step_seconds_parts": self.seconds,
            "changes": [{"set": c.settings, "total_bytes": c.total_bytes, "fits": c.fits} for c in self.changes],
            "processes": {"deepspeed": sharing.word, "nodes": sharing.nodes, "per_node": sharing.per_node},
        }
        if self.ways:
            way, why = right_way(self.ways)
            document["ways"] = [
                {
                    "deepspeed": each.sharing.word,
                    "needed_bytes": each.needed_bytes,
                    "available_bytes": each.machine.available_bytes,
                    "host_bytes": host_bytes(each),
                    "fits": each.fits,
                    "received_bytes_per_step": traffic(each)._asdict(),
                    "memory": each.memory.to_dict(),
                }
                for each in self.ways
            ]
            document["right_way"] = {"deepspeed": None if way is None else way.sharing.word, "why": why}
        return document


def _file_bytes(tensors: Sequence[TensorSpec]) -> int:
    """Return the size of a safetensors file of these tensors."""
    return len(packed_header(tensors)) + sum(t.size_bytes for t in tensors)


def make_plan(
    recipe: Recipe,
    machine: Machine | torch.device,
    rows: Rows | None = None,
    sharing: Sharing = ALONE,
    every_way: bool = False,
    adapter_rows: Sequence[int] = (),
    datasets: Datasets | None = None,
) -> Plan:
    """Plan a run from its recipe and the base model's config; no weights are read.

    Args:
        machine: the machine to plan for. A device stands for this process's own machine, with what it holds now.
        rows: the training rows. Without them every row is taken to be ``data.max_length`` long, and a schedule that
            needs them is planned for its beginning.
        sharing: how the ranks share the model. The plan is that of one rank.
        every_way: plan the other ways of sharing on as many ranks too.
        adapter_rows: the training rows of each adapter, where the recipe trains many.
        datasets: the datasets of ``rows``, which say how many outputs a classifier has.

    Raises:
        InputError: the config can't be read or planned for, a target matches nothing, the adapter's keys are wrong, or
            a row is longer than the base's table of positions.
    """
    check_recipe(recipe)
    # A schedule may need most memory at its end, so the run is planned for that. Without rows and max_steps nobody
    # knows its end, and it is planned for its beginning.
    whole = given = recipe
    for schedule in plugins.schedules_of(training=recipe.training):
        whole = schedule.whole(whole, 0 if rows is None else len(rows))
    recipe = whole if rows is not None or recipe.training.max_steps >= 0 else recipe
    task, many = task_of(recipe), recipe.data.has_adapters
    # the same modules as a run's, without weights; what their making draws must not change the run's random numbers
    with torch.random.fork_rng(devices=[]):
        model_class = task.model_class(datasets)
        model = empty_model(recipe.model, None, model_class)
    text_rows = [] if datasets is None or recipe.data.format == "image" else [datasets.train, datasets.eval]
    lengths = np.concatenate([np.zeros(1, np.int32), *map(lengths_of, text_rows)])
    require_positions(model, lengths)
    shape = _grown(shape_of(model, model_class), recipe)
    if shape.experts and recipe.model.quantization in ("nf4", "fp4") and not how_stored(recipe.model)[0]:
        # transformers loads the checkpoint, and leaves its experts dense
        shape = replace(shape, experts=[replace(x, quantizable=False) for x in shape.experts])
    masked, config = needs_padding_mask(model) or task.loss_is_trl, model.config
    device = machine if isinstance(machine, torch.device) else None
    if isinstance(machine, torch.device):
        machine = this_machine(recipe.model, machine)
    shape = replace(shape, recurrences=recurrences(model, shape.hidden, machine.dtype))
    # the attention of the run, and by it the form of the longest batch
    name: str | None = recipe.model.attn_implementation.replace("auto", shape.attention)
    at = device if machine.on_gpu else torch.device("cpu")
    if name == "sdpa":
        name = implementation_on(at, config, machine.dtype)
    if recipe.training.torch_compile and at is not None:
        name = compilable(name, at)
    prefix_once = recipe.data.prefix_once and task.joins_rows
    joined = joining_of(config, name, prefix_once, recipe.data.packing, whole_rows=many)
    # TRL pads rows to their own length, and masks the padding
    rounded = not task.loss_is_trl and rounds_lengths(machine.dtype, machine.device_type)
    batch_of = longest_batch(rows, joined, rounded, masked, shape.image_tokens)
    slots = wanted_slots(recipe, adapter_rows)
    run = PlannedRun(shape, recipe, batch_of(recipe), machine, sharing=sharing, slots=slots)
    run, decided, streaming = decide(run)  # writes out what the recipe leaves to auto
    ways = plan_ways(run, sharing.nodes, sharing.per_node) if every_way else []
    run = with_fitting_slots(hold_weights(run))
    of_run = {each.name: getattr(run, each.name) for each in fields(run)}
    # a schedule may set the rank, and not the recipe's key
    kept = ("adapter.rank",) if whole.adapter.rank != given.adapter.rank else ()
    about: dict[str, Any] = {"changes": [], "batch_of": batch_of, "kept_keys": kept, "ways": ways}
    about |= {"decided": decided, "streaming": streaming}
    notes = [context_note(config, int(lengths.max())), _peft_note(run, model)]
    if rows is not None and (recipe.data.packing or recipe.training.per_device_train_batch_size > 1):
        notes.append(mixed_rope_note(config, lengths_of(rows)))
    plan = Plan(**of_run, **about, notices=list(filter(None, notes)))
    return plan.within(machine.available_bytes)


def _peft_note(run: PlannedRun, model: PreTrainedModel) -> str | None:
    """Return what stock PEFT can't read of the run's adapter as a LoRA, to say before the training; None: nothing."""
    names, roles = {x.name for x in run.adapted}, {x.role for x in run.adapted}
    # it drops tensors of dense MLPs beside experts, and refuses this name in Mamba
    if run.method.peft_type is None or run.shape.head or not (expert_weights(model) or "out_proj" in roles):
        return None
    stacks = {x.name: expert_specs(model)[x.name].is_transposed for x in run.adapted_experts}
    short = {x.name for x in run.shape.linears if x.role in roles} == names and not stacks
    names |= other_places(names, model).keys()
    config = LoraConfig(r=1, target_modules=sorted(roles if short else names), task_type="CAUSAL_LM")
    config.target_parameters = sorted(stacks) or None
    try:
        require_kept(config, {**dict.fromkeys(names), **stacks}, model)
    except InputError as error:
        kind = "This run's LoRA is qvera's alone" if run.method.peft_type == "LORA" else "--to lora will be refused"
        return f"{kind}: {error}"
    return None


def _grown(shape: Shape, recipe: Recipe) -> Shape:
    """Return the shape with the embedding rows that added tokens need. Without a tokenizer every token counts."""
    tokens = recipe.model.added_tokens
    if not tokens:
        return shape
    try:
        last = max(ids_of(load_tokenizer(recipe.model), tokens).values())
    except InputError:
        last = shape.vocabulary + len(tokens) - 1
    rows = max(0, last + 1 - shape.vocabulary)
    numbers = shape.dense_numbers + rows * shape.hidden * (1 if shape.tied else 2)
    return replace(shape, vocabulary=shape.vocabulary + rows, dense_numbers=numbers, grown_rows=rows)


_STYLE: dict[str, Any] = {"box": None, "pad_edge": False, "header_style": "bold"}
_MOMENTS = {"backward": "backward pass", "loss": "loss", "answers": "answers", "images": "images' tower"}


def print_plan(plan: Plan, console: Console) -> None:
    """Print the whole plan: a table of components, files, time, and one sentence on whether it fits."""
    memory, shape, machine, world_size = plan.memory, plan.shape, plan.machine, plan.sharing.world_size
    trained = f"{plan.trained_parameters:,} trained"
    trained += f" and a head of {shape.head_numbers:,}" if shape.head else ""
    console.print(
        f"{shape.model_type}, {count(shape.parameters)} parameters; {trained}; "
        f"computes in {str(machine.dtype).removeprefix('torch.')}; planned for {plan.batch.source}"
    )
    table = Table("At the peak", "where", Column("bytes", justify="right"), **_STYLE)
    for part in memory.peak:
        where = "GPU" if machine.on_gpu else "mapped file" if part.mapped else "private"
        table.add_row(part.name, where, size(part.bytes))
    table.add_row("total", "", size(memory.total_bytes), style="bold")
    console.print(table)
    if shape.expert_numbers:
        console.print(
            f"{count(shape.expert_numbers)} of the parameters are experts of a kind that is neither adapted nor "
            "quantized."
        )
    peak = memory.peak_moment
    others = {name: sum(c.bytes for c in memory.at(name)) for name in memory.moments if name != peak}
    others_text = ", ".join(f"{_MOMENTS[name]} {size(held)}" for name, held in others.items())
    console.print(f"The peak is in the {_MOMENTS[peak]}; {others_text}.")
    console.print(str(plan.decided), markup=False)
    if plan.holds_weights:
        console.print("The total has the adapted weights too: there is room to keep them between steps.")
    if plan.streaming.streams:
        console.print(str(plan.streaming), markup=False)
    if pinned := offloaded_bytes(plan):
        console.print(f"Layer inputs take {size(pinned)} of pinned RAM.")
    if plan.slots:
        each = f"each of them {size(slot_bytes(plan))}"
        console.print(f"At most {plan.slots:,} adapters are trained at the same time, {each} with AdamW's moments.")
    for text in plan.warnings:
        console.print(text, style="yellow", markup=False)
    for note in plan.notes:
        console.print(note, markup=False)
    console.print(f"Files: adapter {size(plan.adapter_bytes)}, a checkpoint {size(plan.checkpoint_bytes)}.")
    if plan.seconds is not None:
        parts = ", ".join(f"{name} {duration(s)}" for name, s in plan.seconds.items() if s > 0)
        ranks = f" for one of {world_size} ranks, without the network" if world_size > 1 else ""
        step = "A round of steps, one of each adapter," if plan.slots else "A step"
        console.print(f"{step} takes about {duration(sum(plan.seconds.values()))} here{ranks} ({parts}).")
    if machine.on_gpu:
        console.print("GPU figures are computed from shapes; no GPU has confirmed them yet.")
    if plan.ways:
        _print_ways(plan, console)
    for line in change_lines(plan):
        console.print(line, markup=False)
    console.print(verdict(plan), style="bold")


_COLUMN = {"base": "base", "vectors": "vectors", **dict.fromkeys(("checkpoints", "transient", "loss"), "activations")}
"""Kind of a component → its column. Projections, answers and the runtime go into 'others'."""


def _print_ways(plan: Plan, console: Console) -> None:
    sharing = plan.sharing
    nodes = f"{sharing.nodes} node{'s' if sharing.nodes > 1 else ''}"
    console.print(
        f"\n{sharing.world_size} ranks, {sharing.per_node} on each of {nodes}. What one rank holds at its peak:"
    )
    titles = ("base", "vectors, optimizer", "activations", "others", "total", "received a step", "at 1 Gbit/s")
    table = Table("deepspeed", *(Column(title, justify="right") for title in titles), **_STYLE)
    for way in plan.ways:
        parts = {"base": 0, "vectors": 0, "activations": 0, "others": 0}
        for part in way.memory.peak:
            if not part.mapped:
                parts[_COLUMN.get(part.kind, "others")] += part.bytes
        base, *cells = map(size, parts.values())
        if way.memory.mapped_bytes:
            base += f" + {size(way.memory.mapped_bytes)} mapped"
        needed = size(way.needed_bytes) + ("" if way.fits else " (too much)")
        received = sum(traffic(way))
        seconds = duration(received / ETHERNET_BYTES_PER_SECOND)
        table.add_row(way.sharing.word, base, *cells, needed, size(received), seconds)
    console.print(table)
    console.print(right_way(plan.ways)[1], style="bold")


def verdict(plan: Plan) -> str:
    """Return one sentence on whether the run fits."""
    memory, machine, needed = plan.memory, plan.machine, size(plan.needed_bytes)
    have = f"{size(machine.available_bytes)} of {'memory' if machine.on_gpu else 'free RAM'}"
    if plan.is_tight:
        word = "Fits, barely" if plan.fits else "Does not fit by the plan"
        return (
            f"{word}: needs {needed}, and {machine.name} has {have}. That is too near to tell: "
            "`qvera train` tries the longest batch before the first step."
        )
    if not plan.fits:
        return f"Does not fit: needs {needed}, and {machine.name} has {have}."
    if memory.total_bytes > machine.available_bytes:
        return (
            f"Fits, slowly: {needed} private of {have} on {machine.name}; the mapped base "
            f"({size(memory.mapped_bytes)}) does not stay in memory beside it and is read from disk in every step."
        )
    mapped = f" and {size(memory.mapped_bytes)} mapped" if memory.mapped_bytes else ""
    return f"Fits: {needed}{mapped} of {have} on {machine.name}."


def change_lines(plan: Plan) -> list[str]:
    """Return the changes that would make the run fit, one ``--set`` a line."""
    if plan.fits or not plan.changes:
        return []
    way = right_way(plan.ways)[0] if plan.ways else None
    if way is not None and way.sharing.word != plan.sharing.word:
        return [f"--set deepspeed={way.sharing.word} makes it fit: {size(way.needed_bytes)} a rank."]
    if not any(change.fits for change in plan.changes):
        least = plan.changes[-1]
        return [f"No change makes it fit; at the least ({least}) it takes {size(least.total_bytes)}."]
    lines = ["Any one of these makes it fit:"] if len(plan.changes) > 1 else ["This makes it fit:"]
    return lines + [f"  {change}   {size(change.total_bytes)}" for change in plan.changes]


def run_lines(plan: Plan) -> list[str]:
    """Return the plan in the lines that a run prints before it starts."""
    memory, world_size = plan.memory, plan.sharing.world_size
    mapped = f" + {size(memory.mapped_bytes)} of mapped weights" if memory.mapped_bytes else ""
    rank = f" of each of {world_size} ranks" if world_size > 1 else ""
    peak = f"{size(memory.total_bytes - memory.mapped_bytes)}{mapped}, in the {_MOMENTS[memory.peak_moment]}"
    return [
        f"Plan: peak{rank} {peak}; {plan.batch.source}.",
        *([str(plan.decided)] if plan.decided.asked != plan.decided.mode else []),
        *([str(plan.streaming)] if plan.streaming.streams else []),
        verdict(plan),
        *change_lines(plan),
    ]


_TOKENS = 4096  # enough for an accelerator's full rate, and a bound on the memory that the timing takes
_TOKENS_CPU, _FLOPS_CPU = 1024, 30e9
_BUDGET_SECONDS = 0.5


def time_step(plan: Plan, device: torch.device) -> dict[str, float]:
    """Return the seconds of one optimizer step in parts, from a calibration of ``device`` (2 to 5 seconds).

    Each rank is taken to have such a device; the network is left out. Every pass is taken to be the plan's batch.
    """
    times, rates = plan.passes, _rates(plan, device)
    seconds = {part: times * amount / rates[kind] for part, (kind, amount) in _work(plan).items()}
    # layers are copied while others compute, so only the longer of the two is waited for
    if plan.streaming.streams and accelerator.has_own_memory(device):
        source = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
        target = torch.empty_like(source, device=device)
        copying = times * stream_bytes(plan) * _seconds(lambda: target.copy_(source, non_blocking=True)) / CHUNK_BYTES
        computing = sum(seconds.values()) - seconds["head and loss"]
        seconds["waiting for streamed layers"] = max(0.0, copying - computing)
    return seconds


def _rates(run: PlannedRun, device: torch.device) -> dict[str, float]:
    """Return the amounts that ``device`` does in a second.

    ``products``: FLOPs of x Wᵀ and g W; ``low rank``: FLOPs of products one side of which is the rank;
    ``dequantization``: 4-bit weights; ``elementwise``: bytes read and written. An accelerator is timed on all linears
    of a layer: less would time the launch of a kernel. On a CPU a piece of one weight is long enough.
    """
    rank, hidden, linears = run.recipe.adapter.rank, run.shape.hidden, run.layer
    tokens = min(run.batch.all_tokens, _TOKENS if run.machine.on_gpu else _TOKENS_CPU)
    if not run.machine.on_gpu:
        linears = [Linear("", hidden, min(run.shape.ff, max(64, int(_FLOPS_CPU / (2 * _TOKENS_CPU * hidden)))))]
    quantized = [x for x in linears if x.quantizable and run.recipe.model.quantization != "none"]
    widest, numbers = max(run.shape.ff, *(max(x.n, x.m) for x in linears)), sum(x.numbers for x in linears)

    def drawn(numbers: int) -> torch.Tensor:
        return torch.randn(numbers, device=device, dtype=run.machine.dtype)

    def first(numbers: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        return numbers[: rows * columns].view(rows, columns)

    with accelerator.forked_random_state():
        weights, inputs = drawn(max(x.numbers for x in linears)), drawn(tokens * widest)
        narrow = drawn(max(tokens, widest) * rank)
        readers = [quantized_reader(first(weights, x.m, x.n), run.recipe.model) for x in quantized]

        def dense() -> None:
            for x in linears:
                torch.mm(first(inputs, tokens, x.n), first(weights, x.m, x.n).t())
                torch.mm(first(inputs, tokens, x.m), first(weights, x.m, x.n))

        def low_rank() -> None:
            for x in linears:
                torch.mm(first(inputs, tokens, x.n), first(narrow, rank, x.n).t())  # z = x Aᵀ
                torch.mm(first(narrow, tokens, rank), first(narrow, x.m, rank).t())  # z Cᵀ

        def dequantize() -> None:
            for read in readers:
                read()  # one is in memory at a time

        wide = first(inputs, tokens, widest)
        return {
            "products": 4 * tokens * numbers / _seconds(dense),
            "low rank": 2 * tokens * rank * sum(x.n + x.m for x in linears) / _seconds(low_rank),
            "dequantization": sum(x.numbers for x in quantized) / _seconds(dequantize) if readers else float("inf"),
            "elementwise": 2 * wide.nbytes / _seconds(lambda: torch.nn.functional.silu(wide)),
        }


def _seconds(run: Callable[[], object]) -> float:
    """Return the seconds of the fastest of a few runs. `torch.utils.benchmark` would do, but needs setuptools."""

    def once() -> None:
        run()
        accelerator.synchronize()

    once()  # what is made or compiled at the first call does not count
    first = timeit.timeit(once, number=1)
    return min([first, *timeit.repeat(once, number=1, repeat=int(_BUDGET_SECONDS / first))])


def _work(run: Plan) -> dict[str, tuple[str, float]]:
    """Return part → the rate of `_rates` that it goes by and its amount, for one forward and backward pass."""
    passes = 3 if run.checkpointing else 2  # forward, recompute, backward
    made = run.builds_per_pass if run.holds_weights else passes  # how often W + ΔW is made
    flops, low_rank, weights, passed = 0.0, 0.0, 0.0, 0.0
    T, size, section, s, b = run.batch.all_tokens, run.itemsize, run.recipe.adapter, run.shape, run.batch
    for x in (*run.layer, *run.layer_experts):
        is_summed, pair = not x.experts and run.is_summed(x), 2 * x.m * section.rank * 4  # bytes of B read, C written
        rows = T * (s.experts_per_token if x.experts else 1)
        # the experts that rows spread evenly would meet
        met = 1 - (1 - s.experts_per_token / x.experts) ** T if x.experts else 1
        flops += passes * 2 * rows * x.n * x.m
        if run.is_packed(x) or (x.quantizable and run.recipe.model.quantization == "int8" and not x.experts):
            weights += (made if is_summed else passes) * met * x.numbers
        if is_summed:
            low_rank += made * 2 * x.n * x.m * section.rank
            low_rank += 2 * gradient_cost(T, x.n, x.m, section.rank, section.input_scale)
            passed += made * (pair + x.n * x.m * size) * 2
        elif x.name in run.adapted_names:
            # z is made, and its gradient spent, once for all readers of the same input
            shared = x.role in ("k_proj", "v_proj", "up_proj") and not section.input_scale
            low_rank += 2 * section.rank * ((0 if shared else passes * T * x.n) + (passes + 1) * rows * x.m)
            passed += (passes + 1) * pair * 2
    seen = b.longest_row if b.offsets else b.tokens  # by a token at most: offsets keep it within its row
    attention = (passes - 1 + 2.5) * 4 * b.rows * b.tokens * seen * s.heads * s.head_dim
    # some 12 passes over the stream, 5 over the MLP's inside, 6 over q and k; the same again in each pass
    passed += passes * size * T * (24 * s.hidden + 10 * s.ff + 12 * s.heads * s.head_dim)
    head = 6.0 * T * s.head_numbers if s.head else 4.0 * min(b.trained_tokens, T) * s.vocabulary * s.hidden
    task = task_of(run.recipe)
    more = 1 + task.passes_without_gradient / passes
    head *= (3 + task.passes_without_gradient) / 2 if task.loss_is_trl else 1  # TRL makes logits again
    if run.recipe.model.resident is True:  # nothing is dequantized
        weights = 0.0
    return {
        "frozen products": ("products", s.layers * flops * more),
        "dequantization": ("dequantization", s.layers * weights * more),
        "low-rank products": ("low rank", s.layers * low_rank),
        "attention": ("products", s.layers * attention * more),
        "head and loss": ("products", head),
        "elementwise": ("elementwise", s.layers * passed * more),
    }
