"""Bytes of a run: what it holds throughout, what each moment of a step adds, its peak, and the sizes of its files."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from qvera.adapters.methods import Source
from qvera.adapters.methods.base import Change
from qvera.adapters.products.magnitude import held_bytes
from qvera.config.schema import Recipe
from qvera.data.rows import KERNEL_CACHE_SIZE, LENGTHS_PER_OCTAVE, round_up_length, rounds_lengths
from qvera.models.loss import BLOCK_ELEMENTS
from qvera.models.stream import PINNED_SHARE
from qvera.training.plan.activations import input_bytes, kept_bytes, norm_bytes, product_shapes, transient_bytes
from qvera.training.plan.bank import slot_bytes
from qvera.training.plan.run import Machine, PlannedRun
from qvera.training.plan.shape import Linear
from qvera.utils import accelerator

Kind = Literal["base", "projections", "vectors", "checkpoints", "transient", "loss", "answers", "runtime"]

KEPT_HEAP_BYTES = 64 * 2**20
"""glibc returns the top of its heap when more than this is free (mallopt(3), M_TRIM_THRESHOLD after it has adapted)."""

_TRL_TILE_TOKENS, _TRL_TILE_WORDS = 4096, 32768
"""How TRL 1.16 cuts the logits of DPO's and KTO's losses (`trl.kernels`)."""
_TILE_COPY_BYTES = 29
"""For each number of a tile, in torch's code on a CPU: seven fp32 copies in backward and a mask; a card's kernel makes
none."""
_ORPO_FP32_COPIES = 3
"""Of all logits, beside those in the compute dtype: measured on a CPU, where the plan then was 4 % too high."""

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
        """All components held at that moment."""
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
    """Of each decoder layer, its linears as they are stored."""
    layers: dict[int, int] = {}
    for x in run.shape.linears:
        if x.quantizable and x.layer is not None:
            layers[x.layer] = layers.get(x.layer, 0) + weight_storage_bytes(x, run.recipe, run.itemsize)
    return list(layers.values())


def pinned_layer_bytes(run: PlannedRun) -> int:
    """RAM that the layers of a streamed base are locked in on this node, by all of its ranks.

    0 where they are read from the mapped file, since so much RAM is not free (`qvera.models.stream`).
    """
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
    if machine.kernel_bytes:
        standing += (Component("kernels of matrix products", "runtime", _kernels(run) * machine.kernel_bytes),)
    if not machine.on_gpu:
        largest = max(sum(c.bytes for c in parts) for parts in moments.values())
        standing += (Component("free heap that malloc keeps", "runtime", min(KEPT_HEAP_BYTES, largest)),)
    if run.holds_weights:  # answers let go of them
        held = Component("adapted weights between steps", "base", _held_bytes(run))
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
    found = [
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
    return tuple(c for c in found if c.bytes)


def _vectors(run: PlannedRun, trained: list[int]) -> tuple[Component, ...]:
    """Vectors, gradients and optimizer state: of one adapter, or of those in flight together (`AdapterBank`)."""
    if run.slots:
        # and the ordinary adapter that the model has, and what every adapter begins with
        bank = run.slots * slot_bytes(run) + 2 * run.vector_bytes
        return (Component(f"{run.slots} adapters in training, AdamW's moments included", "vectors", bank),)
    return (
        Component("vectors", "vectors", run.vector_bytes),  # whole on every rank in each stage: they are read by name
        Component("their gradients", "vectors", 4 * sum(trained)),  # likewise: one bucket, as large as all of them
        Component("optimizer state", "vectors", _optimizer_bytes(run, trained), zero_stage=1),
    )


def _optimizer_bytes(run: PlannedRun, trained: list[int]) -> int:
    """Bytes of the optimizer's state: the method's own, or of that which the recipe names."""
    own = [run.method_bytes(x).state for x in run.adapted]
    if None in own:
        return optimizer_state_bytes(trained, run.recipe.training.optim)
    return sum(size for size in own if size is not None)


def _projection_numbers(run: PlannedRun) -> int:
    """Numbers of the frozen A and B: one pair for all linears, or one for each."""
    if run.method.source is Source.SEEDED:
        return run.rank * (max(x.n for x in run.adapted) + max(x.m for x in run.adapted))
    return sum(run.rank_at(x) * (x.n + x.m) for x in run.adapted) if run.method.source is Source.OWN else 0


def _held_bytes(run: PlannedRun) -> int:
    """W + ΔW of the layers that go through it (`adapters.fused.HeldWeight`)."""
    return run.itemsize * sum(x.n * x.m for x in run.adapted if run.is_summed(x))


def hold_weights(run: PlannedRun) -> PlannedRun:
    """The run with W + ΔW held between optimizer steps, where a process alone can hold them; else as it is.

    That is on a CPU, where they take at most a quarter of the free memory and the run still fits.
    """
    if run.machine.on_gpu or run.sharing.world_size > 1 or run.sharing.stage == 3 or run.mixes_rows:
        return run
    held, free_bytes = replace(run, holds_weights=True), run.machine.available_bytes
    size_bytes = _held_bytes(held)
    fits = size_bytes <= free_bytes // 4 and plan_memory(held).needed_bytes(run.machine) <= free_bytes
    return held if size_bytes and fits else run


def _kernels(run: PlannedRun) -> int:
    """How many matrix-product kernels a run compiles: one for each product and token count, and those of the head."""
    machine, counts = run.machine, run.batch.token_counts
    of_head = LENGTHS_PER_OCTAVE if rounds_lengths(machine.dtype, machine.device_type) else counts
    return min(KERNEL_CACHE_SIZE, counts * product_shapes(run) + 2 * of_head)


def _loss(run: PlannedRun) -> tuple[Component, ...]:
    """Memory of `qvera.models.loss`.

    A chunk of logits in fp32 and logsumexp's copy of it, the hidden states of trained tokens, and their gradient.
    """
    batch, machine, size = run.batch, run.machine, run.itemsize
    hidden, vocabulary = run.shape.hidden, run.shape.vocabulary
    if run.shape.head:
        return _head_loss(run)
    if run.task.loss_is_trl:
        return _trl_loss(run)
    trained = min(batch.trained_tokens, batch.all_tokens)
    rounded = round_up_length(trained) if rounds_lengths(machine.dtype, machine.device_type) else trained
    chunk = min(run.recipe.training.loss_chunk_tokens, rounded)
    states = batch.all_tokens * hidden * size + 2 * trained * hidden * size
    found = [
        Component("logits of a chunk", "loss", 2 * chunk * vocabulary * max(size, 4)),
        Component("hidden states and their gradient", "loss", states),
    ]
    if machine.dense_itemsize()[0] != size:  # the head is mapped in 16 bits and cast a block at a time
        block = min(vocabulary * hidden, BLOCK_ELEMENTS)
        found.append(Component("a block of the head in the compute dtype", "loss", block * size))
    return tuple(found)


def _head_loss(run: PlannedRun) -> tuple[Component, ...]:
    """Memory of a head that is trained whole: it reads all hidden states of the batch, in fp32."""
    tokens, hidden = run.batch.all_tokens, run.shape.hidden
    outputs = min(size[0] for _, size in run.shape.head)
    read = 2 * 4 * tokens * hidden if run.itemsize < 4 else 0  # and their gradient
    return (
        Component("logits of a classifier", "loss", 2 * 4 * tokens * outputs + read),
        Component("hidden states and their gradient", "loss", 2 * tokens * hidden * run.itemsize),
        *_pixels(run),
    )


def _pixels(run: PlannedRun) -> tuple[Component, ...]:
    """The pixel values of a pass of images, in fp32 and in the compute dtype."""
    numbers = run.batch.rows * run.shape.image_numbers
    each = 4 + (run.itemsize if run.itemsize < 4 else 0)
    return (Component("pixel values", "loss", numbers * each),) if numbers else ()


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
    """Memory of answers during a run (`qvera.evaluation.generate`).

    On a CPU adapted linears get dense copies where these take at most a quarter of the free memory.
    """
    shape, machine, size = run.shape, run.machine, run.itemsize
    training, data = run.recipe.training, run.recipe.data
    if run.slots or not run.task.has_answers or not data.has_held_out_rows:
        return ()
    if not (training.sample_count or training.exact_match_rows):
        return ()
    tokens = run.batch.longest_row + training.sample_max_new_tokens
    rows = min(training.answer_batch_size, max(training.sample_count, training.exact_match_rows))
    cache = 2 * shape.layers * rows * tokens * shape.kv_heads * shape.head_dim * size
    found = [Component("keys and values of answers", "answers", cache)]
    if machine.dense_itemsize()[0] != size:
        found.append(Component("head in the compute dtype", "answers", shape.vocabulary * shape.hidden * size))
    weights = [x.n * x.m for x in run.adapted]
    if not machine.on_gpu and size * sum(weights) <= machine.available_bytes // 4:
        found.append(Component("dense weights for answers", "answers", sum(weights) * size + 2 * max(weights) * 4))
    return tuple(found)
