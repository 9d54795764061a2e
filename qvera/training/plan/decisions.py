"""The longest forward pass of a run, decisions that the recipe leaves open, and changes that would make a run fit.

`training.gradient_checkpointing: auto` is the fastest way that fits. Recomputing a layer is a third of its work where
the base is frozen (it has no gradients of weights), so it is left out where there is room. `model.stream: auto` streams
where the run fits only so.
"""

import itertools
import json
import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from qvera.config.schema import Recipe
from qvera.data import Example, Rows, batches_of, collate_prefix_once, planned_steps
from qvera.data.images import ImageTextProcessor
from qvera.data.rows import LENGTHS_PER_OCTAVE, Joined, round_up_length
from qvera.models.attention import FP32_TOKENS, Group, groups_of
from qvera.models.checkpointing import Mode
from qvera.tasks import task_of
from qvera.training.plan.activations import offloaded_bytes
from qvera.training.plan.memory import (
    held_weight_bytes,
    layer_bytes,
    pinned_layer_bytes,
    slot_bytes,
    stream_bytes,
)
from qvera.training.plan.run import Batch, PlannedRun, changed
from qvera.utils import accelerator
from qvera.utils.errors import InputError
from qvera.utils.formatting import duration, size

BatchOf = Callable[[Recipe], Batch]  # the longest batch of a (changed) recipe

_CANDIDATES = 200  # how many of the longest forward passes are looked at closely


def longest_batch(
    rows: Rows | None, joined: Joined | None, rounded: bool, masked: bool, image_tokens: int = 0
) -> BatchOf:
    """Return recipe → its longest batch over these rows. ``image_tokens``: the tokens of each row's image."""
    known: dict[tuple[int, int], Batch] = {}  # by the keys that it depends on; many changes of a recipe ask for it

    def longest(recipe: Recipe) -> Batch:
        if rows is None:
            return assumed_batch(recipe, joined, image_tokens)
        key = recipe.data.max_length, recipe.training.per_device_train_batch_size
        if key not in known:
            cut = rows if int(rows.lengths.max()) - rows.answer_tokens <= key[0] else rows.cut(key[0])
            many = recipe.data.has_adapters
            if many:  # how rows meet depends on who leaves when: the longest ones may all meet
                chosen = np.argsort(-cut.lengths, kind="stable")[: pass_rows(recipe)].tolist()
            else:
                chosen = longest_rows(recipe, cut, joined, max(1, planned_steps(recipe, len(cut))))
            examples = [cut[i] for i in chosen]
            batch = batch_of(examples, joined, recipe.data.packing, rounded, masked, whole_rows=many)
            different = {round_up_length(n) if rounded else n for n in set(cut.lengths.tolist())}
            counts, shortest = len(different), min(different) - rows.answer_tokens
            # any number up to the longest pass, of which `round_up_length` leaves some an octave
            if batch.joined or rows.answer_tokens:
                counts = 1 + math.ceil(LENGTHS_PER_OCTAVE * math.log2(batch.tokens / shortest))
            batch = replace(batch, token_counts=counts)
            images = [image for example in examples for image in example.images]
            if images and isinstance(processor := images[0].processor, ImageTextProcessor):
                pixels = processor.inputs(images)["pixel_values"].numel()
                batch = replace(batch, pixels=pixels, images=len(images))
            known[key] = batch
        return known[key]

    return longest


def assumed_batch(recipe: Recipe, joined: Joined | None = None, image_tokens: int = 0) -> Batch:
    """Assume every row to be ``data.max_length`` long, and trained but for what ``data.max_target_length`` excludes.

    A prompt that training answers is assumed to be so long too, and its answer to be as long as it may be.
    An image is a row of ``image_tokens``; the last one stands for the class.
    """
    data, rows, answer = recipe.data, pass_rows(recipe), recipe.training.answer_tokens
    tokens = image_tokens or data.max_length + answer
    if image_tokens:
        source = f"images of the base's size: {rows} x {tokens:,} tokens"
        return Batch(rows, tokens, rows, False, False, source, tokens)
    rows *= 2 if data.format == "preference" else 1  # a pair is two rows
    keys = "data.max_length" + (" and training.sample_max_new_tokens" if answer else "")
    source, targets = f"{keys}: {rows} x {tokens:,} tokens", rows
    if data.packing:  # one full sequence; two rows in it, so that attention has to tell them apart
        source, rows, targets = f"data.max_length: packed into {tokens:,} tokens", 1, 2
    all_tokens = rows * tokens
    trained = rows * (answer or tokens)
    if data.train_on != "all" and data.max_target_length and not answer:
        trained = min(targets * min(data.max_target_length, tokens), trained)
    together = data.packing or (data.has_adapters and joined is not None)
    offsets = together and joined is not Joined.MASK
    group = Group(targets if data.has_adapters else 1, tokens, 0, tokens <= FP32_TOKENS)
    groups = (group,) if offsets else ()
    sizes = (1, all_tokens) if together else (rows, tokens)
    packed = int(data.packing)
    return Batch(*sizes, trained, False, together, source, tokens, packed, offsets=offsets, groups=groups)


