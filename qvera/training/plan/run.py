"""What a plan is made for: the shapes of a model (read without its weights), a recipe, a batch, and the machine."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from pydantic import ByteSize, TypeAdapter, ValidationError

from qvera.adapters.config import PREFIX, SHARED_PREFIX
from qvera.adapters.methods import Method, method_of
from qvera.adapters.methods.base import Change, LinearBytes, trains_pair
from qvera.adapters.products import fused
from qvera.config import plugins
from qvera.config.schema import ModelSection, Recipe
from qvera.models.checkpointing import Mode
from qvera.models.linear import BLOCK_WEIGHTS, backward_by_blocks
from qvera.models.loader import pick_compute_dtype
from qvera.models.quantized_cache import how_stored
from qvera.tasks import Task, task_of
from qvera.training.plan.ranks import ALONE, Sharing, share
from qvera.training.plan.shape import Linear, Shape
from qvera.utils import accelerator, memory
from qvera.utils.errors import InputError

CUDA_CONTEXT_BYTES = 500_000_000
"""Device memory of a CUDA context with the kernels of torch and bitsandbytes: assumed where none can be measured."""
CUBLAS_WORKSPACE_BYTES = 2 * 8_519_680
"""`accelerator.product_workspace_bytes` of a card before Hopper."""


@dataclass(frozen=True)
class Machine:
    """Where the run takes place, and how much memory there is."""

    name: str
    device_type: str  # cpu, cuda, xpu, ..
    dtype: torch.dtype  # the compute dtype
    mapped_base: bool  # base, embeddings and head lie in a mapped file: pages that can be dropped and shared
    available_bytes: int  # device memory, or the RAM that is free for this process and what it holds already
    runtime_bytes: int = 0  # held before the model is loaded (interpreter, libraries, rows), measured; 0 on a GPU
    context_bytes: int = 0  # the CUDA context
    workspace_bytes: int = 0  # what the library of products keeps for itself on a GPU
    host_bytes: int | None = None  # free RAM beside an accelerator, where that is known
    stored_itemsize: int = 2  # bytes of a dense number in that file
    kernel_bytes: int = 0  # what each new shape of a product leaves behind (`qvera.data.rows`), measured

    @property
    def on_gpu(self) -> bool:
        """Whether it is an accelerator."""
        return accelerator.is_accelerator(self.device_type)

    def dense_itemsize(self, is_table: bool = True) -> tuple[int, bool]:
        """Bytes of a number of the dense weights, and whether they lie in the mapped file.

        ``is_table``: an embedding, head or dense linear, which stays as it is stored unless it would shrink. Others
        are cast to the compute dtype.
        """
        size, stored = self.dtype.itemsize, self.stored_itemsize
        mapped = self.mapped_base and (stored <= size if is_table else stored == size)
        return (stored if mapped else size), mapped


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
    held = {"context_bytes": CUDA_CONTEXT_BYTES, "workspace_bytes": CUBLAS_WORKSPACE_BYTES}
    return Machine(name, "cuda", dtype, False, size_bytes, **held)


def this_machine(section: ModelSection, device: torch.device) -> Machine:
    """The machine that this process runs on, with what the process holds right now."""
    dtype = pick_compute_dtype(section.compute_dtype, device)
    name = memory.device_name(device)
    if accelerator.is_accelerator(device):
        known = accelerator.free_and_total_bytes(device)
        if known is None:  # it shares the RAM
            available = memory.available_bytes(device)
            return Machine(name, device.type, dtype, False, available, context_bytes=CUDA_CONTEXT_BYTES)
        free, total = known
        context = max(total - free - (accelerator.reserved_bytes(device) or 0), CUDA_CONTEXT_BYTES)
        held = {"context_bytes": context, "workspace_bytes": accelerator.product_workspace_bytes(device)}
        host = memory.available_bytes(torch.device("cpu"))
        return Machine(name, device.type, dtype, False, total, host_bytes=host, **held)
    runtime = memory.private_bytes()
    # `qvera.models.mmap`; transformers holds what is dense, and unusual checkpoints
    mapped, stored = how_stored(section) if section.quantization in ("nf4", "fp4") else (False, 2)
    available = memory.available_bytes(device) + runtime
    kernels = memory.kernel_bytes(dtype)
    return Machine(name, "cpu", dtype, mapped, available, runtime, stored_itemsize=stored, kernel_bytes=kernels)


@dataclass(frozen=True)
class Batch:
    """One forward pass."""

    rows: int  # B
    tokens: int  # S, of each row, padding included; of the one sequence where the rows are joined
    trained_tokens: int  # in all rows; only these reach the head
    padded: bool  # rows differ in length and the model needs a mask for it (`qvera.models.attention`)
    joined: bool  # the rows stand in one sequence (`qvera.data.rows`)
    source: str  # where it comes from, in words
    longest_row: int  # tokens of the longest row of all, for answers
    packed_rows: int = 0  # rows of the data in it where they are packed (data.packing)
    token_counts: int = 1  # how many different numbers of tokens the run's forward passes have
    offsets: bool = False  # offsets tell joined rows apart, and not a dense mask
    keys: int = 0  # of all rows together, where each has its own copy of the common prefix's; else 0
    groups: tuple[tuple[int, int], ...] = ()  # rows and length of each group that a CPU attends to (`models.attention`)

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
    sharing: Sharing = field(default=ALONE, kw_only=True)  # the plan is that of one of its ranks
    holds_weights: bool = field(default=False, kw_only=True)  # W + ΔW, between optimizer steps (`adapters.fused`)
    slots: int = field(default=0, kw_only=True)  # adapters in flight together; 0: the run trains one adapter

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
        """Keys of the adapter file and the shape of each tensor; ``trained_only``: of those that the recipe trains.

        Those of a head that is trained whole are among them.
        """
        section, method, specs = self.recipe.adapter, self.method, [x.spec for x in self.adapted]
        found = {
            f"{PREFIX}{spec.name}.{kind}": size
            for spec in specs
            for kind, size in method.tensors(section, spec).items()
        }
        shared = method.shared_tensors(section, specs, self.shape.head_dim)
        found |= {f"{SHARED_PREFIX}{kind}": size for kind, size in shared.items()}
        head = {f"{PREFIX}{name}": size for name, size in self.shape.head}
        if not trained_only:
            return found | head
        found = {key: size for key, size in found.items() if method.traits(key.rpartition(".")[2], section).is_trained}
        return found | head

    @property
    def vector_bytes(self) -> int:
        """Bytes of all vectors as they are held."""
        return sum(math.prod(shape) * self.vector_dtype(key).itemsize for key, shape in self.vector_shapes().items())

    def vector_dtype(self, key: str) -> torch.dtype:
        """The dtype of the vector with this key in the adapter file."""
        return self.method.traits(key.rpartition(".")[2], self.recipe.adapter).dtype

    def vector_sizes(self, trained_only: bool = False) -> list[int]:
        """How many parameters each of these vectors has."""
        return [math.prod(size) for size in self.vector_shapes(trained_only).values()]

    @property
    def checkpointing(self) -> Mode:
        """What keeps activations for backward; ``auto`` is True until it is decided (`plan.checkpointing`)."""
        asked = self.recipe.training.gradient_checkpointing
        if asked == "auto" or (asked == "offload" and not accelerator.has_own_memory(self.machine.device_type)):
            return True
        return asked

    @property
    def streams(self) -> bool:
        """Whether the 4-bit layers stay in RAM; ``auto`` is False until it is decided (`plan.streaming`)."""
        return self.recipe.model.stream is True

    @property
    def can_stream(self) -> bool:
        """Whether streaming would free memory of the device, and goes with the rest of the recipe."""
        if self.recipe.training.torch_compile:
            return False
        four_bit = self.recipe.model.quantization in ("nf4", "fp4")
        by_zero3 = self.sharing.stage == 3  # which brings the layers to the device itself
        return four_bit and not by_zero3 and accelerator.has_own_memory(self.machine.device_type)

    @property
    def passes(self) -> int:
        """Forward passes of a rank in an optimizer step (`data.Batches.passes`)."""
        training = self.recipe.training
        rows = self.batch.packed_rows or training.per_device_train_batch_size
        if self.slots:  # of a round, in which every adapter takes a step
            return share(self.slots * training.global_batch_size, rows)
        return share(share(training.global_batch_size, self.sharing.world_size), rows)

    def with_recipe(self, recipe: Recipe) -> PlannedRun:
        """The same run of another recipe, whose batches are the same."""
        return replace(self, recipe=recipe)

    def with_stream(self, streams: bool) -> PlannedRun:
        """The run with ``model.stream`` written out."""
        return self.with_recipe(self.recipe.replace(model=self.recipe.model.replace(stream=streams)))

    @property
    def itemsize(self) -> int:
        """Bytes of one element in the compute dtype."""
        return self.machine.dtype.itemsize

    @property
    def method(self) -> Method:
        """The adapter's method."""
        return method_of(self.recipe.adapter)

    @property
    def is_one_node(self) -> bool:
        """Whether the frozen product is in the adapter's own node (`Method.with_base`)."""
        return trains_pair(self.method) and not self.recipe.adapter.dropout and self.sharing.stage < 3

    @property
    def sampled_tokens(self) -> int | None:
        """The tokens of each input that backward keeps where a schedule keeps a share of them; None: all, if any."""
        shares = [share for schedule in plugins.schedules() if (share := schedule.kept_share(self.recipe))]
        return max(1, math.ceil(min(shares) * self.batch.all_tokens)) if shares else None

    @property
    def task(self) -> Task:
        """The run's task."""
        return task_of(self.recipe)

    @property
    def rank(self) -> int:
        """The adapter's rank."""
        return self.recipe.adapter.rank

    def rank_at(self, x: Linear) -> int:
        """The adapter's rank at one linear."""
        return self.method.rank_at(self.recipe.adapter, x.spec)

    @property
    def attention(self) -> str:
        """The attention implementation."""
        chosen = self.recipe.model.attn_implementation
        return self.shape.attention if chosen == "auto" else chosen

    def has_vectors(self, x: Linear) -> bool:
        """Whether the path is VeRA's, with d and b (`Factors.vectors`)."""
        kinds = {"qvera_d", "qvera_b"} <= self.method.tensors(self.recipe.adapter, x.spec).keys()
        return kinds and self.method.change is not Change.PER_TOKEN

    def method_bytes(self, x: Linear) -> LinearBytes:
        """What the method says of a step at one linear."""
        tokens, machine = self.batch.all_tokens, self.machine
        return self.method.memory(self.recipe.adapter, x.spec, tokens, machine.dtype, machine.on_gpu)

    def is_quantized(self, x: Linear) -> bool:
        """Whether the recipe quantizes this linear."""
        return self.recipe.model.quantization != "none" and x.quantizable

    def goes_by_blocks(self, x: Linear) -> bool:
        """Whether the weight is never whole: its products take some rows at a time (`qvera.models.linear`)."""
        four_bit = self.recipe.model.quantization in ("nf4", "fp4") and x.quantizable and not self.machine.on_gpu
        large = x.n * x.m > BLOCK_WEIGHTS and x.n % 64 == 0
        return four_bit and large and not self.is_summed(x) and backward_by_blocks(self.batch.all_tokens, x.n)

    def is_summed(self, x: Linear) -> bool:
        """Whether the layer goes through W + ΔW (`qvera.adapters.products.fused`)."""
        section, machine = self.recipe.adapter, self.machine
        sizes = self.batch.all_tokens, x.n, x.m, self.rank_at(x)
        may = x.name in self.adapted_names and not section.dropout and self.has_vectors(x)
        may = may and self.method.change is Change.LOW_RANK
        may = may and not self.recipe.training.torch_compile and not self.mixes_rows
        return may and fused.pays(*sizes, machine.dtype, machine.device_type, section.input_scale, self.builds_per_pass)

    @property
    def mixes_rows(self) -> bool:
        """Whether the rows of a pass may be of different adapters."""
        return self.slots > 1

    @property
    def builds_per_pass(self) -> float:
        """How often a layer that goes through W + ΔW makes it in a pass (recomputation left out)."""
        return 1 / self.passes if self.holds_weights else fused.BUILDS_UNHELD

    def keeps_input(self, x: Linear) -> bool:
        """Whether the backward pass needs the layer's input (`qvera.adapters.products.fused`)."""
        section = self.recipe.adapter
        kept = fused.keeps_input(self.batch.all_tokens, x.n, x.m, self.rank_at(x), section.input_scale)
        return self.is_summed(x) and kept
