"""Bytes that a process, or one rank of several, holds throughout a run and in each moment of a step.

The parts that ranks divide follow `qvera.distributed`, the optimizers of DeepSpeed 0.19 and
`qvera.training.zero_engine`. tests/distributed/test_stages.py counts them in live objects, and bench/zero.py in whole
processes.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import torch

from qvera.adapters.methods import Source
from qvera.adapters.methods.base import Change
from qvera.adapters.methods.vera import held_bytes
from qvera.config.schema import Recipe
from qvera.data.rows import KERNEL_CACHE_SIZE, LENGTHS_PER_OCTAVE
from qvera.distributed.zero import IN_RAM_BELOW_BYTES, nvme_buffers
from qvera.kernels.cross_entropy import CACHED_ELEMENTS
from qvera.models.checkpointing import INPUTS_ON_DEVICE
from qvera.models.loss import HEAD_BLOCK_ELEMENTS
from qvera.models.stream import PINNED_SHARE
from qvera.tasks import task_of
from qvera.training.plan.activations import (
    kept_bytes,
    kinds_of_layers,
    mask_bytes,
    method_bytes,
    norm_bytes,
    product_shapes,
    transient_bytes,
)
from qvera.training.plan.run import Linear, Machine, PlannedRun, Shape, Sharing
from qvera.utils import accelerator
from qvera.utils.formatting import size

Kind = Literal["base", "projections", "vectors", "checkpoints", "transient", "loss", "answers", "runtime"]

KEPT_HEAP_BYTES = 64 * 2**20  # glibc returns the top of its heap above it (mallopt(3), adapted M_TRIM_THRESHOLD)

_TRL_TILE_TOKENS, _TRL_TILE_WORDS = 4096, 32768  # how TRL 1.16 cuts the logits of DPO and KTO (`trl.kernels`)
_TILE_COPY_BYTES = 29  # for each number of a tile on a CPU: seven fp32 copies in backward and a mask; a GPU makes none
_ORPO_FP32_COPIES = 3  # of all logits, beside those in the compute dtype; measured on a CPU (then 4 % too high)
_OPTIMIZER_STATE = "optimizer state"  # which ranks divide from stage 1 on
_SMALL_8BIT = 4096  # numbers; bitsandbytes keeps fp32 state for smaller tensors


@dataclass(frozen=True)
class Component:
    """A part of the memory."""

    name: str
    kind: Kind
    bytes: int
    mapped: bool = False  # pages of a mapped file: dropped under pressure, shared by the processes of a node


@dataclass(frozen=True)
class Memory:
    """The components that are held throughout, and those that each moment of a run adds."""

    standing: tuple[Component, ...]
    moments: dict[str, tuple[Component, ...]]

    def at(self, moment: str) -> tuple[Component, ...]:
        return (*self.standing, *self.moments[moment])

    @property
    def peak_moment(self) -> str:
        return max(self.moments, key=lambda name: sum(c.bytes for c in self.moments[name]))

    @property
    def peak(self) -> tuple[Component, ...]:
        return self.at(self.peak_moment)

    @property
    def total_bytes(self) -> int:
        return sum(c.bytes for c in self.peak)

    @property
    def mapped_bytes(self) -> int:
        """The bytes at the peak that lie in mapped files. Others can't be dropped under pressure."""
        return sum(c.bytes for c in self.peak if c.mapped)

    def needed_bytes(self, machine: Machine) -> int:
        """Return the bytes that have to fit: on a CPU private ones only, as mapped pages are dropped and read again."""
        return self.total_bytes - (0 if machine.on_gpu else self.mapped_bytes)

    def to_dict(self) -> dict[str, Any]:
        return {
            "total_bytes": self.total_bytes,
            "private_bytes": self.total_bytes - self.mapped_bytes,
            "mapped_bytes": self.mapped_bytes,
            "peak_moment": self.peak_moment,
            "moments": {name: [asdict(c) for c in self.at(name)] for name in self.moments},
        }


def _some(*components: Component) -> tuple[Component, ...]:
    """Return the components that take memory."""
    return tuple(c for c in components if c.bytes)


