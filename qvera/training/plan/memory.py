"""Bytes of a run: what it holds throughout, what each moment of a step adds, its peak, and the sizes of its files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from qvera.adapters import config
from qvera.config.schema import AdapterSection, Recipe
from qvera.data.padding import KERNEL_CACHE_SIZE, LENGTHS_PER_OCTAVE, round_up_length, rounds_lengths
from qvera.models.loss import BLOCK_ELEMENTS
from qvera.training.plan.activations import Adapted, Batch, kept_bytes, norm_bytes, product_shapes, transient_bytes
from qvera.training.plan.machine import Machine
from qvera.training.plan.shapes import Linear, Shape

Kind = Literal["base", "projections", "vectors", "checkpoints", "transient", "loss", "answers", "runtime"]
KINDS: tuple[Kind, ...] = (
    "runtime", "base", "projections", "vectors", "checkpoints", "transient", "loss", "answers",
)  # fmt: skip

KEPT_HEAP_BYTES = 64 * 2**20
"""glibc returns the top of its heap when more than this is free (mallopt(3), M_TRIM_THRESHOLD after it has adapted)."""

_SMALL_8BIT = 4096  # numbers; bitsandbytes keeps fp32 state for smaller tensors
_RANDOM_STATE_BYTES = 5056  # of torch's CPU generator, which each checkpointed layer remembers

_PEFT_PREFIX = "base_model.model."
_CONFIG_BYTES = 800  # adapter_config.json
_STATE_BYTES = 1_500  # state.json without the recipe and the steps' own results, and manifest.json
_RANDOM_BYTES = 5_056


@dataclass(frozen=True)
class Component:
    """A part of the memory.

    Attributes:
        mapped: pages of a mapped file: dropped under pressure, shared by the processes of a node.
        per: what holds one copy of it, each ``rank`` or each ``node`` (mapped pages).
        zero_stage: the ZeRO stage from which on ranks divide it among themselves; None: never.
    """

    name: str
    kind: Kind
    bytes: int
    mapped: bool = False
    per: Literal["rank", "node"] = "rank"
    zero_stage: int | None = None


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


def vector_shapes(adapted: tuple[Linear, ...], section: AdapterSection) -> dict[str, tuple[int, ...]]:
    """Keys of the adapter file, without PEFT's prefix, and the shape of each vector."""
    return {f"{x.name}.{kind}": size for x in adapted for kind, size in config.vector_shapes(section, x.n, x.m).items()}


def trained_shapes(adapted: tuple[Linear, ...], section: AdapterSection) -> dict[str, tuple[int, ...]]:
    """Those of `vector_shapes` that the recipe trains."""
    shapes = vector_shapes(adapted, section)
    return {name: shape for name, shape in shapes.items() if section.train_d or not name.endswith("qvera_d")}


def numbers(shapes: Mapping[str, tuple[int, ...]]) -> list[int]:
    """How many numbers each vector has."""
    return [math.prod(shape) for shape in shapes.values()]


