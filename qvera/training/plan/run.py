"""The inputs of a plan: a model's shapes (read without its weights), a machine, its ranks, a batch and a recipe."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ByteSize, TypeAdapter, ValidationError
from torch import nn
from transformers.pytorch_utils import Conv1D

from qvera.adapters.config import PREFIX, SHARED_PREFIX
from qvera.adapters.layer import layer_shape
from qvera.adapters.methods import LinearSpec, Method, method_of
from qvera.adapters.methods.base import Change
from qvera.adapters.products import fused
from qvera.config.schema import Recipe
from qvera.config.sections import ModelSection
from qvera.distributed.zero import ZeroConfig
from qvera.models.attention import Group
from qvera.models.checkpointing import Mode
from qvera.models.experts import expert_specs, require_experts
from qvera.models.loader import pick_compute_dtype
from qvera.models.model_class import CAUSAL_LM, ModelClass
from qvera.models.quantize_checkpoint import how_stored
from qvera.models.structure import (
    beside_the_layers,
    context_tokens,
    expert_weights,
    head_size,
    left_whole,
    widest_layer,
)
from qvera.models.tokenizer import image_sides, image_tokens
from qvera.utils import accelerator, memory
from qvera.utils.errors import InputError
from qvera.utils.safetensors_io import TensorSpec

if TYPE_CHECKING:
    from qvera.training.plan.activations import Recurrence
    from qvera.training.plan.memory import Memory

# the names that configs have for how many experts a token goes to
_PER_TOKEN = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "top_k_experts", "moe_topk", "moe_top_k",
    "top_k",
)  # fmt: skip
LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True)
class Linear(LinearSpec):
    """A linear of the base, or a projection of all experts of a layer, as an adapter's method sees it."""

    layer: int | None = None
    quantizable: bool = True
    """Whether a quantized load converts it: all linears but the head and those with a forward of their own."""
    is_target: bool = True
    """Whether ``adapter.targets: all-linear`` means it (`beside_the_layers`)."""

    @property
    def n(self) -> int:
        return self.in_features

    @property
    def m(self) -> int:
        return self.out_features

    @property
    def numbers(self) -> int:
        return self.n * self.m * (self.experts or 1)

    @property
    def role(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Tower:
    """The frozen tower that reads images among text. It keeps nothing for a backward pass."""

    patch_numbers: int  # pixel values of a patch
    hidden: int
    inner: int  # the width of its MLP
    gated: bool  # whether the MLP is gated
    fp32_rotary: bool  # q and k are turned in fp32
    masked: bool  # a dense mask says which patches of an image are there
    tiled: bool  # an image is cut into tiles, which are copied on the way

    def size_bytes(self, pixels: int, images: int, itemsize: int) -> int:
        """Return the most bytes at a time, as counted on `IMAGE_TYPES`. ``pixels``: the pixel values of all images."""
        patches = pixels // self.patch_numbers
        mask = patches // images if self.masked else 0  # for each patch; a byte, and as it is added
        mlp = ((3 if self.gated else 2) * self.inner + 7 * self.hidden) * itemsize + mask
        attention = (13 if self.fp32_rotary else 9) * self.hidden * itemsize + mask * (1 + itemsize)
        attention += 8 * self.hidden * (4 - itemsize) if self.fp32_rotary else 0
        return patches * max(mlp, attention) + (3 * pixels * itemsize if self.tiled else 0)


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that memory and time depend on. Counts are of numbers, not of bytes."""

    model_type: str
    hidden: int
    ff: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    longest_tokens: int
    tied: bool  # the head is the input embedding
    head_norms: bool  # q and k are normalized per head (Qwen3)
    linears: Sequence[Linear]
    dense_numbers: int  # embeddings, frozen head, norms, biases: all but quantizable weights; a tied head counts once
    expert_numbers: int  # how many of the dense numbers are of experts that stay dense (`expert_weights`)
    attention: str  # the implementation that the model picks by itself
    head: tuple[tuple[str, tuple[int, ...]], ...] = ()  # name and shape of each tensor of a head that is trained whole
    image_tokens: int = 0  # tokens of an image, for a model that takes images
    image_numbers: int = 0  # pixel values of an image
    tower: Tower | None = None  # where the model takes images among text
    experts: Sequence[Linear] = ()  # not among the dense numbers
    experts_per_token: int = 0
    recurrences: Mapping[int, Recurrence] = field(default_factory=dict)  # by layer, of those that have one
    grown_rows: int = 0  # rows that model.added_tokens need; with them embedding and head are private, not mapped

    @property
    def head_numbers(self) -> int:
        return sum(math.prod(shape) for _, shape in self.head)

    @property
    def parameters(self) -> int:
        return self.dense_numbers + sum(x.numbers for x in (*self.linears, *self.experts) if x.experts or x.quantizable)

    def adapted(self, targets: str | list[str], with_experts: bool = False) -> list[Linear]:
        """Return the linears that ``adapter.targets`` names (or InputError); ``all-linear``: no heads and routers."""
        if with_experts:
            require_experts(self.experts)
        everything = [*self.linears, *(self.experts if with_experts else ())]
        if isinstance(targets, str):
            return [x for x in everything if x.is_target]
        chosen = {t: {x.name for x in everything if f".{x.name}".endswith(f".{t}")} for t in targets}
        if missing := sorted(t for t, names in chosen.items() if not names):
            known = ", ".join(sorted({x.role for x in everything}))
            raise InputError(
                f"adapter.targets: no linear of this model's layers is named {', '.join(missing)}. They are named "
                f"{known}."
            )
        return [x for x in everything if x.name in set().union(*chosen.values())]


class NotPlannable(InputError):
    """The plan's formulas do not know this kind of model. It can still be trained."""


def shape_of(model: nn.Module, model_class: ModelClass = CAUSAL_LM) -> Shape:
    """Read the shapes off a model without weights. NotPlannable where it has no decoder layers that we know."""
    config = widest_layer(model)
    stored = getattr(config, "quantization_config", None) or {}
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    kept_dense = [
        f".{name}" for k in ("llm_int8_skip_modules", "modules_to_not_convert") for name in stored.get(k) or ()
    ]
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    beside, dense_names = beside_the_layers(model), left_whole(model)
    own_heads = tuple(f"{name}." for name in model_class.head_modules(model))  # type: ignore[arg-type]
    # linears, with their decoder layer
    linears: list[Linear] = []
    for name, module in model.named_modules():
        size = layer_shape(module)
        if size is None or module is head or f"{name}.".startswith(own_heads):
            continue
        # a tower's layers are none of the decoder's
        layer = None if name in beside and name not in dense_names else LAYER.search(f".{name}.")
        skipped = any(f".{name}".endswith(kept) or f"{kept}." in f".{name}." for kept in kept_dense)
        converted = type(module) in (nn.Linear, Conv1D) and not skipped and name not in dense_names
        linears.append(Linear(name, *size, 0, int(layer[1]) if layer else None, converted, name not in beside))
    kind, layers = type(model).__name__, {x.layer for x in linears} - {None}
    own_head = tuple((name, tuple(p.shape)) for name, p in model.named_parameters() if name.startswith(own_heads))
    if not layers or (head is None and not own_head):
        raise NotPlannable(f"model.path: {kind} has no decoder layers that a plan could be made for.")
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for key in ("hidden_size", "num_attention_heads")[: 1 if "mixer" in names else 2]:  # Mamba attends to nothing
        if not isinstance(getattr(config, key, None), int):
            raise NotPlannable(f"model.path: the config of {kind} has no whole number {key} to plan with.")
    widths = getattr(config, "intermediate_size", None)
    hidden, heads = config.hidden_size, getattr(config, "num_attention_heads", None) or 0
    output, table = embedding if head is None else head, getattr(embedding, "weight", None)
    weight = getattr(output, "weight", None)  # patches of images are in none
    tied = bool(getattr(model.config, "tie_word_embeddings", False)) or weight is table
    # the numbers that no quantized load converts: here all, and below without the linears and experts that it does
    dense = sum(p.numel() for n, p in model.named_parameters() if not n.startswith(own_heads))
    of_experts = getattr(config, "ffn_config", config)  # DBRX has its own
    experts = []
    for name, (count, rows, columns, is_transposed) in expert_specs(model).items():
        layer, sizes = LAYER.search(f".{name}."), (rows, columns) if is_transposed else (columns, rows)
        if rows * columns % 64 == 0:  # blocks of 64 weights end with experts
            experts.append(Linear(name, *sizes, count, int(layer[1]) if layer else None))
    dense -= sum(x.numbers for x in (*linears, *experts) if x.quantizable)
    if tied and weight is not table:  # a model on the meta device: not tied yet
        dense -= output.weight.numel()
    height, width = (image_sides(config) or (0, 0)) if model_class.reads_images else (0, 0)
    return Shape(
        model_type=str(config.model_type),
        hidden=hidden,
        ff=max(widths) if isinstance(widths, list) else widths or 4 * hidden,
        layers=len(layers),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=head_size(model) or hidden // max(heads, 1),
        vocabulary=0 if weight is None else int(weight.shape[0]),
        longest_tokens=context_tokens(config),
        tied=tied,
        head_norms={"q_norm", "k_norm"} <= names,
        linears=linears,
        dense_numbers=dense,
        expert_numbers=sum(p.numel() for p in expert_weights(model).values()) - sum(x.numbers for x in experts),
        experts=experts,
        experts_per_token=next((int(n) for key in _PER_TOKEN if (n := getattr(of_experts, key, None))), 2),
        head=own_head,
        image_tokens=image_tokens(config, height, width) if height else 0,
        image_numbers=3 * height * width,
        tower=_tower_of(model),
        attention=str(getattr(config, "_attn_implementation", None) or "sdpa"),
    )


def _tower_of(model: nn.Module) -> Tower | None:
    """Return the sizes of an images' tower; None where the config does not say how large it is."""
    config: Any = getattr(model.config, "vision_config", None)
    sizes: list[Any] = [getattr(config, key, None) for key in ("patch_size", "hidden_size", "intermediate_size")]
    if not all(isinstance(each, int) for each in sizes):
        return None
    patch, hidden, inner = sizes
    names = {name.rpartition(".")[2] for name in beside_the_layers(model)}
    return Tower(
        3 * patch**2 * getattr(config, "temporal_patch_size", 1),
        hidden,
        inner,
        gated="gate_proj" in names,
        fp32_rotary=any(name.endswith("rotary_pos_emb") for name, _ in model.named_modules()),
        masked=config.model_type == "gemma4_vision",
        tiled=config.model_type in ("idefics3_vision", "smolvlm_vision"),
    )


CUDA_CONTEXT_BYTES = 500_000_000  # with the kernels of torch and bitsandbytes; assumed where none was measured
CUBLAS_WORKSPACE_BYTES = 2 * 8_519_680  # `accelerator.product_workspace_bytes` of a card before Hopper


@dataclass(frozen=True)
class Machine:
    """The machine that a run takes place on, and the memory that it has."""

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
        return accelerator.is_accelerator(self.device_type)

    def dense_itemsize(self, is_table: bool = True) -> tuple[int, bool]:
        """Bytes of a number of the dense weights, and whether they lie in the mapped file.

        An embedding, head or dense linear (``is_table``) stays as it is stored unless it would shrink. Others are cast
        to the compute dtype.
        """
        size, stored = self.dtype.itemsize, self.stored_itemsize
        mapped = self.mapped_base and (stored <= size if is_table else stored == size)
        return (stored if mapped else size), mapped


def parse_size(text: str) -> int:
    """``24GB`` → 24,000,000,000 bytes; a bare number is GB. InputError for what is no size."""
    try:
        size_bytes = int(TypeAdapter(ByteSize).validate_python(text if text[-1:].isalpha() else f"{text}GB"))
    except ValidationError:
        size_bytes = 0
    if not 0 < size_bytes < 10**12:  # 4090 is the name of a card
        raise InputError(f"--gpu: takes the size of its memory such as 24GB, 24GiB or 24, got {text!r}.")
    return size_bytes


def gpu_machine(section: ModelSection, size_bytes: int) -> Machine:
    """Return a GPU of that size, which need not be here: 16-bit compute, an assumed CUDA context."""
    dtype = torch.bfloat16 if section.compute_dtype == "auto" else getattr(torch, section.compute_dtype)
    name, held = f"a GPU with {size_bytes / 1e9:g} GB", (0, CUDA_CONTEXT_BYTES, CUBLAS_WORKSPACE_BYTES)
    return Machine(name, "cuda", dtype, False, size_bytes, *held)


def this_machine(section: ModelSection, device: torch.device) -> Machine:
    """Return the machine that this process runs on, with what the process holds right now."""
    name, dtype = memory.device_name(device), pick_compute_dtype(section.compute_dtype, device)
    if accelerator.is_accelerator(device):
        known = accelerator.free_and_total_bytes(device)
        if known is None:  # it shares the RAM
            return Machine(name, device.type, dtype, False, memory.available_bytes(device), 0, CUDA_CONTEXT_BYTES)
        free, total = known
        context = max(total - free - (accelerator.counted_bytes(device, "reserved") or 0), CUDA_CONTEXT_BYTES)
        workspace, host = accelerator.product_workspace_bytes(device), memory.available_bytes(torch.device("cpu"))
        return Machine(name, device.type, dtype, False, total, 0, context, workspace, host)
    runtime = memory.private_bytes()
    # `qvera.models.stored_weights`; transformers holds what is dense, and unusual checkpoints
    mapped, stored = how_stored(section) if section.quantization in ("nf4", "fp4") else (False, 2)
    available, kernels = memory.available_bytes(device) + runtime, memory.kernel_bytes(dtype)
    return Machine(name, "cpu", dtype, mapped, available, runtime, stored_itemsize=stored, kernel_bytes=kernels)


@dataclass(frozen=True)
class Sharing:
    """The way in which the ranks of a run share its model."""

    stage: int = 0  # the stage of ZeRO; 0: each rank has the whole model, and gradients are added up
    offload: str | None = None  # where a rank's share of the base lies in stage 3: None (the device), cpu or nvme
    nodes: int = 1
    per_node: int = 1  # ranks on each node (the most on one of them)
    ranks: int | None = None  # how many in all, where nodes differ in their number

    @classmethod
    def of(cls, zero: ZeroConfig | None, nodes: int = 1, per_node: int = 1, ranks: int | None = None) -> Sharing:
        """Return what a recipe's ``deepspeed`` key means on that many machines."""
        stage, offload = (0, None) if zero is None else (zero.stage, zero.offload_device)
        return cls(stage, offload, nodes, per_node, ranks)

    @property
    def world_size(self) -> int:
        return self.ranks or self.nodes * self.per_node

    @property
    def word(self) -> str:
        """The value that the recipe's ``deepspeed`` key has for it; ``none`` where the key is left out."""
        return f"zero{self.stage}{f'-offload-{self.offload}' if self.offload else ''}" if self.stage else "none"

    def share(self, whole: int) -> int:
        """Return the largest part that a rank has where all ranks divide ``whole``."""
        return -(-whole // self.world_size)


ALONE = Sharing()  # one process


@dataclass(frozen=True)
class Batch:
    """The sizes of one forward pass."""

    rows: int  # B
    tokens: int  # S: tokens of each row, padding included, or of the one sequence where the rows are joined
    trained_tokens: int  # in all rows; only these reach the head
    padded: bool  # rows differ in length and the model needs a mask for it (`qvera.models.attention`)
    joined: bool  # the rows stand in one sequence (`qvera.data.rows`)
    source: str  # where it comes from, in words
    longest_row: int  # tokens of the longest row of all, for answers
    packed_rows: int = 0  # rows of the data in it where they are packed (data.packing)
    token_counts: int = 1  # how many different numbers of tokens the run's forward passes have
    offsets: bool = False  # offsets tell joined rows apart, and not a dense mask
    keys: int = 0  # keys of all rows together, where each row has its own copy of those of the common prefix; else 0
    groups: tuple[Group, ...] = ()  # that a CPU attends to one by one
    pixels: int = 0  # pixel values of the images among its text
    images: int = 0  # how many these are

    @property
    def all_tokens(self) -> int:
        return self.rows * self.tokens


def changed(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """Return the recipe with ``section.key`` values replaced."""
    for key, value in settings.items():
        section, _, name = key.partition(".")
        recipe = recipe.replace(**{section: {name: value}})
    return recipe


@dataclass(frozen=True)
class PlannedRun:
    """The run that memory and time are computed for. ``batch`` is its longest forward pass."""

    shape: Shape
    recipe: Recipe
    batch: Batch
    machine: Machine
    sharing: Sharing = field(default=ALONE, kw_only=True)  # the plan is that of one of its ranks
    slots: int = field(default=0, kw_only=True)  # adapters in flight together; 0: the run trains one adapter
    builds_per_pass: float = field(default=fused.BUILDS_UNHELD, kw_only=True)
    """The times that a layer which goes through W + ΔW makes it in a pass, recomputation left out (`hold_weights`)."""

    def changed(self, settings: dict[str, Any]) -> PlannedRun:
        """Return the run with other values of ``section.key``. They must be keys on which no batch depends."""
        return replace(self, recipe=changed(self.recipe, settings))

    @cached_property
    def memory(self) -> Memory:
        from qvera.training.plan.memory import plan_rank  # that module imports this one

        return plan_rank(self)

    @property
    def needed_bytes(self) -> int:
        return self.memory.needed_bytes(self.machine)

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.machine.available_bytes

    @property
    def itemsize(self) -> int:
        """Bytes of one element in the compute dtype."""
        return self.machine.dtype.itemsize

    @property
    def collective_bytes(self) -> int:
        """The most bytes that NCCL takes of this rank's GPU."""
        return accelerator.collective_buffer_bytes(self.machine.device_type) if self.sharing.world_size > 1 else 0

    @property
    def method(self) -> Method:
        return method_of(self.recipe.adapter)

    @property
    def holds_weights(self) -> bool:
        """Whether W + ΔW stay in memory from one optimizer step to the next."""
        return self.builds_per_pass < fused.BUILDS_UNHELD

    @cached_property
    def _adapted(self) -> list[Linear]:
        section = self.recipe.adapter
        return self.shape.adapted(section.targets, section.experts != "none")

    @property
    def adapted(self) -> list[Linear]:
        """The linears with an adapter; InputError where a target matches none."""
        return [x for x in self._adapted if not x.experts]

    @property
    def adapted_experts(self) -> list[Linear]:
        return [x for x in self._adapted if x.experts]

    @cached_property
    def adapted_names(self) -> frozenset[str]:
        """The names of the linears and experts with an adapter."""
        return frozenset(x.name for x in self._adapted)

    def _of_layer(self, among: Sequence[Linear]) -> list[Linear]:
        """Choose those of the layer that stands for all: the second, since in some models the first one differs."""
        present = sorted({x.layer for x in self.shape.linears if x.layer is not None})
        return [x for x in among if x.layer == present[min(1, len(present) - 1)]]

    @cached_property
    def layer(self) -> list[Linear]:
        return self._of_layer(self.shape.linears)

    @cached_property
    def layer_experts(self) -> list[Linear]:
        return self._of_layer(self.shape.experts)

    def tensors(self, trained_only: bool = False) -> list[TensorSpec]:
        """Return the tensors of the adapter's file, a head's included. ``trained_only``: without frozen ones."""
        section, method, specs = self.recipe.adapter, self.method, self._adapted
        shapes = {PREFIX + f"{s.name}.{name}": size for s in specs for name, size in method.tensors(section, s).items()}
        shared = method.shared_tensors(section, specs, self.shape.head_dim)
        shapes |= {SHARED_PREFIX + name: size for name, size in shared.items()}
        found = [TensorSpec(PREFIX + name, torch.float32, size) for name, size in self.shape.head]
        for key, size in shapes.items():
            traits = method.traits(key.rpartition(".")[2], section)
            if traits.is_trained or not trained_only:
                found.append(TensorSpec(key, traits.dtype, size))
        return found

    @property
    def checkpointing(self) -> Mode:
        """The mode of gradient checkpointing; ``auto`` counts as True until it is decided (`plan.decisions`)."""
        asked = self.recipe.training.gradient_checkpointing
        if asked == "auto" or (asked == "offload" and not accelerator.has_own_memory(self.machine.device_type)):
            return True
        return asked

    @property
    def passes(self) -> int:
        """The forward passes of a rank in an optimizer step (`data.Batches.passes`), or in a round of many adapters."""
        training = self.recipe.training
        rows = self.batch.packed_rows or training.per_device_train_batch_size
        step = training.step_rows
        return -(-(self.slots * step if self.slots else self.sharing.share(step)) // rows)

    @property
    def attention(self) -> str:
        chosen = self.recipe.model.attn_implementation
        return self.shape.attention if chosen == "auto" else chosen

    @property
    def is_four_bit(self) -> bool:
        """Whether the base's linears are stored in four bits."""
        return self.recipe.model.quantization in ("nf4", "fp4")

    def is_packed(self, x: Linear) -> bool:
        return self.is_four_bit and x.quantizable

    def rank_at(self, x: Linear) -> int:
        return self.method.rank_at(self.recipe.adapter, x)

    def has_vectors(self, x: Linear) -> bool:
        """Whether the linear's adapter is VeRA's, with d and b (`Factors.vectors`)."""
        names = self.method.tensors(self.recipe.adapter, x).keys()
        return {"qvera_d", "qvera_b"} <= names and self.method.change is not Change.PER_TOKEN

    def _sizes(self, x: Linear) -> tuple[int, int, int, int]:
        return self.batch.all_tokens, x.n, x.m, self.rank_at(x)

    def is_summed(self, x: Linear) -> bool:
        """Whether the layer goes through W + ΔW (`qvera.adapters.products.fused`)."""
        section, machine = self.recipe.adapter, self.machine
        if x.name not in self.adapted_names or section.dropout or self.recipe.training.torch_compile or self.slots > 1:
            return False
        if self.method.change is not Change.LOW_RANK or not self.has_vectors(x):
            return False
        scaled, builds = section.input_scale, self.builds_per_pass
        return fused.pays(*self._sizes(x), machine.dtype, machine.device_type, scaled, builds)

    def keeps_input(self, x: Linear) -> bool:
        """Whether the backward pass through W + ΔW needs the layer's input."""
        return self.is_summed(x) and fused.keeps_input(*self._sizes(x), self.recipe.adapter.input_scale)