def four_bit_bytes(numbers: int, double_quant: bool) -> int:
    """Return the bytes of a weight as bitsandbytes holds it: two numbers in a byte, and a scale for each 64.

    Double quantization: one byte a scale and an fp32 for each 256 of those (QLoRA, arXiv 2305.14314, section 3.2).
    """
    blocks = -(-numbers // 64)
    return -(-numbers // 2) + (blocks + 4 * -(-blocks // 256) if double_quant else 4 * blocks)


def weight_storage_bytes(x: Linear, recipe: Recipe, itemsize: int) -> int:
    """Return the bytes of a weight, or of a layer's experts together, as the recipe stores them."""
    how, numbers = recipe.model.quantization, x.n * x.m
    if how == "none" or not x.quantizable:
        return x.numbers * itemsize
    return numbers + 4 * x.m if how == "int8" else (x.experts or 1) * four_bit_bytes(numbers, recipe.model.double_quant)


def layer_bytes(run: PlannedRun) -> list[int]:
    """Return the bytes of each decoder layer's linears and experts in four bits."""
    layers: dict[int, int] = defaultdict(int)
    for x in (*run.shape.linears, *run.shape.experts):
        if run.is_packed(x) and x.layer is not None:
            layers[x.layer] += weight_storage_bytes(x, run.recipe, run.itemsize)
    return list(layers.values())


def stream_bytes(run: PlannedRun) -> int:
    """Return the bytes that a forward and backward pass copies of a streamed base.

    Each layer is copied twice, except for the two that are on the device when the pass turns.
    """
    layers = layer_bytes(run)
    return 2 * sum(layers) * max(0, len(layers) - 2) // max(1, len(layers))


def pinned_layer_bytes(run: PlannedRun) -> int:
    """Return the RAM in which all ranks of a node lock a streamed base; 0 where layers are read from the file."""
    if run.recipe.model.stream is not True or not accelerator.has_own_memory(run.machine.device_type):
        return 0
    size_bytes, free_bytes = sum(layer_bytes(run)) * run.sharing.per_node, run.machine.host_bytes
    return size_bytes if free_bytes is None or size_bytes <= PINNED_SHARE * free_bytes else 0


def resident_bytes(run: PlannedRun) -> int:
    """Return the bytes of copies of the 4-bit linears in 16 bits (`quantization.hold_resident`)."""
    return 2 * sum(x.n * x.m for x in run.shape.linears if x.quantizable)


def optimizer_state_bytes(sizes: list[int], optim: str) -> int:
    """Return the bytes of AdamW's moments: fp32, or 8-bit with an fp32 scale for each 256 where tensors are big."""
    whole = optim in ("adamw", "paged_adamw")
    return sum(8 * n if whole or n < _SMALL_8BIT else 2 * (n + 4 * -(-n // 256)) for n in sizes)


def held_weight_bytes(run: PlannedRun) -> int:
    """Return the bytes of W + ΔW of the layers that go through it (`adapters.products.fused.HeldWeight`)."""
    return run.itemsize * sum(x.n * x.m for x in run.adapted if run.is_summed(x))


def slot_bytes(run: PlannedRun) -> int:
    """Return the bytes of one of many adapters in training: fp32 vectors, their gradients and AdamW's moments."""
    best = run.recipe.training.load_best_model_at_end and not run.machine.on_gpu  # these vectors are kept in RAM
    numbers, trained = (sum(t.numel for t in run.tensors(only)) for only in (False, True))
    return 4 * numbers * (2 if best else 1) + 12 * trained


def plan_memory(run: PlannedRun) -> Memory:
    """Return the memory of a process on its own, with the run's batch as its longest."""
    shape, batch, machine = run.shape, run.batch, run.machine
    T, item = batch.all_tokens, run.itemsize
    # for each kind of layer: what it keeps, the most beside it, how many such layers there are
    layers = [(kept_bytes(each), transient_bytes(each), number) for each, number in kinds_of_layers(run)]
    # what all layers share: pixels, cosines and sines, a dense mask, three integers a token, and the final norm's input
    mask = batch.tokens**2 * item if batch.joined and not batch.offsets else mask_bytes(run)
    once = batch.pixels * item + 2 * batch.tokens * shape.head_dim * item + mask + 3 * T * 8 + norm_bytes(run)
    moments: dict[str, tuple[Component, ...]] = {}
    # backward: recomputed layers are there one at a time, otherwise all at once
    if run.checkpointing:
        layer, transient, _ = max(layers, key=lambda sizes: sizes[0] + sizes[1])
        inputs = min(INPUTS_ON_DEVICE, shape.layers) if run.checkpointing == "offload" else shape.layers
        kept = Component("layer inputs", "checkpoints", inputs * T * shape.hidden * item + once)
        # the first norm keeps the very input that is checkpointed
        recomputed = Component("recomputed layer", "transient", layer - T * shape.hidden * item)
        parts: tuple[Component, ...] = kept, recomputed
    else:
        transient = max(each for _, each, _ in layers)
        # the first layer's first norm has no gradient to give: embeddings are frozen
        all_layers = sum(number * layer for layer, _, number in layers)
        kept = Component("kept activations", "checkpoints", all_layers - norm_bytes(run) + once)
        parts = (kept,)
    moments["backward"] = *parts, Component("gradients and one layer's weights", "transient", transient)
    moments["loss"] = (kept, *_loss(run))  # all layers are through then, and backward has not begun
    if batch.pixels and shape.tower is not None:  # before the text's layers; the processor makes pixels in fp32
        tower = shape.tower.size_bytes(batch.pixels, batch.images, item)
        moments["images"] = (Component("pixels, and the tower that reads them", "transient", batch.pixels * 4 + tower),)
    if answers := _answers(run):
        moments["answers"] = answers
    standing = _standing(run)
    if not machine.on_gpu:
        largest = max(sum(c.bytes for c in parts) for parts in moments.values())
        heap = min(KEPT_HEAP_BYTES, largest)
        if not run.checkpointing:  # holes between what is kept: measured on SmolLM2 in fp32
            heap = max(heap, largest // 4)
        standing += (Component("freed memory that malloc keeps", "runtime", heap),)
    if run.holds_weights:  # answers let go of them
        held = Component("adapted weights kept between steps", "base", held_weight_bytes(run))
        moments = {name: parts if name == "answers" else (*parts, held) for name, parts in moments.items()}
    return Memory(standing, moments)


def _standing(run: PlannedRun) -> tuple[Component, ...]:
    shape, recipe, machine, item, method = run.shape, run.recipe, run.machine, run.itemsize, run.method
    linears = sum(weight_storage_bytes(x, recipe, item) for x in shape.linears if x.quantizable)
    stored = {"none": "dense linears", "int8": "int8 linears"}.get(recipe.model.quantization, "4-bit linears")
    streams = recipe.model.stream is True
    experts = sum(weight_storage_bytes(x, recipe, item) for x in shape.experts if run.is_packed(x))
    dense_experts = shape.expert_numbers + sum(x.numbers for x in shape.experts if not run.is_packed(x))
    if streams and machine.on_gpu:
        linears, experts = linears + experts - sum(layer_bytes(run)), 0
    tables = shape.vocabulary * shape.hidden * (1 if shape.tied else 2) if shape.grown_rows else 0
    (dense_size, dense_mapped), (expert_size, experts_mapped) = machine.dense_itemsize(), machine.dense_itemsize(False)
    dense = (shape.dense_numbers - shape.expert_numbers - tables) * dense_size
    norms = held_bytes(recipe.adapter.rank, [(x.n, x.m) for x in run.adapted], item)
    pairs = 0  # frozen A and B: one pair for all linears, or one for each
    if method.source is Source.SEEDED:
        sizes = [(x.n, x.m) for x in (*run.adapted, *run.adapted_experts)]
        pairs = recipe.adapter.rank * sum(max(side) for side in zip(*sizes, strict=True))
    elif method.source is Source.OWN:
        pairs = sum(run.rank_at(x) * (x.n + x.m) for x in run.adapted)
    # one for each product and token count, and those of the head, whose chunks differ less
    kernels = min(KERNEL_CACHE_SIZE, run.batch.token_counts * product_shapes(run) + 2 * LENGTHS_PER_OCTAVE)
    vectors = sum(t.size_bytes for t in run.tensors())
    if run.slots:  # the bank's adapters (`AdapterBank`), the model's ordinary one, and a copy that each begins with
        name = f"{run.slots} adapters in training, AdamW's moments included"
        held = [Component(name, "vectors", run.slots * slot_bytes(run) + 2 * vectors)]
    else:
        trained = [t.numel for t in run.tensors(trained_only=True)]
        own = [method_bytes(run, x).state for x in run.adapted]  # None: the recipe's optimizer
        state = sum(each for each in own if each is not None)
        state = optimizer_state_bytes(trained, recipe.training.optim) if None in own else state
        held = [
            Component("vectors", "vectors", vectors),  # whole on every rank in each stage: they are read by name
            Component("their gradients", "vectors", 4 * sum(trained)),  # likewise: one bucket, as large as all of them
            Component(_OPTIMIZER_STATE, "vectors", state),
        ]
    return _some(
        Component("interpreter, libraries, rows", "runtime", machine.runtime_bytes),
        Component("CUDA context", "runtime", machine.context_bytes),
        Component("workspaces of matrix products", "runtime", machine.workspace_bytes),
        Component("NCCL's buffers, at most", "runtime", run.collective_bytes),
        Component(stored, "base", linears, machine.mapped_base),
        Component(
            "16-bit copies of 4-bit linears", "base", resident_bytes(run) if recipe.model.resident is True else 0
        ),
        Component("4-bit experts", "base", experts, machine.mapped_base),
        Component("two streamed layers", "base", 2 * max(layer_bytes(run), default=0) if streams else 0),
        Component("experts, not quantized", "base", dense_experts * expert_size, experts_mapped),
        Component("embeddings, head, norms", "base", dense, dense_mapped),
        Component("embedding and head with more rows", "base", tables * dense_size),
        Component("the head as it began", "base", 4 * shape.head_numbers),
        Component("projections A, B", "projections", pairs * item),
        Component("made from the weights", "projections", norms if method.change is Change.SCALED else 0),
        *held,
        Component("kernels of matrix products", "runtime", kernels * machine.kernel_bytes),
    )


def _loss(run: PlannedRun) -> tuple[Component, ...]:
    """Return the memory of the loss: a classifier's, that of `qvera.models.loss` (a chunk of logits), or TRL's."""
    batch, machine, item, task = run.batch, run.machine, run.itemsize, task_of(run.recipe)
    hidden, vocabulary, tokens = run.shape.hidden, run.shape.vocabulary, run.batch.all_tokens
    trained = min(batch.trained_tokens, tokens)

    def states(size_bytes: int) -> Component:
        return Component("hidden states and their gradient", "loss", size_bytes)

    if run.shape.head:  # trained whole: it reads all hidden states of the batch, in fp32
        outputs = min(shape[0] for _, shape in run.shape.head)
        read = 2 * 4 * tokens * hidden if item < 4 else 0  # and their gradient
        pixels = batch.rows * run.shape.image_numbers * (4 + (item if item < 4 else 0))
        logits = Component("logits of a classifier", "loss", 2 * 4 * tokens * outputs + read)
        return _some(logits, states(2 * tokens * hidden * item), Component("pixel values", "loss", pixels))
    if task.loss_is_trl and task.makes_all_logits:  # ORPO's; the others go by tiles of tokens and of the vocabulary
        each = item + _ORPO_FP32_COPIES * 4
        return (Component("logits of all tokens", "loss", tokens * vocabulary * each),)
    if task.loss_is_trl:
        words, each = min(vocabulary, _TRL_TILE_WORDS), item if machine.on_gpu else item + _TILE_COPY_BYTES
        scored = trained if machine.on_gpu else tokens  # a CPU scores the prompts' tokens too
        return (
            Component("a tile of logits", "loss", min(tokens, _TRL_TILE_TOKENS) * words * each),
            Component("a tile of the head", "loss", words * hidden * item),
            states(2 * tokens * hidden * item + 4 * scored * hidden),
        )
    chunk = min(run.recipe.training.loss_chunk_tokens, trained)
    # the head is mapped in 16 bits and cast a block at a time
    block = min(vocabulary * hidden, HEAD_BLOCK_ELEMENTS) * item if machine.dense_itemsize()[0] != item else 0
    wide = 0 if machine.on_gpu else 2 * 4 * min(chunk * vocabulary, CACHED_ELEMENTS * torch.get_num_threads())
    return _some(
        Component("logits of a chunk", "loss", chunk * vocabulary * item + wide),
        states(2 * trained * hidden * item),  # those of the other tokens are freed before
        Component("a block of the head in the compute dtype", "loss", block),
    )


def _answers(run: PlannedRun) -> tuple[Component, ...]:
    """Return the memory of answers. A CPU makes dense copies of weights that take a quarter of what is free at most."""
    shape, machine, item, training = run.shape, run.machine, run.itemsize, run.recipe.training
    has_held_out_rows = run.recipe.data.has_held_out_rows
    answered = max(training.sample_count, training.exact_match_rows) if has_held_out_rows else 0
    if training.objective == "grpo":  # answers each prompt of a step many times, and all held-out ones
        of_step = run.sharing.share(training.global_batch_size) * training.group_size
        answered = training.answer_batch_size if has_held_out_rows else of_step
    if run.slots or not task_of(run.recipe).has_answers or not answered:
        return ()
    tokens = run.batch.longest_row + training.sample_max_new_tokens - training.answer_tokens
    cache = 2 * shape.layers * min(training.answer_batch_size, answered) * tokens * shape.kv_heads * shape.head_dim
    head = shape.vocabulary * shape.hidden * item if machine.dense_itemsize()[0] != item else 0
    weights = [x.n * x.m for x in run.adapted]
    copied = not machine.on_gpu and item * sum(weights) <= machine.available_bytes // 4
    return _some(
        Component("keys and values of answers", "answers", cache * item),
        Component("head in the compute dtype", "answers", head),
        Component("dense weights for answers", "answers", sum(weights) * item + 8 * max(weights) if copied else 0),
    )


class Spread(NamedTuple):
    """Bytes of the base that the ranks divide in stage 3 (`stored_weights.load_mapped`), without statistics."""

    layers: list[list[int]]  # each linear's bytes, two weights in one or 16 bits a weight, by decoder layer
    table: int  # the bytes of the embedding, and as many of the head; 0 where they are one, which is not spread
    dense: int  # the bytes of linears that are not quantized (a checkpoint may say so)

    @property
    def packed(self) -> int:
        return sum(map(sum, self.layers)) - self.dense

    @property
    def all(self) -> int:
        return sum(map(sum, self.layers)) + 2 * self.table


def spread_of(shape: Shape) -> Spread:
    """Return the bytes of the base that the ranks divide in stage 3."""
    layers: dict[int | None, list[int]] = defaultdict(list)
    for x in (*shape.experts, *shape.linears):
        layers[x.layer].append(-(-x.numbers // 2) if x.quantizable else 2 * x.numbers)
    table = 0 if shape.tied else 2 * shape.vocabulary * shape.hidden
    return Spread([*layers.values()], table, sum(2 * x.numbers for x in shape.linears if not x.quantizable))


def plan_rank(run: PlannedRun) -> Memory:
    """Return the memory of one rank (`PlannedRun.memory`): without ZeRO that of a process on its own."""
    sharing, machine = run.sharing, run.machine
    # stage 3 brings the layers to the device itself
    whole = plan_memory(run.changed({"model.stream": False}) if sharing.stage == 3 else run)
    if sharing.stage == 0:
        return whole
    # DeepSpeed keeps fp32 copies of what it steps, so two ranks save nothing by dividing the optimizer's state
    copies = 8 * sharing.share(sum(t.numel for t in run.tensors(trained_only=True)))
    copies += 4 * sharing.share(sum(t.numel for t in run.tensors())) if sharing.stage == 3 else 0
    standing = (
        *(replace(c, bytes=sharing.share(c.bytes)) if c.name == _OPTIMIZER_STATE else c for c in whole.standing),
        Component("a share of vectors and gradients", "vectors", copies),
    )
    if sharing.stage < 3:
        return replace(whole, standing=standing)
    # stage 3: a share of the base in place of the whole, and in each moment the weights that are gathered then
    spread = spread_of(run.shape)
    shares = [] if host_bytes(run) else _shares(spread, sharing)
    # shares are private; statistics stay in the mapped file, and so does an embedding that is the head
    left = sum(c.bytes for c in standing if c.kind == "base") - spread.all
    if run.itemsize != 2 and not machine.mapped_base:  # 16-bit weights are cast; so are norms, a few hundred kB
        left -= (spread.all - spread.packed) * (run.itemsize - 2) // 2
    name = "statistics, embedding (the head too), norms" if run.shape.tied else "statistics, norms"
    largest, layer = max(map(max, spread.layers)), max(map(sum, spread.layers))
    stays = Component(name, "base", left, machine.mapped_base)
    others = (c for c in standing if c.kind != "base")
    moments = {}
    for moment, parts in whole.moments.items():
        one = spread.table if moment == "loss" else largest
        # DeepSpeed keeps the weights of a recomputed layer until its backward pass has begun
        kept = layer if moment == "backward" and run.checkpointing else one
        # on an accelerator the next layer is gathered while one computes (`ZeroConfig.complete`)
        ahead = layer if machine.on_gpu and sharing.offload != "nvme" and moment != "loss" else 0
        moments[moment] = _some(
            *parts,
            Component("gathered weights", "base", kept),
            Component("the next layer's", "base", ahead),
            # gloo gathers into a copy of its own
            Component("gloo's copy of one", "base", 0 if machine.on_gpu or sharing.world_size == 1 else one),
        )
    return Memory(_some(*shares, stays, *others), moments)


def _shares(spread: Spread, sharing: Sharing) -> list[Component]:
    """Return a rank's share of the base where it is stored; for NVMe, the part in RAM (`distributed.zero`)."""
    if sharing.offload != "nvme":
        return [Component("a share of the base", "base", sharing.share(spread.all))]
    largest, most = max(map(max, spread.layers)), max(map(len, spread.layers))
    numel, count = nvme_buffers(largest // 2, most, sharing.world_size)
    shares = [sharing.share(weight) for layer in spread.layers for weight in layer]
    small = sum(share for share in shares if share < IN_RAM_BELOW_BYTES)
    return [
        Component("its share of embedding and head", "base", sharing.share(2 * spread.table)),
        Component("shares too small for NVMe", "base", small),
        Component("buffers between NVMe and RAM", "base", 2 * numel * count),
    ]


class Traffic(NamedTuple):
    """The bytes that reach one rank in an optimizer step. Their sum is all of them."""

    gradients: int  # gradients of the vectors, added up over the ranks, and with ZeRO the stepped vectors again
    base: int  # weights gathered in stage 3


def traffic(run: PlannedRun) -> Traffic:
    """Return the bytes that a step of the recipe's global batch brings to each rank."""
    sharing, world, spread = run.sharing, run.sharing.world_size, spread_of(run.shape)
    trained = sum(t.numel for t in run.tensors(trained_only=True))
    # an all-reduce is a reduction and a gather; the optimizers of stages 1 and 2 do one, and gather the stepped vectors
    # after it
    gradients = (3 if sharing.stage in (1, 2) else 2) * 4 * trained * (world - 1) // world
    # forward, backward, and with checkpointing a recomputation between them
    uses = 3 if run.checkpointing else 2
    # linears that end a layer: their backward pass comes right behind their recomputation
    skipped = sum(layer[-1] for layer in spread.layers) if run.checkpointing else 0
    a_pass = uses * (spread.all - 2 * spread.table) - skipped + 2 * spread.table
    return Traffic(gradients, run.passes * a_pass * (world - 1) // world if sharing.stage == 3 else 0)


def host_bytes(run: PlannedRun) -> int:
    """Return the RAM that offloaded shares of the base take on each node, beside the memory that its ranks need."""
    if run.sharing.offload is None or not run.machine.on_gpu:  # a CPU's device is the RAM that they go to
        return 0
    return run.sharing.per_node * sum(c.bytes for c in _shares(spread_of(run.shape), run.sharing))


def plan_ways(run: PlannedRun, nodes: int, per_node: int) -> list[PlannedRun]:
    """Return a rank's run for every way of sharing that this base can be trained in, the simplest first.

    On a CPU the ranks of a node divide its RAM.
    """
    machine = run.machine
    stages: list[tuple[int, str | None]] = [(0, None), (1, None), (2, None)]
    if run.is_four_bit:  # on a CPU the device is the RAM that a share would be offloaded to
        stages += [(3, None), (3, "cpu"), (3, "nvme")] if machine.on_gpu else [(3, None), (3, "nvme")]
    if not machine.on_gpu:
        machine = replace(machine, available_bytes=machine.available_bytes // per_node)
    return [replace(run, machine=machine, sharing=Sharing(*stage, nodes, per_node)) for stage in stages]


ETHERNET_BYTES_PER_SECOND = 117_000_000  # TCP's payload at 1 Gbit/s; to say what bytes mean in seconds


def right_way(ways: Sequence[PlannedRun]) -> tuple[PlannedRun | None, str]:
    """Return the way to take (None where none fits), and why, in a sentence or two."""
    plain, first = ways[0], next((way for way in ways if way.fits), None)
    least, available = min(ways, key=lambda way: way.needed_bytes), size(plain.machine.available_bytes)
    if first is None:
        needs = f"even {least.sharing.word} needs {size(least.needed_bytes)} a rank"
        return None, f"None fits: {needs}, and there are {available}."
    if first is plain:
        return plain, "Leave deepspeed out: the base fits on each rank."
    why = f"{first.sharing.word}: without it a rank needs {size(plain.needed_bytes)} and has {available}."
    if host := host_bytes(first):
        why += f" The shares of the base take {size(host)} of RAM on each node."
    elif first.sharing.offload == "nvme":
        why += " They are read from a disk on every use, which takes libaio and a base stored as bfloat16."
    return first, why