def pass_rows(recipe: Recipe) -> int:
    """Return the most rows of a forward pass; with many adapters, no more than a step of each in flight."""
    training = recipe.training
    if not recipe.data.has_adapters or training.adapters_at_once == "auto":
        return training.per_device_train_batch_size
    return min(training.per_device_train_batch_size, training.adapters_at_once * training.global_batch_size)


def longest_rows(recipe: Recipe, rows: Sequence[Example], joined: Joined | None, steps: int) -> list[int]:
    """Find the forward pass with the most tokens (padding included) in the first ``steps`` steps; return its rows.

    A prompt is returned for each of its answers in the pass.
    """
    batches, packing = batches_of(recipe, rows), recipe.data.packing
    answers = recipe.training.step_rows // recipe.training.global_batch_size  # to each row
    # First by padded size, which numpy has for an epoch at once. Then only the longest are collated, to see how many
    # tokens they have where their rows are joined.
    candidates: dict[tuple[int, ...], int] = {}
    for stretch in batches.stretches(steps):
        parts = [np.repeat(np.asarray(part, dtype=np.int64), answers) for part in stretch]
        passes = [each for part in parts for each in batches.cut(part.tolist())]
        counts = np.array([len(p) for p in passes], dtype=np.int64)
        chosen = np.concatenate(parts)
        join = np.add if packing else np.maximum
        row_tokens = join.reduceat(batches.lengths[chosen], np.cumsum(counts) - counts)
        sizes = row_tokens * (1 if packing else counts)
        for i in np.argsort(-sizes, kind="stable")[:_CANDIDATES]:
            candidates[tuple(passes[i])] = int(sizes[i])
    best, best_tokens = [], -1
    for members, padded in sorted(candidates.items(), key=lambda item: -item[1])[:_CANDIDATES]:
        if padded <= best_tokens:
            break  # joining only makes it less
        tokens = batch_of([rows[i] for i in members], joined, packing).all_tokens
        if tokens > best_tokens:
            best, best_tokens = list(members), tokens
    return best


def batch_of(
    examples: Sequence[Example],
    joined: Joined | None,
    packing: bool = False,
    rounded: bool = False,
    masked: bool = False,
    whole_rows: bool = False,
) -> Batch:
    """Return the sizes of these rows as one forward pass.

    ``joined``: how they may be put into one sequence; with ``packing`` or ``whole_rows`` they are joined even where
    that does not pay. ``masked``: rows of different lengths need a mask.
    """
    lengths = [tokens for e in examples for tokens in e.row_tokens]
    trained, rows, longest = sum(e.trained_tokens for e in examples), len(lengths), max(lengths)
    batch = None if joined is None else collate_prefix_once(examples, packing=packing or whole_rows, joined=joined)
    if batch is None:
        tokens = round_up_length(longest) if rounded else longest
        source = f"the longest batch of the data: {rows} x {tokens:,} tokens"
        return Batch(rows, tokens, trained, masked and min(lengths) < longest, False, source, longest)
    tokens = batch["input_ids"].shape[1]
    tokens = round_up_length(tokens) if rounded else tokens
    source = f"the longest batch of the data: {rows} rows joined into {tokens:,} tokens"
    groups: tuple[Group, ...] = ()
    if offsets := "cu_seq_lens_q" in batch:
        prefix = batch.get("prefix_length", 0)
        own = [length - prefix for length in lengths]
        around = prefix, tokens - prefix - sum(own)  # the prefix is a row too, and so is what fills the sequence up
        rows_q, rows_k = (filter(None, [around[0], *each, around[1]]) for each in (own, lengths))
        ends_q, ends_k = (tuple(itertools.accumulate(each, initial=0)) for each in (rows_q, rows_k))
        groups = tuple(groups_of(ends_q, ends_k)[0])
    keys = len(batch["key_index"]) if "key_index" in batch else 0
    packed = rows if packing else 0
    return Batch(1, tokens, trained, False, True, source, longest, packed, offsets=offsets, keys=keys, groups=groups)


