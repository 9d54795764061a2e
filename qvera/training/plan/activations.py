"""Bytes that autograd keeps of one decoder layer, and the most that exists beside them while its backward runs.

Read off the code that runs: `qvera.models.linear` (keeps the module only), `qvera.adapters.products.functional` (keeps
z), `qvera.adapters.products.fused` (keeps z or x), `qvera.models.lean_layers`, and transformers' Llama layer.
tests/training/plan/test_activations.py counts the same with ``saved_tensors_hooks``, and tests/gpu/test_plan.py on a
fake accelerator. T: tokens of the batch; g: the gradient of the residual stream.

Layers with a recurrence or a linear attention (Mamba's and Mamba 2's scan, the gated delta rule) have no formula:
transformers' own code of such a layer runs once on the meta device, forward and backward, on three lengths, and its
live tensors are counted. Bytes are a square function of the tokens (Mamba 2 takes its chunks of tokens with each
other), which the three lengths determine. mamba_ssm's kernels keep less.
"""

import copy
import math
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qvera.adapters.methods import Source
from qvera.adapters.methods.base import Change, LinearBytes, trains_pair
from qvera.config import plugins
from qvera.kernels.low_rank import B_BLOCK_ELEMENTS
from qvera.models.experts import DENSE_WEIGHTS
from qvera.models.lean_layers import TILED_ABOVE_TOKENS, tile_tokens
from qvera.models.linear import BLOCK_WEIGHTS, backward_by_blocks
from qvera.models.stream import CHUNK_BYTES
from qvera.training.plan.run import LAYER, Batch, Linear, PlannedRun

_MLP = ("gate_proj", "up_proj", "down_proj")

_INPUTS = {
    "q_proj": "norm1", "k_proj": "norm1", "v_proj": "norm1", "o_proj": "attention",
    "gate_proj": "norm2", "up_proj": "norm2", "down_proj": "product",
}  # fmt: skip


def kept_bytes(run: PlannedRun) -> int:
    """Return the bytes that one decoder layer keeps for backward, its input included (the first norm keeps that)."""
    tiled = goes_by_tiles(run)  # then the MLP keeps its input
    inside = run.batch.all_tokens * (run.shape.hidden if tiled else 2 * _dense_width(run)) * run.itemsize
    linears = [x for x in run.layer if not (tiled and x.role in _MLP)]
    kept = norm_bytes(run) * (2 if run.shape.ff else 1) + _attention_bytes(run) + inside + _adapter_bytes(run, linears)
    recurrent = sum(each.bytes_of(run.batch)[0] for each in run.shape.recurrences.values())
    return kept + _expert_bytes(run)[0] + recurrent


def _dense_width(run: PlannedRun) -> int:
    """Return the width of the MLP that all tokens go through: beside experts, that of the shared ones."""
    return max((x.m for x in run.layer if x.role == "up_proj"), default=0 if run.layer_experts else run.shape.ff)


def _expert_bytes(run: PlannedRun) -> tuple[int, int]:
    """Return the bytes that a layer's experts keep, and the most that exists beside them (`qvera.models.experts`)."""
    size, rows, rank = run.itemsize, run.batch.all_tokens * run.shape.experts_per_token, run.recipe.adapter.rank
    stacks = run.layer_experts
    if not stacks:
        return 0, 0
    *firsts, second = stacks
    adapted = [x for x in stacks if x.name in run.adapted_names]
    outer, hidden, inner = sum(x.m for x in firsts), second.m, second.n
    # the gate's input, its activation, the output that is weighted, z of both, and four numbers a row to sort by
    numbers = outer + inner + hidden + rank * len(adapted)
    if run.method.source is Source.TRAINED:  # the rows themselves, for the gradient of A
        numbers += max((x.n for x in adapted if x is not second), default=0)
    # in backward: gradients of the gate's input and of the rows, the product to sum up, and experts in dense form
    width, largest = max(outer, hidden), max(x.n * x.m for x in stacks)
    weights = min(max(x.numbers for x in stacks), max(DENSE_WEIGHTS, largest))
    dense = weights if run.machine.on_gpu else min(largest, BLOCK_WEIGHTS)
    flowing = rows * (outer + inner + hidden + width) * size + (rows * width * 4 if run.adapted_experts else 0)
    return rows * (numbers * size + 4 * 8), flowing + dense * size


