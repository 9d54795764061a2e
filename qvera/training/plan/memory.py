"""Bytes of a run: what it holds throughout and in each moment of a step; of a process, and of one rank of several.

What ranks divide follows `qvera.distributed`, the optimizers of DeepSpeed 0.19 and `qvera.training.engine`.
tests/distributed/test_stages.py counts it in live objects, and bench/zero.py in whole processes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

from qvera.adapters.methods import Source
from qvera.adapters.methods.base import Change
from qvera.adapters.methods.vera import held_bytes
from qvera.config.schema import Recipe
from qvera.data.rows import KERNEL_CACHE_SIZE, LENGTHS_PER_OCTAVE, round_up_length, rounds_lengths
from qvera.distributed.zero_config import IN_RAM_BELOW_BYTES, nvme_buffers
from qvera.models.loss import BLOCK_ELEMENTS
from qvera.models.stream import PINNED_SHARE
from qvera.training.plan.activations import input_bytes, kept_bytes, norm_bytes, product_shapes, transient_bytes
from qvera.training.plan.run import Linear, Machine, PlannedRun, Shape, Sharing
from qvera.utils import accelerator
from qvera.utils.formatting import duration, size

Kind = Literal["base", "projections", "vectors", "checkpoints", "transient", "loss", "answers", "runtime"]

KEPT_HEAP_BYTES = 64 * 2**20  # glibc returns the top of its heap above it (mallopt(3), adapted M_TRIM_THRESHOLD)

_TRL_TILE_TOKENS, _TRL_TILE_WORDS = 4096, 32768  # how TRL 1.16 cuts the logits of DPO and KTO (`trl.kernels`)
_TILE_COPY_BYTES = 29  # for each number of a tile on a CPU: seven fp32 copies in backward and a mask; a GPU makes none
_ORPO_FP32_COPIES = 3  # of all logits, beside those in the compute dtype; measured on a CPU (then 4 % too high)

_SMALL_8BIT = 4096  # numbers; bitsandbytes keeps fp32 state for smaller tensors


@dataclass(frozen=True)
class Component:
    """A part of the memory."""

    name: str
    kind: Kind
    bytes: int
    mapped: bool = False  # pages of a mapped file: dropped under pressure, shared by the processes of a node
    zero_stage: int | None = None  # from which on ranks divide it among themselves; None: never


@dataclass(frozen=True)
class Memory:
    """Components held throughout, and the moments of a run with what each adds."""

    standing: tuple[Component, ...]
    moments: dict[str, tuple[Component, ...]]

    def at(self, moment: str) -> tuple[Component, ...]:
        """All components held then."""
        return (*self.standing, *self.moments[moment])

    @property
    def peak_moment(self) -> str:
        """The moment with the most bytes."""
        return max(self.moments, key=lambda name: sum(c.bytes for c in self.moments[name]))

    @property
    def peak(self) -> tuple[Component, ...]:
        """The components at the peak."""
        return self.at(self.peak_moment)

    @property
    def total_bytes(self) -> int:
        """Bytes at the peak."""
        return sum(c.bytes for c in self.peak)

    @property
    def mapped_bytes(self) -> int:
        """Bytes at the peak that lie in mapped files."""
        return sum(c.bytes for c in self.peak if c.mapped)

    @property
    def private_bytes(self) -> int:
        """Bytes at the peak that can't be dropped under pressure."""
        return self.total_bytes - self.mapped_bytes

    def needed_bytes(self, machine: Machine) -> int:
        """What has to fit: on a GPU everything, on a CPU what is private. Mapped pages are dropped and read again."""
        return self.total_bytes if machine.on_gpu else self.private_bytes

    def to_dict(self) -> dict[str, Any]:
        """As JSON: every component of every moment."""
        return {
            "total_bytes": self.total_bytes,
            "private_bytes": self.private_bytes,
            "mapped_bytes": self.mapped_bytes,
            "peak_moment": self.peak_moment,
            "moments": {name: [asdict(c) for c in self.at(name)] for name in self.moments},
        }