OFF_SHARE_ACCELERATOR, ON_SHARE_ACCELERATOR = 0.85, 0.92
"""Shares of a device's memory: up to the first activations are kept, up to the second layer inputs stay on the device.
The rest is for the allocator's losses, which are in no plan."""
OFF_SHARE_CPU = 0.5  # of the free RAM, mapped weights counted too: other processes come and go there
PCIE_BYTES_PER_SECOND = 25e9  # PCIe 4.0 x16 from page-locked RAM, where none was measured: 80 % of its 31.5 GB/s
_SHORTEST_TOKENS, _SMALLEST_RANK, _SMALLEST_CHUNK = 64, 8, 32


def mode_word(mode: Mode) -> str:
    """Return the word for a mode: ``off``, ``on`` or ``offload``."""
    return mode if isinstance(mode, str) else "on" if mode else "off"


@dataclass(frozen=True)
class Checkpointing:
    """A decision on `training.gradient_checkpointing`."""

    asked: Mode | str
    mode: Mode
    why: str
    needed_bytes: dict[str, int] = field(default_factory=dict)  # at the peak, by `mode_word`; empty unless auto
    available_bytes: int = 0

    def fits(self, mode: Mode) -> bool:
        """Whether a run fits in another mode, without a margin; True where nothing is known."""
        return self.needed_bytes.get(mode_word(mode), 0) <= self.available_bytes

    def __str__(self) -> str:
        return f"Gradient checkpointing: {mode_word(self.mode)} ({self.why})."


@dataclass(frozen=True)
class Streaming:
    """A decision on `model.stream`: two layers on the device, the others in RAM."""

    asked: bool | str
    streams: bool
    why: str
    ram_bytes: int = 0  # of the layers that stay there
    bytes_per_pass: int = 0  # that one forward and backward pass copies to the device

    def __str__(self) -> str:
        text = f"Streaming: {'on' if self.streams else 'off'} ({self.why})."
        if self.bytes_per_pass:
            text += (
                f" {size(self.ram_bytes)} of layers stay in RAM, and a pass copies {size(self.bytes_per_pass)}: "
                f"{duration(self.bytes_per_pass / PCIE_BYTES_PER_SECOND)} at {PCIE_BYTES_PER_SECOND / 1e9:g} GB/s, "
                "hidden where the pass computes for longer."
            )
        return text


