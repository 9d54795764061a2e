"""What a plan is made for: a model, a recipe, the longest batch, and the machine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from pydantic import ByteSize, TypeAdapter, ValidationError

from qvera.adapters import config, fused
from qvera.config.schema import ModelSection, Recipe
from qvera.models.linear import BLOCK_WEIGHTS, backward_by_blocks
from qvera.models.loader import pick_compute_dtype
from qvera.training.plan.shapes import Linear, Shape
from qvera.utils import memory
from qvera.utils.errors import InputError

_PEFT_PREFIX = "base_model.model."
CUDA_CONTEXT_BYTES = 500_000_000
"""Device memory of a CUDA context with the kernels of torch and bitsandbytes: assumed where none can be measured."""


@dataclass(frozen=True)
class Machine:
    """Where the run takes place, and how much memory there is."""

    name: str
    device_type: str  # cpu or cuda
    dtype: torch.dtype  # the compute dtype
    mapped_base: bool  # base, embeddings and head lie in a mapped file: pages that can be dropped and shared
    available_bytes: int  # device memory, or the RAM that is free for this process and what it holds already
    runtime_bytes: int = 0  # held before the model is loaded (interpreter, libraries, rows), measured; 0 on a GPU
    context_bytes: int = 0  # the CUDA context
    kernel_bytes: int = 0  # what each new shape of a product leaves behind (`qvera.data.collate`), measured

    @property
    def on_gpu(self) -> bool:
        """Whether it is a GPU."""
        return self.device_type == "cuda"


def parse_size(text: str) -> int:
    """``24GB`` → 24,000,000,000 bytes; a bare number is GB. Decimal, so a card of that name has a little more.

    Raises:
        InputError: it is no size.
    """
    try:
        found = int(TypeAdapter(ByteSize).validate_python(text if text[-1:].isalpha() else f"{text}GB"))
    except ValidationError:
        found = 0
    if found <= 0:
        raise InputError(f"--gpu: takes a size such as 24GB, 24GiB or 24, got {text!r}.")
    return found


def gpu_machine(section: ModelSection, size_bytes: int) -> Machine:
    """A GPU of that size that need not be here: 16-bit compute, an assumed CUDA context."""
    dtype = torch.bfloat16 if section.compute_dtype == "auto" else getattr(torch, section.compute_dtype)
    name = f"a GPU with {size_bytes / 1e9:g} GB"
    return Machine(name, "cuda", dtype, False, size_bytes, context_bytes=CUDA_CONTEXT_BYTES)


def this_machine(section: ModelSection, device: torch.device) -> Machine:
    """The machine that this process runs on, with what the process holds right now."""
    dtype = pick_compute_dtype(section.compute_dtype, device)
    name = memory.device_name(device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        context = max(total - free - torch.cuda.memory_reserved(device), CUDA_CONTEXT_BYTES)
        return Machine(name, "cuda", dtype, False, total, context_bytes=context)
    runtime = memory.private_bytes()
    mapped = section.quantization in ("nf4", "fp4")  # `qvera.models.mmap`; unusual checkpoints are held instead
    available = memory.available_bytes(device) + runtime
    return Machine(name, "cpu", dtype, mapped, available, runtime, kernel_bytes=memory.kernel_bytes(dtype))


@dataclass(frozen=True)
class Batch:
    """One forward pass."""

    rows: int  # B
    tokens: int  # S, of each row, padding included; of the one sequence where the rows are joined
    trained_tokens: int  # in all rows; only these reach the head
    padded: bool  # rows differ in length, so that attention gets a mask
    joined: bool  # the rows stand in one sequence (`qvera.data.collate`), with a mask of its own
    source: str  # where it comes from, in words
    longest_row: int  # tokens of the longest row of all, for answers
    packed_rows: int = 0  # rows of the data in it where they are packed (data.packing)
    token_counts: int = 1  # how many different numbers of tokens the run's forward passes have

    @property
    def all_tokens(self) -> int:
        """Tokens of all rows, padding included."""
        return self.rows * self.tokens


@dataclass(frozen=True)
class PlannedRun:
    """What memory and time are a function of. ``batch`` is the longest forward pass."""

    shape: Shape
    recipe: Recipe
    batch: Batch
    machine: Machine

    @cached_property
    def adapted(self) -> tuple[Linear, ...]:
        """The linears with an adapter; InputError where a target matches none."""
        return self.shape.adapted(self.recipe.adapter.targets)

    @cached_property
    def adapted_names(self) -> frozenset[str]:
        """Their names."""
        return frozenset(x.name for x in self.adapted)

    @cached_property
    def layer(self) -> list[Linear]:
        """The linears of one decoder layer that stands for all; the second one, where some first ones differ."""
        present = sorted({x.layer for x in self.shape.linears if x.layer is not None})
        number = present[min(1, len(present) - 1)]
        return [x for x in self.shape.linears if x.layer == number]

    def vector_shapes(self, trained_only: bool = False) -> dict[str, tuple[int, ...]]:
        """Keys of the adapter file and the shape of each vector; ``trained_only``: of those that the recipe trains."""
        section = self.recipe.adapter
        return {
            f"{_PEFT_PREFIX}{x.name}.{kind}": size
            for x in self.adapted
            for kind, size in config.vector_shapes(section, x.n, x.m).items()
            if section.train_d or kind != "qvera_d" or not trained_only
        }

    def vector_sizes(self, trained_only: bool = False) -> list[int]:
        """How many parameters each of these vectors has."""
        return [math.prod(size) for size in self.vector_shapes(trained_only).values()]

    @property
    def itemsize(self) -> int:
        """Bytes of one element in the compute dtype."""
        return self.machine.dtype.itemsize

    @property
    def rank(self) -> int:
        """The adapter's rank."""
        return self.recipe.adapter.rank

    @property
    def attention(self) -> str:
        """The attention implementation."""
        chosen = self.recipe.model.attn_implementation
        return self.shape.attention if chosen == "auto" else chosen

    def is_quantized(self, x: Linear) -> bool:
        """Whether the recipe quantizes this linear."""
        return self.recipe.model.quantization != "none" and x.quantizable

    def goes_by_blocks(self, x: Linear) -> bool:
        """Whether the weight is never whole: its products take some rows at a time (`qvera.models.linear`)."""
        four_bit = self.recipe.model.quantization in ("nf4", "fp4") and x.quantizable and not self.machine.on_gpu
        large = x.n * x.m > BLOCK_WEIGHTS and x.n % 64 == 0
        return four_bit and large and not self.is_summed(x) and backward_by_blocks(self.batch.all_tokens, x.n)

    def is_summed(self, x: Linear) -> bool:
        """Whether the layer goes through W + ΔW (`qvera.adapters.fused`)."""
        section, machine = self.recipe.adapter, self.machine
        sizes = self.batch.all_tokens, x.n, x.m, section.rank
        may = x.name in self.adapted_names and not section.dropout
        return may and fused.pays(*sizes, machine.dtype, machine.device_type, section.input_scale)

    def keeps_input(self, x: Linear) -> bool:
        """Whether the backward pass needs the layer's input (`qvera.adapters.fused`)."""
        section = self.recipe.adapter
        kept = fused.keeps_input(self.batch.all_tokens, x.n, x.m, section.rank, section.input_scale)
        return self.is_summed(x) and kept