def goes_by_tiles(run: PlannedRun) -> bool:
    """Whether MLPs take some tokens at a time (`qvera.models.lean_layers`)."""
    if not run.checkpointing or run.recipe.adapter.dropout or run.sharing.stage == 3 or run.slots > 1:
        return False
    return run.batch.all_tokens > TILED_ABOVE_TOKENS and {x.role for x in run.layer} >= set(_MLP)


def offloaded_bytes(run: PlannedRun) -> int:
    """Return the pinned RAM for the offloaded inputs of checkpointed layers (`qvera.models.stream`)."""
    if run.checkpointing != "offload":
        return 0
    chunks = -(-run.batch.all_tokens * run.shape.hidden * run.itemsize // CHUNK_BYTES)
    return run.shape.layers * chunks * CHUNK_BYTES


def product_shapes(run: PlannedRun) -> int:
    """Return how many different matrix products one token count needs in a decoder layer, forward and backward."""
    rank, pairs = run.recipe.adapter.rank, {("W", x.n, x.m) for x in run.layer}
    for x in run.layer:
        if x.name in run.adapted_names and not run.is_summed(x):
            pairs |= {("A", x.n, rank), ("B", rank, x.m)}
    return 2 * len(pairs)


def norm_bytes(run: PlannedRun) -> int:
    """Return the bytes that an RMS norm keeps: its input, and an fp32 factor a token (`qvera.models.lean_layers`)."""
    return run.batch.all_tokens * (run.shape.hidden * run.itemsize + 4)


def method_bytes(run: PlannedRun, x: Linear) -> LinearBytes:
    """Return the bytes of a step at one linear, as the adapter's method counts them."""
    tokens, machine = run.batch.all_tokens, run.machine
    return run.method.memory(run.recipe.adapter, x, tokens, machine.dtype, machine.on_gpu)


def _groups(run: PlannedRun) -> list[tuple[int, int, int]]:
    """Return the places of queries and of keys (padding included) of each group of rows, and the bytes of a number.

    Joined rows go in groups of like length (`qvera.models.attention.attend_in_groups`); [] elsewhere.
    """
    groups = () if run.machine.on_gpu or run.attention == "eager" else run.batch.groups
    wide = max(run.itemsize, 4)
    return [(x.rows * x.length, x.rows * (x.prefix + x.length), wide if x.is_short else run.itemsize) for x in groups]


def mask_bytes(run: PlannedRun) -> int:
    """Return the bytes of the masks that all layers share, of rows behind a prefix on a CPU."""
    groups = zip(run.batch.groups, _groups(run), strict=False)
    return sum({x: x.length * (x.prefix + x.length) * wide for x, (_, _, wide) in groups if x.prefix}.values())


def _attention_bytes(run: PlannedRun) -> int:
    s, b, T, size = run.shape, run.batch, run.batch.all_tokens, run.itemsize
    q, kv = T * s.heads * s.head_dim, T * s.kv_heads * s.head_dim
    normed = T * (s.heads + s.kv_heads) * (s.head_dim + 1) * 4 if s.head_norms else 0
    if run.attention == "eager":
        squares = b.rows * s.heads * b.tokens**2
        return 3 * q * size + squares * 4 + (squares * size if size < 4 else 0) + normed
    if groups := _groups(run):
        # padded queries, keys and values (a group's own where it goes to fp32), the output, and a number for each
        sizes = [((queries * s.heads + 2 * keys * s.kv_heads) * s.head_dim, wide) for queries, keys, wide in groups]
        kept = size * sum(numbers for numbers, _ in sizes) if any(wide == size for _, wide in sizes) else 0
        kept += sum(numbers * wide for numbers, wide in sizes if wide > size)
        return kept + sum(queries * s.heads * (s.head_dim * wide + 4) for queries, _, wide in groups) + normed
    masked = b.padded or (b.joined and not b.offsets)
    # with a mask sdpa repeats grouped keys and values, and so do we where there is no flash attention for them
    repeats = (masked and run.attention == "sdpa") or (run.machine.on_gpu and run.machine.dtype != torch.bfloat16)
    keys = q if repeats else kv
    keys = b.keys * s.kv_heads * s.head_dim if b.keys else keys  # the common prefix's are copied for each row
    # sdpa turns a padding mask into an additive one in every layer; a joined sequence's is additive and shared
    mask = b.rows * b.tokens**2 * size if b.padded and not b.joined and run.attention == "sdpa" else 0
    return (2 * q + 2 * keys) * size + T * s.heads * 4 + mask + normed


def _adapter_bytes(run: PlannedRun, linears: Sequence[Linear]) -> int:
    """Return the bytes kept for adapters: z of each input (its readers share it), x where `fused.keeps_input`."""
    T, size, section, method = run.batch.all_tokens, run.itemsize, run.recipe.adapter, run.method
    attention_keeps = run.attention != "eager" and not _groups(run)  # its output, which o_proj reads
    schedules = plugins.schedules_of(training=run.recipe.training)
    shares = [share for schedule in schedules if (share := schedule.kept_share(run.recipe))]
    held: dict[tuple[str, str], int] = {}  # by what it is of, so that what is shared counts once
    for x in linears:
        if x.name not in run.adapted_names:
            continue
        source, rank, own = _INPUTS.get(x.role, x.name), run.rank_at(x), method_bytes(run, x)
        if run.slots > 1:  # tensors of each adapter of the pass, in fp32 (`qvera.adapters.products.slots`)
            held[x.name, "vectors"] = _slots_bytes(run, x)
        trains_A = method.source is Source.TRAINED
        reads_x = run.keeps_input(x) or trains_A or (section.input_scale and not section.dropout)
        if shares:  # a schedule keeps some tokens of each input: rows of its own, with a number and a weight each
            tokens = max(1, math.ceil(min(shares) * T))
            held[x.name if section.dropout else source, "x"] = tokens * (x.n * size + 8 + 4)
        elif reads_x and not (source == "attention" and attention_keeps):
            held[source, "x"] = T * x.n * size
        held[x.name, "of the method's own"] = own.kept
        if method.change is Change.SCALED:
            held[x.name, "y"] = T * x.m * size + 8 * x.m  # what its rows are scaled with in fp32, and their norms
        if section.dropout:  # every layer drops other elements: its own z, which elements, and its own x to scale
            held[x.name, "z"] = T * rank * size + T * x.n + (T * x.n * size if section.input_scale else 0)
        elif run.keeps_input(x):
            continue
        else:  # readers of other ranks have another z
            shared = method.source is Source.SEEDED and not section.input_scale
            held[source if shared else x.name, f"z of rank {rank}, {run.is_summed(x)}"] = T * rank * size
        held[x.name, "A, B"] = 0 if run.slots > 1 else own.cast
    return sum(held.values())


def _slots_bytes(run: PlannedRun, x: Linear) -> int:
    """Return the fp32 bytes of one linear's tensors of all adapters of a pass."""
    shapes = run.method.tensors(run.recipe.adapter, x).values()
    return 4 * min(run.slots, run.recipe.training.per_device_train_batch_size) * sum(map(math.prod, shapes))


def _product_bytes(run: PlannedRun, x: Linear) -> int:
    """Return the most bytes of weights in one linear's products: W, C = diag(b) B diag(d), W + ΔW, M."""
    section, size, T, numbers = run.recipe.adapter, run.itemsize, run.batch.all_tokens, x.n * x.m
    read, is_summed = 0, run.is_summed(x)
    if run.recipe.model.quantization != "none" and x.quantizable:  # W, and its scales
        read = numbers * size + numbers // 16
        by_blocks = run.is_four_bit and not run.machine.on_gpu and not is_summed and x.n % 64 == 0
        if by_blocks and numbers > BLOCK_WEIGHTS and backward_by_blocks(T, x.n):
            # W is never whole: a block of it; g W in fp32, and one block's part of it
            read = BLOCK_WEIGHTS * size + (T * x.n * (4 + size) if size < 4 else 0) + numbers // 16
    if x.name not in run.adapted_names:
        return read
    if run.slots > 1 and run.method.source is Source.TRAINED:  # sorted rows of both sides, in a node of its own
        return max(read, T * (x.m + x.n + section.rank) * size + _slots_bytes(run, x))
    if run.slots > 1:  # z scaled, u, and in fp32 what is added up
        return read + T * (x.m * (size + 4) + 2 * section.rank * size)
    if not run.has_vectors(x):
        return read + method_bytes(run, x).working
    pair = x.m * run.rank_at(x)
    # combining d, B and b, and taking their gradients from M, goes by blocks of rows in fp32 (`low_rank.row_blocks`)
    block = pair * 4 if run.machine.on_gpu else min(pair, B_BLOCK_ELEMENTS) * 4
    if is_summed:  # W + ΔW while C is made; with an a, gᵀ x beside C, M, A diag(a), N, and z's gradient or A N
        side = section.rank * x.n
        scaling = 2 * (pair + side) * size + max(T * section.rank * size, 8 * side) if section.input_scale else 0
        return max(read, numbers * size + max(2 * block, scaling))
    # where rows are scaled: beside the gradient of the output, that of what is scaled
    flowing = T * x.m * size if run.method.change is Change.SCALED else 0
    return max(read, pair * size + (2 if size < 4 else 1) * block) + flowing


def _mlp_peak(run: PlannedRun) -> int:
    """Return the most bytes that exist at a kernel while backward goes through the MLP."""
    T, size = run.batch.all_tokens, run.itemsize
    g, wide = T * run.shape.hidden * size, T * _dense_width(run) * size
    # the gradients of gate and up have taken the place of what the MLP kept
    own = [x for x in run.layer if x.role == "down_proj" and x.name in run.adapted_names and not run.is_summed(x)]
    # gradients of its input: of W, and of A, but where the pair is trained both are in one node (`Method.with_base`)
    one_node = trains_pair(run.method) and not run.recipe.adapter.dropout and run.sharing.stage < 3
    flowing = {"down_proj": g + (2 if own and not one_node else 1) * wide}
    products = [_product_bytes(run, x) + flowing.get(x.role, 2 * g) for x in run.layer if x.role in _MLP]
    gone = sum(T * run.rank_at(x) * size for x in own)  # what down_proj kept
    return max([g + 3 * wide, *products, 2 * g + _expert_bytes(run)[1]]) - gone


def transient_bytes(run: PlannedRun) -> int:
    """Return the most bytes of gradients and weights that exist beside the kept ones in one layer's backward."""
    s, b, T, size = run.shape, run.batch, run.batch.all_tokens, run.itemsize
    g = T * s.hidden * size
    if goes_by_tiles(run):
        tile = replace(run, batch=replace(b, rows=1, tokens=tile_tokens(T), keys=0))
        own = 2 * tile.batch.all_tokens * s.ff * size + _adapter_bytes(tile, [x for x in run.layer if x.role in _MLP])
        # beside a tile are the gradients of the MLP's output and input; what it kept is its input
        in_mlp, of_mlp = 2 * g + own + _mlp_peak(tile), g
    else:
        in_mlp, of_mlp = _mlp_peak(run), _expert_bytes(run)[0] + 2 * T * _dense_width(run) * size
    # the same for the attention, by its implementation. Its products take the most in layers without a known MLP
    heads, kv = T * s.heads * s.head_dim * size, T * s.kv_heads * s.head_dim * size
    moments = [2 * g + _product_bytes(run, x) for x in run.layer if x.role not in _MLP]
    if b.keys:  # each row's gradients of keys and values, one of them sorted, and the tokens' own
        moments.append(2 * g + 2 * heads + 3 * b.keys * s.kv_heads * s.head_dim * size + kv)
    if run.attention == "eager":
        moments.append(2 * g + 2 * heads + 2 * b.rows * s.heads * b.tokens**2 * 4)
    elif groups := _groups(run):  # the padded gradients of all, twice, and of one group in its own dtype
        each, kv_each = s.heads * s.head_dim, s.kv_heads * s.head_dim
        workspace = sum(queries * 3 * each + keys * 4 * kv_each for queries, keys, _ in groups) * size
        workspace += max((queries * 2 * each + keys * 2 * kv_each) * wide for queries, keys, wide in groups)
        moments.append(g + 2 * heads + 2 * kv + workspace)
    else:  # flash attention on a GPU: ∂q in fp32, and with grouped keys ∂k and ∂v of every head
        # read in torch's source (``mha_bwd`` in flash_api.cpp)
        workspace = 4 * T * s.heads * (s.head_dim + 1) + (2 * heads if s.kv_heads < s.heads else 0)
        moments.append(g + 2 * heads + 2 * kv + (workspace if run.machine.on_gpu else 0))
    in_attention = max(moments) - of_mlp - norm_bytes(run)  # the MLP and its norm are through
    most = max(in_mlp, in_attention) - norm_bytes(run)  # so is the final norm, since before the layers
    return max([most, *(each.bytes_of(b)[1] - 2 * T * s.ff * size for each in s.recurrences.values())])


_CHUNK = 64  # of tokens, of the gated delta rule
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj")


class Recurrence(NamedTuple):
    """The recurrent part of a layer; the bytes are coefficients of tokens², tokens and 1, for one row."""

    path: str
    chunk: int
    kept: tuple[float, ...]  # by autograd
    beside: tuple[float, ...]  # the most that exists beside it, in forward or backward

    def bytes_of(self, batch: Batch) -> tuple[int, int]:
        """Return the bytes kept by autograd, and the most beside them, for the rows of a batch."""
        tokens = -(-batch.tokens // self.chunk) * self.chunk
        return batch.rows * int(np.polyval(self.kept, tokens)), batch.rows * int(np.polyval(self.beside, tokens))


def recurrences(model: nn.Module, hidden: int, dtype: torch.dtype) -> dict[int, Recurrence]:
    """Count the recurrences of a model without weights, by layer. {} where transformers' code does not run on meta."""
    found, counted = {}, dict[Any, Any]()
    for path, module in model.named_modules():
        layer = LAYER.search(f".{path}.")
        if layer is None or not (hasattr(module, "A_log") and hasattr(module, "conv1d")):
            continue
        chunk = getattr(module, "chunk_size", 8 if hasattr(module, "dt_proj") else _CHUNK)  # Mamba goes token by token
        key = type(module), tuple(parameter.shape for parameter in module.parameters())  # the same key: counted once
        try:
            counted[key] = counted.get(key) or _count(module, hidden, dtype, chunk)
        except (TypeError, ValueError, RuntimeError, NotImplementedError):
            return {}
        found[int(layer[1])] = Recurrence(path, chunk, *counted[key])
    return found


def kinds_of_layers(run: PlannedRun) -> list[tuple[PlannedRun, int]]:
    """Return, for each kind of layer, the run as if all layers were of that kind, and how many of them are."""
    shape, kinds = run.shape, dict[Any, list[int]]()
    if not shape.recurrences:
        return [(run, shape.layers)]
    for layer in {x.layer for x in shape.linears if x.layer is not None}:
        own = shape.recurrences.get(layer)
        beside = [x for x in shape.linears if x.layer == layer and not (own and x.name.startswith(f"{own.path}."))]
        attends = own is None or any(x.role in _ATTENTION for x in beside)
        has_mlp = any(x.role not in _ATTENTION for x in beside) or any(x.layer == layer for x in shape.experts)
        kinds.setdefault((own and own._replace(path=""), attends, has_mlp), []).append(layer)
    found, adapted = [], run.adapted_names
    for (own, attends, has_mlp), layers in kinds.items():
        linears = [replace(x, is_target=x.name in adapted) for x in shape.linears if x.layer in layers]
        experts = [x for x in shape.experts if x.layer in layers]
        like = replace(shape, linears=linears, experts=experts, recurrences={0: own} if own else {})
        like = like if attends else replace(like, heads=0, kv_heads=0, head_norms=False)
        like = like if has_mlp else replace(like, ff=0)
        found.append((replace(run.changed({"adapter.targets": "all-linear"}), shape=like), len(layers)))
    return found


def _count(module: nn.Module, hidden: int, dtype: torch.dtype, chunk: int) -> tuple[tuple[float, ...], ...]:
    module = copy.deepcopy(module).to(dtype).requires_grad_(False).train()
    lengths, counts = [2 * chunk, 4 * chunk, 8 * chunk], []
    for tokens in lengths:
        x = torch.empty(1, tokens, hidden, dtype=dtype, device="meta", requires_grad=True)
        with _Live() as live:
            y = module(x)
            y = y[0] if isinstance(y, tuple) else y
            kept = live.now - y.nbytes
            y.backward(torch.empty_like(y))
        counts.append((kept, live.peak - kept))
    return tuple(tuple(np.polyfit(lengths, each, 2)) for each in zip(*counts, strict=True))


class _Live(TorchDispatchMode):
    """Counts the bytes of live storages that operators have returned, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._storages = weakref.WeakSet[torch.UntypedStorage]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            # views share a storage, which counts once
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self._storages:
                self._storages.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        # autograd adds up two gradients in place, but not while such a mode is on
        adds_up = func is torch.ops.aten.add.Tensor and torch._C._current_graph_task_id() != -1
        self.peak = max(self.peak, self.now - (out.nbytes if adds_up else 0))
        return out

    def _free(self, size: int) -> None:
        self.now -= size