def wanted_slots(recipe: Recipe, adapter_rows: Sequence[int] = ()) -> int:
    """Return the most adapters in flight: as the recipe says, or as many as fill a pass; 0 where it trains one adapter.

    ``adapter_rows``: training rows of each adapter; where they are not known, each has enough for a whole step.
    """
    training = recipe.training
    if not recipe.data.has_adapters:
        return 0
    if training.adapters_at_once != "auto":
        return min(training.adapters_at_once, len(adapter_rows) or training.adapters_at_once)
    step, room = training.global_batch_size, training.per_device_train_batch_size
    if not adapter_rows:
        return max(1, room // step)
    return slots_to_fill([min(rows, step) for rows in adapter_rows], room)


def slots_to_fill(step_rows: Sequence[int], pass_rows: int) -> int:
    """Return how many adapters fill a pass, at least one. ``step_rows``: each one's rows of a step; few come first."""
    return max(1, int((np.cumsum(sorted(step_rows)) <= pass_rows).sum()))


def with_fitting_slots(run: PlannedRun) -> PlannedRun:
    """Return the run with as many slots as memory allows, at least one; as it is where the recipe says how many."""
    if not run.slots or run.recipe.training.adapters_at_once != "auto":
        return run
    excess = run.needed_bytes - run.machine.available_bytes
    return run if excess <= 0 else replace(run, slots=max(1, run.slots - -(-excess // slot_bytes(run))))


def hold_weights(run: PlannedRun) -> PlannedRun:
    """Return the run with W + ΔW made once a step and held, where one process on a CPU can; else as it is.

    They may take a quarter of the free memory, and the run has to fit with them. It saves a tenth of a step. A resumed
    run keeps `PlannedRun.builds_per_pass`, since layers choose their path by it.
    """
    if run.machine.on_gpu or run.sharing.world_size > 1 or run.sharing.stage == 3 or run.slots > 1:
        return run
    held = replace(run, builds_per_pass=1 / run.passes)
    return held if 0 < held_weight_bytes(held) <= run.machine.available_bytes // 4 and held.fits else run


def decide_checkpointing(run: PlannedRun) -> Checkpointing:
    """Decide on the mode of gradient checkpointing. Without ``auto`` it is what the recipe says."""
    asked, machine, sharing = run.recipe.training.gradient_checkpointing, run.machine, run.sharing
    if asked != "auto":
        shared = asked == "offload" and run.checkpointing is True
        why = "as the recipe says" + (": the device has no memory of its own to offload from" if shared else "")
        return Checkpointing(asked, run.checkpointing, why)
    available = machine.available_bytes // (1 if machine.on_gpu else sharing.per_node)  # ranks divide a machine's RAM
    runs = {mode: run.changed({"training.gradient_checkpointing": mode}) for mode in modes_of(run)}
    needed = {mode: each.memory.total_bytes for mode, each in runs.items()}
    # keep activations where there is room, move layer inputs to RAM where even these do not fit, else recompute
    mode: Mode = True
    why = f"auto: without it the run would take {size(needed[False])} of {size(available)}"
    if needed[False] <= available * (OFF_SHARE_ACCELERATOR if machine.on_gpu else OFF_SHARE_CPU):
        mode, why = False, f"auto: without it the run takes {size(needed[False])} of {size(available)}"
    elif "offload" in runs and needed[True] > available * ON_SHARE_ACCELERATOR and needed["offload"] < needed[True]:
        host_bytes = offloaded_bytes(runs["offload"]) * sharing.per_node
        layers_bytes = pinned_layer_bytes(run)  # which are locked first
        if machine.host_bytes is None or host_bytes <= machine.host_bytes - layers_bytes:
            mode, why = "offload", f"{why}, and with all layer inputs on the device {size(needed[True])}"
        else:
            beside = " beside the streamed layers" if layers_bytes else ""
            why += f", and {size(host_bytes)} of RAM to offload layer inputs to are not free{beside}"
    return Checkpointing(asked, mode, why, {mode_word(each): count for each, count in needed.items()}, available)


def modes_of(run: PlannedRun) -> list[Mode]:
    """Return the modes that a run may have on its machine, the fastest first."""
    # TRL enables checkpointing anew in each pass, as transformers does it
    can_offload = accelerator.has_own_memory(run.machine.device_type) and not task_of(run.recipe).loss_is_trl
    return [False, True, "offload"] if can_offload else [False, True]


def can_stream(run: PlannedRun) -> bool:
    """Whether streaming would free memory of the device, and goes with the rest of the recipe."""
    # ZeRO-3 brings the layers to the device itself
    may = run.sharing.stage < 3 and not run.recipe.training.torch_compile
    return may and run.is_four_bit and accelerator.has_own_memory(run.machine.device_type)


def decide(run: PlannedRun) -> tuple[PlannedRun, Checkpointing, Streaming]:
    """Return the run with `model.stream` and `training.gradient_checkpointing` written out, and the decisions."""
    asked, machine = run.recipe.model.stream, run.machine

    def planned(streams: bool) -> tuple[PlannedRun, Checkpointing]:
        mode = decide_checkpointing(run.changed({"model.stream": streams}))
        return run.changed({"model.stream": streams, "training.gradient_checkpointing": mode.mode}), mode

    # last of the three, as it takes whatever room is left: until then the run is planned without such copies
    wants_resident = run.recipe.model.resident == "auto" and run.is_four_bit
    if wants_resident:
        run = run.changed({"model.resident": False})
    decided, mode = planned(asked is True)
    why = "as the recipe says"
    if asked == "auto" and decided.fits:
        why = "auto: the run fits without it"
    elif asked == "auto" and run.recipe.model.resident is True:
        why = "auto: model.resident keeps the layers on the device"
    elif asked == "auto" and not can_stream(run):
        why = "auto: this run's layers can't be streamed"
    elif asked == "auto":
        why = "auto: the run does not fit with it either"
        streamed, its_mode = planned(True)
        if streamed.fits:
            needed, available = size(decided.needed_bytes), size(machine.available_bytes)
            why = f"auto: with the base on the device the run takes {needed} of {available}"
            decided, mode = streamed, its_mode
    if decided.recipe.model.stream is not True:
        return (with_resident(decided) if wants_resident else decided), mode, Streaming(asked, False, why)
    if not accelerator.has_own_memory(machine.device_type):
        why += "; here it only adds copies: the mapped file is in RAM anyway"
        return decided, mode, Streaming(asked, True, why)
    if not pinned_layer_bytes(decided):
        why += "; so much RAM is not free: the layers are read from their file in each pass"
    return decided, mode, Streaming(asked, True, why, sum(layer_bytes(decided)), stream_bytes(decided))


def with_resident(run: PlannedRun) -> PlannedRun:
    """Return the run with 16-bit copies of its 4-bit linears (`model.resident`), where a GPU has room for them."""
    machine, is_16_bit = run.machine, run.itemsize == 2 and run.recipe.model.compute_dtype != "float32"
    if not (machine.on_gpu and is_16_bit and run.sharing.stage < 3):
        return run
    other = run.changed({"model.resident": True})
    return other if other.memory.total_bytes <= machine.available_bytes * OFF_SHARE_ACCELERATOR else run


@dataclass(frozen=True)
class Change:
    """New values for keys of the recipe, and the memory that the plan then comes to."""

    settings: dict[str, Any]
    total_bytes: int
    fits: bool

    def __str__(self) -> str:
        """The options of a command line, quoted for a shell. Values are JSON, which is YAML too."""
        return " ".join("--set " + shlex.quote(f"{key}={json.dumps(value)}") for key, value in self.settings.items())


def nearest_changes(run: PlannedRun, batch_of: BatchOf, kept: Sequence[str] = ()) -> list[Change]:
    """Return single changes that make the recipe fit, each with its mildest value. Where none does, they are added up.

    The last resort, all changes at their extreme, is given even where it does not fit. No change names the keys
    ``kept``.
    """

    def tried(settings: dict[str, Any]) -> Change | None:
        try:
            other = changed(run.recipe, settings)
        except InputError:  # the recipe's task or objective has no such key, or does not take the value
            return None
        planned = replace(run, recipe=other, batch=batch_of(other))
        return Change(settings, planned.memory.total_bytes, planned.fits)

    steps = {key: values for key, values in _steps(run).items() if key not in kept}
    singles: list[Change] = []
    for key, values in steps.items():
        attempts = (tried({key: value}) for value in values)
        singles += [change for change in attempts if change is not None and change.fits][:1]
    if singles:
        return singles
    # no single one is enough: one key after the other goes to its extreme, until the run fits
    last: Change | None = None
    for key, values in steps.items():
        for value in values:
            last = tried({**(last.settings if last else {}), key: value}) or last
            if last is not None and last.fits:
                return [last]
    return [] if last is None else [last]


def _steps(run: PlannedRun) -> dict[str, list[Any]]:
    """Return each key that saves memory, with ever smaller values. The keys come by what they cost a run's result."""
    training, data, adapter = run.recipe.training, run.recipe.data, run.recipe.adapter
    rows, modes = pass_rows(run.recipe), modes_of(run)
    # rows of a pass have to divide those of a step
    fewer_rows = [n for n in range(rows - 1, 0, -1) if training.step_rows % n == 0]
    if data.has_adapters:  # their rows are cut into passes together, so a pass need not divide a step of one
        fewer_rows = list(_eighths(rows, 1))
    longest = data.max_length if run.batch.joined else min(data.max_length, run.batch.tokens)
    few = [name for name in ("q_proj", "v_proj") if any(x.role == name for x in run.shape.linears)]
    return {
        "model.resident": [False] if run.recipe.model.resident is True else [],
        "training.gradient_checkpointing": modes[modes.index(run.checkpointing) + 1 :],
        "model.stream": [True] if can_stream(run) and run.recipe.model.stream is not True else [],
        "training.per_device_train_batch_size": [] if data.packing else fewer_rows,
        "training.loss_chunk_tokens": _halved(training.loss_chunk_tokens, _SMALLEST_CHUNK),
        "data.max_length": [n for n in _eighths(longest, 8) if n >= _SHORTEST_TOKENS],
        "adapter.rank": [r for r in _halved(adapter.rank, _SMALLEST_RANK) if r % adapter.b_groups == 0],
        "adapter.targets": [few] if len(few) == 2 and adapter.targets != few else [],
    }


def _halved(value: int, least: int) -> list[int]:
    return [value >> times for times in range(1, value.bit_length()) if value >> times >= least]


def _eighths(value: int, multiple: int) -> Iterator[int]:
    """Yield values that go down by an eighth each, rounded to a multiple."""
    while value > multiple:
        value = min(value * 7 // 8 // multiple * multiple, value - multiple)
        yield value