def optimizer_state_bytes(sizes: list[int], optim: str) -> int:
    """AdamW's two moments: fp32, or 8-bit with an fp32 scale for each 256 where a tensor is big enough."""
    if optim in ("adamw", "paged_adamw"):
        return sum(8 * n for n in sizes)
    return sum(8 * n if n < _SMALL_8BIT else 2 * (n + 4 * -(-n // 256)) for n in sizes)


def plan_memory(shape: Shape, recipe: Recipe, batch: Batch, machine: Machine) -> Memory:
    """What this recipe holds on this machine with that batch as its longest.

    Raises:
        InputError: a target matches no linear.
    """
    adapted = shape.adapted(recipe.adapter.targets)
    a = setting(shape, recipe, batch, machine)
    training = recipe.training
    T, size, hidden = batch.all_tokens, machine.itemsize, shape.hidden
    mask = batch.tokens**2 * size if batch.joined else 0
    once = 2 * batch.tokens * shape.head_dim * size + mask + 3 * T * 8 + norm_bytes(a)
    layer = kept_bytes(a)
    checkpoints, above = [], 0
    if training.gradient_checkpointing:
        per_layer = T * hidden * size + _RANDOM_STATE_BYTES
        checkpoints.append(Component("layer inputs", "checkpoints", shape.layers * per_layer + once))
        above = layer - T * hidden * size  # the first norm keeps the very input that is checkpointed
    else:
        # the first layer's first norm has no gradient to give: embeddings are frozen
        kept = shape.layers * layer - norm_bytes(a) + once
        checkpoints.append(Component("kept activations", "checkpoints", kept))
    moving = Component("gradients and one layer's weights", "transient", transient_bytes(a))
    recomputed = (Component("recomputed layer", "transient", above),) if above else ()
    moments = {
        "backward": (*checkpoints, *recomputed, moving),
        "loss": (*checkpoints, *_loss(shape, recipe, batch, machine)),
    }
    answers = _answers(shape, recipe, batch, machine, adapted)
    if answers:
        moments["answers"] = answers
    standing = _standing(shape, recipe, machine, adapted)
    if machine.kernel_bytes:
        standing += (Component("kernels of matrix products", "runtime", _kernels(a) * machine.kernel_bytes),)
    if machine.device_type == "cpu":
        largest = max(sum(c.bytes for c in parts) for parts in moments.values())
        standing += (Component("free heap that malloc keeps", "runtime", min(KEPT_HEAP_BYTES, largest)),)
    return Memory(standing, moments)


def setting(shape: Shape, recipe: Recipe, batch: Batch, machine: Machine) -> Adapted:
    """What the layers run with, for `activations` and `seconds`.

    Raises:
        InputError: a target matches no linear.
    """
    attention = recipe.model.attn_implementation
    return Adapted(
        shape=shape,
        machine=machine,
        batch=batch,
        rank=recipe.adapter.rank,
        b_groups=recipe.adapter.b_groups,
        input_scale=recipe.adapter.input_scale,
        names=frozenset(x.name for x in shape.adapted(recipe.adapter.targets)),
        dropout=recipe.adapter.dropout > 0,
        attention=shape.attention if attention == "auto" else attention,
        quantization=recipe.model.quantization,
    )


def _standing(shape: Shape, recipe: Recipe, machine: Machine, adapted: tuple[Linear, ...]) -> tuple[Component, ...]:
    size = machine.itemsize
    dense_size = 2 if machine.mapped_base else size
    linears = sum(weight_storage_bytes(x, recipe, size) for x in shape.linears if x.quantizable)
    stored = {"none": "dense linears", "int8": "int8 linears"}.get(recipe.model.quantization, "4-bit linears")
    per: Literal["rank", "node"] = "node" if machine.mapped_base else "rank"
    rank = recipe.adapter.rank
    tables = shape.vocabulary * shape.hidden * (1 if shape.tied else 2) if shape.grown_rows else 0
    widest = max(x.n for x in adapted), max(x.m for x in adapted)
    sizes = numbers(vector_shapes(adapted, recipe.adapter))
    trained = numbers(trained_shapes(adapted, recipe.adapter))
    found = [
        Component("interpreter, libraries, rows", "runtime", machine.runtime_bytes),
        Component("CUDA context", "runtime", machine.context_bytes),
        Component(stored, "base", linears, machine.mapped_base, per, 3),
        Component(
            "embeddings, head, norms", "base", (shape.dense_numbers - tables) * dense_size, machine.mapped_base, per, 3
        ),
        Component("embedding and head with more rows", "base", tables * dense_size),
        Component("projections A, B", "projections", rank * sum(widest) * size, zero_stage=None),
        Component("vectors", "vectors", 4 * sum(sizes)),  # whole on every rank in each stage: they are read by name
        Component("their gradients", "vectors", 4 * sum(trained)),  # likewise: one bucket, as large as all of them
        Component("optimizer state", "vectors", optimizer_state_bytes(trained, recipe.training.optim), zero_stage=1),
    ]
    return tuple(c for c in found if c.bytes)


def _kernels(a: Adapted) -> int:
    """How many matrix-product kernels a run compiles: one for each product and token count, and those of the head."""
    counts = LENGTHS_PER_OCTAVE if rounds_lengths(a.machine.dtype, a.machine.device_type) else a.batch.token_counts
    return min(KERNEL_CACHE_SIZE, a.batch.token_counts * product_shapes(a) + 2 * counts)


def _loss(shape: Shape, recipe: Recipe, batch: Batch, machine: Machine) -> tuple[Component, ...]:
    """Memory of `qvera.models.loss`.

    A chunk of logits in fp32 and logsumexp's copy of it, the hidden states of trained tokens, and their gradient.
    """
    size, hidden = machine.itemsize, shape.hidden
    trained = min(batch.trained_tokens, batch.all_tokens)
    chunk = min(
        recipe.training.loss_chunk_tokens,
        round_up_length(trained) if rounds_lengths(machine.dtype, machine.device_type) else trained,
    )
    states = batch.all_tokens * hidden * size + 2 * trained * hidden * size
    found = [
        Component("logits of a chunk", "loss", 2 * chunk * shape.vocabulary * max(size, 4)),
        Component("hidden states and their gradient", "loss", states),
    ]
    if machine.mapped_base and size != 2:  # the head is mapped in 16 bits and cast a block at a time
        block = min(shape.vocabulary * hidden, BLOCK_ELEMENTS)
        found.append(Component("a block of the head in the compute dtype", "loss", block * size))
    return tuple(found)


def _answers(
    shape: Shape, recipe: Recipe, batch: Batch, machine: Machine, adapted: tuple[Linear, ...]
) -> tuple[Component, ...]:
    """Memory of answers during a run (`qvera.evaluation.generate`).

    On a CPU adapted linears get dense copies where these take at most a quarter of the free memory.
    """
    training, data = recipe.training, recipe.data
    if not (data.eval_path or data.eval_fraction) or not (training.sample_count or training.exact_match_rows):
        return ()
    size = machine.itemsize
    tokens = batch.longest_row + training.sample_max_new_tokens
    rows = min(training.answer_batch_size, max(training.sample_count, training.exact_match_rows))
    cache = 2 * shape.layers * rows * tokens * shape.kv_heads * shape.head_dim * size
    found = [Component("keys and values of answers", "answers", cache)]
    numbers = sum(x.n * x.m for x in adapted)
    if machine.mapped_base and size != 2:
        found.append(Component("head in the compute dtype", "answers", shape.vocabulary * shape.hidden * size))
    if machine.device_type == "cpu" and size * numbers <= machine.available_bytes // 4:
        widest = max(x.n * x.m for x in adapted)
        found.append(Component("dense weights for answers", "answers", numbers * size + 2 * widest * 4))
    return tuple(found)


def safetensors_bytes(tensors: Sequence[tuple[str, str, Sequence[int], int]], metadata: dict[str, str] | None) -> int:
    """The size of a file with these tensors: (name, dtype as the format writes it, shape, bytes)."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    for name, dtype, shape, size in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + length + -length % 8 + at


def adapter_bytes(shape: Shape, recipe: Recipe) -> int:
    """The adapter directory: vectors in fp32 and their config."""
    return safetensors_bytes(_fp32(_prefixed(vector_shapes, shape, recipe)), {"format": "pt"}) + _CONFIG_BYTES


def checkpoint_bytes(shape: Shape, recipe: Recipe) -> int:
    """One checkpoint directory: vectors, AdamW's state of those that are trained, random state, position, recipe."""
    state: dict[str, tuple[int, ...]] = {}
    for name, size in _prefixed(trained_shapes, shape, recipe).items():
        state |= {f"{name}/exp_avg": size, f"{name}/exp_avg_sq": size, f"{name}/step": ()}
    saved = safetensors_bytes(_fp32(_prefixed(vector_shapes, shape, recipe)), None)
    random = safetensors_bytes([("cpu", "U8", [_RANDOM_BYTES], _RANDOM_BYTES)], None)
    written = len(json.dumps({"recipe": recipe.to_dict()}, indent=1))
    return saved + safetensors_bytes(_fp32(state), None) + random + written + _STATE_BYTES


def _fp32(shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, str, Sequence[int], int]]:
    return [(name, "F32", shape, 4 * math.prod(shape)) for name, shape in shapes.items()]


def _prefixed(
    which: Callable[[tuple[Linear, ...], AdapterSection], dict[str, tuple[int, ...]]], shape: Shape, recipe: Recipe
) -> dict[str, tuple[int, ...]]:
    found = which(shape.adapted(recipe.adapter.targets), recipe.adapter)
    return {f"{_PEFT_PREFIX}{name}": size for name, size in found.items()}