def four_bit_bytes(numbers: int, double_quant: bool) -> int:
    """A weight of that many numbers as bitsandbytes holds it: two in a byte, and a scale for each 64.

    Double quantization: one byte a scale and an fp32 for each 256 of those (QLoRA, arXiv 2305.14314, section 3.2).
    """
    blocks = -(-numbers // 64)
    return -(-numbers // 2) + (blocks + 4 * -(-blocks // 256) if double_quant else 4 * blocks)


def weight_storage_bytes(x: Linear, recipe: Recipe, itemsize: int) -> int:
    """One linear's weight as the recipe stores it."""
    how, numbers = recipe.model.quantization, x.n * x.m
    if how == "none" or not x.quantizable:
        return numbers * itemsize
    return numbers + 4 * x.m if how == "int8" else four_bit_bytes(numbers, recipe.model.double_quant)


def layer_bytes(run: PlannedRun) -> list[int]:
    """Bytes of each decoder layer's linears as they are stored."""
    layers: dict[int, int] = {}
    for x in run.shape.linears:
        if x.quantizable and x.layer is not None:
            layers[x.layer] = layers.get(x.layer, 0) + weight_storage_bytes(x, run.recipe, run.itemsize)
    return list(layers.values())


def stream_bytes(run: PlannedRun) -> int:
    """What one forward and backward pass copies of a streamed base: each layer twice, but two when the pass turns."""
    layers = layer_bytes(run)
    return 2 * sum(layers) * max(0, len(layers) - 2) // max(1, len(layers))


def pinned_layer_bytes(run: PlannedRun) -> int:
    """RAM on this node in which all its ranks lock a streamed base; 0 where layers are read from the file instead."""
    if not run.streams or not accelerator.has_own_memory(run.machine.device_type):
        return 0
    size_bytes, free_bytes = sum(layer_bytes(run)) * run.sharing.per_node, run.machine.host_bytes
    return size_bytes if free_bytes is None or size_bytes <= PINNED_SHARE * free_bytes else 0


def optimizer_state_bytes(sizes: list[int], optim: str) -> int:
    """AdamW's two moments: fp32, or 8-bit with an fp32 scale for each 256 where a tensor is big enough."""
    if optim in ("adamw", "paged_adamw"):
        return sum(8 * n for n in sizes)
    return sum(8 * n if n < _SMALL_8BIT else 2 * (n + 4 * -(-n // 256)) for n in sizes)


def plan_memory(run: PlannedRun) -> Memory:
    """What a process on its own holds, with the run's batch as its longest."""
    shape, batch, machine = run.shape, run.batch, run.machine
    T, size, hidden = batch.all_tokens, run.itemsize, shape.hidden
    mask = batch.tokens**2 * size if batch.joined and not batch.offsets else 0
    once = 2 * batch.tokens * shape.head_dim * size + mask + 3 * T * 8 + norm_bytes(run)
    layer = kept_bytes(run)
    moving = Component("gradients and one layer's weights", "transient", transient_bytes(run))
    backward: tuple[Component, ...]
    if run.checkpointing:
        kept = Component("layer inputs", "checkpoints", input_bytes(run) + once)
        # the first norm keeps the very input that is checkpointed
        backward = (kept, Component("recomputed layer", "transient", layer - T * hidden * size), moving)
    else:
        # the first layer's first norm has no gradient to give: embeddings are frozen
        kept = Component("kept activations", "checkpoints", shape.layers * layer - norm_bytes(run) + once)
        backward = (kept, moving)
    moments = {"backward": backward, "loss": (kept, *_loss(run))}
    if answers := _answers(run):
        moments["answers"] = answers
    standing = _standing(run)
    if machine.kernel_bytes:  # one for each product and token count, and those of the head
        counts = batch.token_counts
        of_head = LENGTHS_PER_OCTAVE if rounds_lengths(machine.dtype, machine.device_type) else counts
        kernels = min(KERNEL_CACHE_SIZE, counts * product_shapes(run) + 2 * of_head)
        standing += (Component("kernels of matrix products", "runtime", kernels * machine.kernel_bytes),)
    if not machine.on_gpu:
        largest = max(sum(c.bytes for c in parts) for parts in moments.values())
        standing += (Component("free heap that malloc keeps", "runtime", min(KEPT_HEAP_BYTES, largest)),)
    if run.holds_weights:  # answers let go of them
        held = Component("adapted weights between steps", "base", held_weight_bytes(run))
        moments = {name: parts if name == "answers" else (*parts, held) for name, parts in moments.items()}
    return Memory(standing, moments)


def _standing(run: PlannedRun) -> tuple[Component, ...]:
    shape, recipe, machine, size = run.shape, run.recipe, run.machine, run.itemsize
    linears = sum(weight_storage_bytes(x, recipe, size) for x in shape.linears if x.quantizable)
    stored = {"none": "dense linears", "int8": "int8 linears"}.get(recipe.model.quantization, "4-bit linears")
    tables = shape.vocabulary * shape.hidden * (1 if shape.tied else 2) if shape.grown_rows else 0
    (dense_size, dense_mapped), (expert_size, experts_mapped) = machine.dense_itemsize(), machine.dense_itemsize(False)
    dense = (shape.dense_numbers - shape.expert_numbers - tables) * dense_size
    trained = run.vector_sizes(trained_only=True)
    sizes = [(x.n, x.m) for x in run.adapted]
    norms = held_bytes(run.rank, sizes, size) if run.method.change is Change.SCALED else 0
    buffers = 2 * max(layer_bytes(run), default=0) if run.streams else 0
    if run.streams and machine.on_gpu:
        linears -= sum(layer_bytes(run))
    parts = [
        Component("interpreter, libraries, rows", "runtime", machine.runtime_bytes),
        Component("CUDA context", "runtime", machine.context_bytes),
        Component("workspaces of matrix products", "runtime", machine.workspace_bytes),
        Component(stored, "base", linears, machine.mapped_base, 3),
        Component("two streamed layers", "base", buffers),
        Component("experts, not quantized", "base", shape.expert_numbers * expert_size, experts_mapped, 3),
        Component("embeddings, head, norms", "base", dense, dense_mapped, 3),
        Component("embedding and head with more rows", "base", tables * dense_size),
        Component("the head as it began", "base", 4 * shape.head_numbers),
        Component("projections A, B", "projections", _projection_numbers(run) * size),
        Component("made from the weights", "projections", norms),
        *_vectors(run, trained),
    ]
    return tuple(c for c in parts if c.bytes)


def _vectors(run: PlannedRun, trained: list[int]) -> tuple[Component, ...]:
    """Vectors, gradients and optimizer state: of one adapter, or of those in flight together (`AdapterBank`)."""
    if run.slots:
        # and the ordinary adapter that the model has, and what every adapter begins with
        bank = run.slots * slot_bytes(run) + 2 * run.vector_bytes
        return (Component(f"{run.slots} adapters in training, AdamW's moments included", "vectors", bank),)
    own = [run.method_bytes(x).state for x in run.adapted]  # None: the recipe's optimizer
    state = sum(size for size in own if size is not None)
    state = optimizer_state_bytes(trained, run.recipe.training.optim) if None in own else state
    return (
        Component("vectors", "vectors", run.vector_bytes),  # whole on every rank in each stage: they are read by name
        Component("their gradients", "vectors", 4 * sum(trained)),  # likewise: one bucket, as large as all of them
        Component("optimizer state", "vectors", state, zero_stage=1),
    )


def _projection_numbers(run: PlannedRun) -> int:
    """Numbers of the frozen A and B: one pair for all linears, or one for each."""
    if run.method.source is Source.SEEDED:
        return run.rank * (max(x.n for x in run.adapted) + max(x.m for x in run.adapted))
    return sum(run.rank_at(x) * (x.n + x.m) for x in run.adapted) if run.method.source is Source.OWN else 0


def held_weight_bytes(run: PlannedRun) -> int:
    """W + ΔW of the layers that go through it (`adapters.products.fused.HeldWeight`)."""
    return run.itemsize * sum(x.n * x.m for x in run.adapted if run.is_summed(x))


def slot_bytes(run: PlannedRun) -> int:
    """Bytes of one of many adapters in training: fp32 vectors, their gradients and AdamW's two moments."""
    best = run.recipe.training.load_best_model_at_end and not run.machine.on_gpu  # these vectors are kept in RAM
    return 4 * sum(run.vector_sizes()) * (2 if best else 1) + 12 * sum(run.vector_sizes(trained_only=True))


def _loss(run: PlannedRun) -> tuple[Component, ...]:
    """Memory of `qvera.models.loss`: a chunk of fp32 logits, logsumexp's copy, hidden states and their gradient."""
    batch, machine, size = run.batch, run.machine, run.itemsize
    hidden, vocabulary = run.shape.hidden, run.shape.vocabulary
    if run.shape.head:  # trained whole: it reads all hidden states of the batch, in fp32
        tokens, outputs = batch.all_tokens, min(shape[0] for _, shape in run.shape.head)
        read = 2 * 4 * tokens * hidden if size < 4 else 0  # and their gradient
        pixels = batch.rows * run.shape.image_numbers * (4 + (size if size < 4 else 0))
        parts = (
            Component("logits of a classifier", "loss", 2 * 4 * tokens * outputs + read),
            Component("hidden states and their gradient", "loss", 2 * tokens * hidden * size),
            Component("pixel values", "loss", pixels),
        )
        return tuple(c for c in parts if c.bytes)
    if run.task.loss_is_trl:
        return _trl_loss(run)
    trained = min(batch.trained_tokens, batch.all_tokens)
    rounded = round_up_length(trained) if rounds_lengths(machine.dtype, machine.device_type) else trained
    chunk = min(run.recipe.training.loss_chunk_tokens, rounded)
    states = batch.all_tokens * hidden * size + 2 * trained * hidden * size
    components = [
        Component("logits of a chunk", "loss", 2 * chunk * vocabulary * max(size, 4)),
        Component("hidden states and their gradient", "loss", states),
    ]
    if machine.dense_itemsize()[0] != size:  # the head is mapped in 16 bits and cast a block at a time
        block = min(vocabulary * hidden, BLOCK_ELEMENTS)
        components.append(Component("a block of the head in the compute dtype", "loss", block * size))
    return tuple(components)


def _trl_loss(run: PlannedRun) -> tuple[Component, ...]:
    """Memory of TRL's losses. ORPO's makes all logits; the others go by tiles of tokens and of the vocabulary."""
    batch, size = run.batch, run.itemsize
    hidden, vocabulary, tokens = run.shape.hidden, run.shape.vocabulary, run.batch.all_tokens
    if run.task.makes_all_logits:
        copies = size + _ORPO_FP32_COPIES * 4
        return (Component("logits of all tokens", "loss", tokens * vocabulary * copies),)
    on_gpu = run.machine.on_gpu
    tile = min(tokens, _TRL_TILE_TOKENS) * min(vocabulary, _TRL_TILE_WORDS)
    scored = min(batch.trained_tokens, tokens) if on_gpu else tokens  # a CPU scores the prompts' tokens too
    return (
        Component("a tile of logits", "loss", tile * (size if on_gpu else size + _TILE_COPY_BYTES)),
        Component("a tile of the head", "loss", min(vocabulary, _TRL_TILE_WORDS) * hidden * size),
        Component("hidden states and their gradient", "loss", 2 * tokens * hidden * size + 4 * scored * hidden),
    )


def _answers(run: PlannedRun) -> tuple[Component, ...]:
    """Memory of answers; on a CPU with dense copies of weights that take at most a quarter of the free memory."""
    shape, machine, size = run.shape, run.machine, run.itemsize
    training, data = run.recipe.training, run.recipe.data
    if run.slots or not run.task.has_answers or not data.has_held_out_rows:
        return ()
    if not (training.sample_count or training.exact_match_rows):
        return ()
    tokens = run.batch.longest_row + training.sample_max_new_tokens
    rows = min(training.answer_batch_size, max(training.sample_count, training.exact_match_rows))
    cache = 2 * shape.layers * rows * tokens * shape.kv_heads * shape.head_dim * size
    parts = [Component("keys and values of answers", "answers", cache)]
    if machine.dense_itemsize()[0] != size:
        parts.append(Component("head in the compute dtype", "answers", shape.vocabulary * shape.hidden * size))
    weights = [x.n * x.m for x in run.adapted]
    if not machine.on_gpu and size * sum(weights) <= machine.available_bytes // 4:
        parts.append(Component("dense weights for answers", "answers", sum(weights) * size + 2 * max(weights) * 4))
    return tuple(parts)


ETHERNET_BYTES_PER_SECOND = 117_000_000  # TCP's payload at 1 Gbit/s; to say what bytes mean in seconds


@dataclass(frozen=True)
class Spread:
    """Bytes of the base that the ranks divide in stage 3 (`stored_weights.load_mapped`), without statistics."""

    packed: int  # 4-bit weights of all layers
    largest: int  # of those, one linear's at most
    layer: int  # of those, one decoder layer's at most
    last: int  # of those, linears that end a layer: their backward pass comes right behind their recomputation
    table: int  # the embedding, and the head as much again; 0 where they are one, which is not spread
    dense: int  # linears that are not quantized (a checkpoint may say so), in 16 bits
    weights: list[list[int]]  # of each linear, packed or dense, by decoder layer

    @property
    def all(self) -> int:
        """Bytes that the ranks divide."""
        return self.packed + 2 * self.table + self.dense


def spread_of(shape: Shape) -> Spread:
    """What the ranks divide in stage 3."""
    packed = {x: -(-x.n * x.m // 2) for x in shape.linears if x.quantizable}
    layers: dict[int | None, int] = defaultdict(int)
    weights: dict[int | None, list[int]] = defaultdict(list)
    for x in shape.linears:
        layers[x.layer] += packed.get(x, 0)
        weights[x.layer].append(packed.get(x, 2 * x.n * x.m))
    last = {x.layer: packed.get(x, 0) for x in shape.linears if x.layer is not None}
    return Spread(
        packed=sum(packed.values()),
        largest=max(packed.values(), default=0),
        layer=max(layers.values(), default=0),
        last=sum(last.values()),
        table=0 if shape.tied else 2 * shape.vocabulary * shape.hidden,
        dense=sum(2 * x.n * x.m for x in shape.linears if not x.quantizable),
        weights=list(weights.values()),
    )


def plan_rank(run: PlannedRun) -> Memory:
    """What one rank holds; `plan_memory` for a process on its own."""
    sharing = run.sharing
    if sharing.stage == 3:  # which brings the layers to the device itself
        run = run.changed(model__stream=False)
    whole = plan_memory(run)
    if sharing.stage == 0:
        return whole
    # DeepSpeed keeps fp32 copies of what it steps, so two ranks save nothing by dividing the optimizer's state
    copies = 2 * 4 * sharing.share(sum(run.vector_sizes(trained_only=True)))
    copies += 4 * sharing.share(sum(run.vector_sizes())) if sharing.stage == 3 else 0
    standing = (
        *(replace(c, bytes=sharing.share(c.bytes)) if c.zero_stage == 1 else c for c in whole.standing),
        Component("a share of vectors and gradients", "vectors", copies, zero_stage=1),
    )
    if sharing.stage < 3:
        return replace(whole, standing=standing)
    spread = spread_of(run.shape)
    moments = {name: (*parts, *_gathered(name, spread, run, sharing)) for name, parts in whole.moments.items()}
    return Memory(_base(standing, spread, run, sharing), moments)


def _base(parts: tuple[Component, ...], spread: Spread, run: PlannedRun, sharing: Sharing) -> tuple[Component, ...]:
    """Shares are private; statistics stay in the mapped file, and so does an embedding that is the head."""
    machine = run.machine
    if sharing.offload is None:
        shares = [Component("a share of the base", "base", sharing.share(spread.all), zero_stage=3)]
    else:  # on a CPU the device is the RAM that it goes to
        shares = [] if machine.on_gpu else _offloaded(spread, sharing)
    left = sum(c.bytes for c in parts if c.kind == "base") - spread.all
    if run.itemsize != 2 and not machine.mapped_base:  # 16-bit weights are cast; so are norms, a few hundred kB
        left -= (spread.all - spread.packed) * (run.itemsize - 2) // 2
    name = "statistics, embedding (the head too), norms" if run.shape.tied else "statistics, norms"
    stays = Component(name, "base", left, machine.mapped_base)
    return tuple(c for c in (*shares, stays, *(c for c in parts if c.kind != "base")) if c.bytes)


def _offloaded(spread: Spread, sharing: Sharing) -> list[Component]:
    """RAM of a rank's share of an offloaded base (`qvera.distributed.zero_params`)."""
    if sharing.offload == "cpu":
        return [Component("a share of the base", "base", sharing.share(spread.all), zero_stage=3)]
    shares = [[sharing.share(weight) for weight in layer] for layer in spread.weights]
    largest = max((weight for layer in spread.weights for weight in layer), default=0)
    numel, count = nvme_buffers(largest // 2, max(map(len, shares), default=0), sharing.world_size)
    small = sum(one for layer in shares for one in layer if one < IN_RAM_BELOW_BYTES)
    return [
        Component("its share of embedding and head", "base", sharing.share(2 * spread.table), zero_stage=3),
        Component("shares too small for NVMe", "base", small, zero_stage=3),
        Component("buffers between NVMe and RAM", "base", 2 * numel * count),
    ]


def _gathered(moment: str, spread: Spread, run: PlannedRun, sharing: Sharing) -> tuple[Component, ...]:
    """Weights that are whole on a rank while they are used, and what gathering them takes."""
    whole = largest = spread.table if moment == "loss" else spread.largest
    if moment == "backward" and run.checkpointing:
        # DeepSpeed keeps those of a recomputed layer until its backward pass has begun
        whole = spread.layer
    gathering = 0 if run.machine.on_gpu or sharing.world_size == 1 else largest  # gloo gathers into a copy of its own
    # on an accelerator the next layer is gathered while one computes (`ZeroConfig.complete`)
    ahead = spread.layer if run.machine.on_gpu and sharing.offload != "nvme" and moment != "loss" else 0
    parts = (
        Component("gathered weights", "base", whole),
        Component("the next layer's", "base", ahead),
        Component("gloo's copy of one", "base", gathering),
    )
    return tuple(c for c in parts if c.bytes)


class Traffic(NamedTuple):
    """Bytes that reach one rank in an optimizer step; their sum is all of them."""

    gradients: int  # of the vectors, added up over the ranks (and, with ZeRO, the stepped vectors again)
    base: int  # weights gathered in stage 3


def traffic(run: PlannedRun) -> Traffic:
    """What a step of the recipe's global batch brings to each rank."""
    sharing, world = run.sharing, run.sharing.world_size
    if world == 1:
        return Traffic(0, 0)
    trained = sum(run.vector_sizes(trained_only=True))
    # an all-reduce is a reduction and a gather; the optimizers of stages 1 and 2 do one, and gather the stepped vectors
    # after it
    times = 3 if sharing.stage in (1, 2) else 2
    gradients = times * 4 * trained * (world - 1) // world
    if sharing.stage < 3:
        return Traffic(gradients, 0)
    spread, checkpointing = spread_of(run.shape), run.checkpointing
    uses = 3 if checkpointing else 2  # forward, recomputation, backward
    a_pass = uses * (spread.packed + spread.dense) - (spread.last if checkpointing else 0) + 2 * spread.table
    return Traffic(gradients, run.passes * a_pass * (world - 1) // world)


@dataclass(frozen=True)
class Way:
    """One way of sharing the model, planned."""

    sharing: Sharing
    memory: Memory
    needed_bytes: int  # device memory (GPU) or private RAM (CPU) of one rank
    available_bytes: int  # what one rank can have of that; on a CPU the ranks of a node divide its RAM
    host_bytes: int  # RAM that offloaded shares take on each node beside that
    traffic: Traffic

    @property
    def fits(self) -> bool:
        """Whether one rank has the memory."""
        return self.needed_bytes <= self.available_bytes

    def to_dict(self) -> dict[str, Any]:
        """As JSON, for ``qvera plan --json``."""
        return {
            "deepspeed": self.sharing.word,
            "needed_bytes": self.needed_bytes,
            "available_bytes": self.available_bytes,
            "host_bytes": self.host_bytes,
            "fits": self.fits,
            "received_bytes_per_step": self.traffic._asdict(),
            "memory": self.memory.to_dict(),
        }


def plan_ways(run: PlannedRun, nodes: int, per_node: int) -> list[Way]:
    """Every way of sharing that this base can be trained in, the simplest first."""
    on_gpu = run.machine.on_gpu
    available = run.machine.available_bytes // (1 if on_gpu else per_node)
    stages: list[tuple[int, str | None]] = [(0, None), (1, None), (2, None)]
    if run.recipe.model.quantization in ("nf4", "fp4"):
        # on a CPU the device is the RAM that a share would be offloaded to
        stages += [(3, None), (3, "cpu"), (3, "nvme")] if on_gpu else [(3, None), (3, "nvme")]
    ways = []
    for stage, offload in stages:
        sharing = Sharing(stage, offload, nodes, per_node)
        shared = replace(run, sharing=sharing)
        memory, received = plan_rank(shared), traffic(shared)
        beside = _offloaded(spread_of(run.shape), sharing) if offload is not None and on_gpu else []
        host = per_node * sum(c.bytes for c in beside)
        ways.append(Way(sharing, memory, memory.needed_bytes(run.machine), available, host, received))
    return ways


def right_way(ways: Sequence[Way], machine: Machine) -> tuple[Way | None, str]:
    """The way to take, and why, in a sentence or two; None where none fits."""
    plain = ways[0]
    first = next((way for way in ways if way.fits), None)
    if first is None:
        least = min(ways, key=lambda way: way.needed_bytes)
        return None, (
            f"None fits: even {least.sharing.word} needs {size(least.needed_bytes)} a rank, and there are "
            f"{size(least.available_bytes)}."
        )
    if first is plain:
        less = plain.needed_bytes - min(way.needed_bytes for way in ways if way.sharing.stage in (1, 2))
        saved = f"{size(less)} of {size(plain.needed_bytes)}" if less > 0 else "nothing"
        why = f"Leave deepspeed out: the base fits on each rank, and zero1 and zero2 would save {saved}."
        sharded = next((way for way in ways if way.sharing.word == "zero3"), None)
        if sharded is not None and sharded.traffic.base:
            pages = "" if machine.on_gpu else " and make private memory of pages that ranks share now"
            why += f" zero3 would bring {_travel(sharded.traffic.base)}{pages}."
        return plain, why
    if first.sharing.stage < 3:
        return first, f"{first.sharing.word}: it fits by the few MB of the optimizer's state that ranks divide."
    network = "so the machines want a fast network" if first.sharing.nodes > 1 else "but these ranks are on one machine"
    why = (
        f"{first.sharing.word}: with the whole base a rank needs {size(plain.needed_bytes)} and has "
        f"{size(plain.available_bytes)}; spread, {size(first.needed_bytes)}. It brings "
        f"{_travel(first.traffic.base)}, {network}."
    )
    if first.host_bytes:
        why += f" The shares take {size(first.host_bytes)} of RAM on each node."
    elif first.sharing.offload == "nvme":
        why += " They are read from a disk on every use, which takes libaio and a base stored as bfloat16."
    return first, why


def _travel(base_bytes: int) -> str:
    seconds = duration(base_bytes / ETHERNET_BYTES_PER_SECOND)
    return f"{size(base_bytes)} of weights to each rank in every step ({seconds} at 1 Gbit/s)"
