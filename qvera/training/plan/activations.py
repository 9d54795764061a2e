"""Bytes that autograd keeps of one decoder layer, and the most that exists beside them while its backward runs.

Read off the code that runs: `qvera.models.linear` (keeps the module only), `qvera.adapters.products.functional` (keeps
z), `qvera.adapters.products.fused` (keeps z or x), `qvera.models.lean_layers`, and transformers' Llama layer.
tests/training/plan/test_activations.py counts the same with ``saved_tensors_hooks``, and tests/gpu/test_plan.py on a
fake accelerator. T: tokens of the batch.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from qvera.adapters.methods import Source
from qvera.adapters.methods.base import Change
from qvera.adapters.products.functional import few_tokens
from qvera.kernels.low_rank import BLOCK_ELEMENTS
from qvera.models.attention import FP32_TOKENS
from qvera.models.checkpointing import INPUTS_ON_DEVICE
from qvera.models.lean_layers import TILED_ABOVE_TOKENS, tile_tokens
from qvera.models.linear import BLOCK_WEIGHTS
from qvera.models.stream import CHUNK_BYTES
from qvera.training.plan.run import Linear, PlannedRun

_MLP = ("gate_proj", "up_proj", "down_proj")
RANDOM_STATE_BYTES = 5056  # of torch's CPU generator

_INPUTS = {
    "q_proj": "norm1", "k_proj": "norm1", "v_proj": "norm1", "o_proj": "attention",
    "gate_proj": "norm2", "up_proj": "norm2", "down_proj": "product",
}  # fmt: skip


def kept_bytes(run: PlannedRun) -> int:
    """What one decoder layer keeps for backward, its input included (the first norm keeps that)."""
    T, size = run.batch.all_tokens, run.itemsize
    if goes_by_tiles(run):  # the MLP keeps its input
        inside, outside = T * run.shape.hidden * size, [x for x in run.layer if x.role not in _MLP]
    else:
        inside, outside = 2 * T * run.shape.ff * size, run.layer
    return norm_bytes(run) * 2 + _attention_bytes(run) + inside + _adapter_bytes(run, outside)


def goes_by_tiles(run: PlannedRun) -> bool:
    """Whether MLPs take some tokens at a time (`qvera.models.lean_layers`)."""
    if not run.checkpointing or run.recipe.adapter.dropout or run.sharing.stage == 3 or run.mixes_rows:
        return False
    return run.batch.all_tokens > TILED_ABOVE_TOKENS and {x.role for x in run.layer} >= set(_MLP)


def input_bytes(run: PlannedRun) -> int:
    """What checkpointed layers keep on the device: their inputs, and random state where they drop elements."""
    layers = run.shape.layers
    inputs = min(INPUTS_ON_DEVICE, layers) if run.checkpointing == "offload" else layers
    # a dropout in the model's config counts as well, but a shape does not hold it
    random = layers * RANDOM_STATE_BYTES if run.recipe.adapter.dropout else 0
    return inputs * run.batch.all_tokens * run.shape.hidden * run.itemsize + random


def offloaded_bytes(run: PlannedRun) -> int:
    """Pinned RAM for the offloaded inputs of checkpointed layers (`qvera.models.stream`)."""
    if run.checkpointing != "offload":
        return 0
    one = run.batch.all_tokens * run.shape.hidden * run.itemsize
    return run.shape.layers * -(-one // CHUNK_BYTES) * CHUNK_BYTES


def product_shapes(run: PlannedRun) -> int:
    """How many different matrix products one token count needs in a decoder layer, forward and backward."""
    pairs = {("W", x.n, x.m) for x in run.layer}
    for x in run.layer:
        if x.name in run.adapted_names and not run.is_summed(x):
            pairs |= {("A", x.n, run.rank), ("B", run.rank, x.m)}
    return 2 * len(pairs)


def norm_bytes(run: PlannedRun) -> int:
    """An RMS norm keeps its input and one factor a token in fp32 (`qvera.models.lean_layers`)."""
    return run.batch.all_tokens * (run.shape.hidden * run.itemsize + 4)


def _attention_bytes(run: PlannedRun) -> int:
    s, b, T, size = run.shape, run.batch, run.batch.all_tokens, run.itemsize
    q, kv = T * s.heads * s.head_dim, T * s.kv_heads * s.head_dim
    normed = T * (s.heads + s.kv_heads) * (s.head_dim + 1) * 4 if s.head_norms else 0
    if run.attention == "eager":
        squares = b.rows * s.heads * b.tokens**2
        return 3 * q * size + squares * 4 + (squares * size if size < 4 else 0) + normed
    if _by_groups(run):
        return _group_kept_bytes(run) + normed
    masked = b.padded or (b.joined and not b.offsets)
    # with a mask sdpa repeats grouped keys and values, and so do we where there is no flash attention for them
    repeats = (masked and run.attention == "sdpa") or (run.machine.on_gpu and run.machine.dtype != torch.bfloat16)
    keys = q if repeats else kv
    keys = b.keys * s.kv_heads * s.head_dim if b.keys else keys  # the common prefix's are copied for each row
    # sdpa turns a padding mask into an additive one in every layer; a joined sequence's is additive and shared
    mask = b.rows * b.tokens**2 * size if b.padded and not b.joined and run.attention == "sdpa" else 0
    return (2 * q + 2 * keys) * size + T * s.heads * 4 + mask + normed


def _by_groups(run: PlannedRun) -> bool:
    """Whether a CPU attends to joined rows in groups of like length (`qvera.models.attention.attend_in_groups`)."""
    return bool(run.batch.groups) and not run.machine.on_gpu


def _group_sizes(run: PlannedRun) -> list[tuple[int, int]]:
    """Of each group its places, padding included, and the bytes of a number."""
    wide = max(run.itemsize, 4)
    return [(rows * length, wide if length <= FP32_TOKENS else run.itemsize) for rows, length in run.batch.groups]


def _group_kept_bytes(run: PlannedRun) -> int:
    """Padded queries, keys and values (a group's own where it goes to fp32), the output, and a number for each."""
    s, sizes = run.shape, _group_sizes(run)
    qkv = (s.heads + 2 * s.kv_heads) * s.head_dim
    gathered = sum(places for places, _ in sizes) * qkv * run.itemsize
    own = sum(places * qkv * size for places, size in sizes if size > run.itemsize)
    kept = own + (gathered if any(size == run.itemsize for _, size in sizes) else 0)
    return kept + sum(places * s.heads * (s.head_dim * size + 4) for places, size in sizes)


def _adapter_bytes(run: PlannedRun, linears: Sequence[Linear]) -> int:
    """Z of each input that low-rank paths read (shared by its readers), x where `fused.keeps_input`."""
    T, size, section = run.batch.all_tokens, run.itemsize, run.recipe.adapter
    attention_keeps = run.attention != "eager" and not _by_groups(run)  # its output, which o_proj reads
    held: dict[tuple[str, str], int] = {}  # by what it is of, so that what is shared counts once
    for x in linears:
        if x.name not in run.adapted_names:
            continue
        source = _INPUTS.get(x.role, x.name)
        if run.mixes_rows:  # vectors of each adapter of the pass, in fp32 (`qvera.adapters.products`)
            numbers = run.rank + section.b_groups * x.m + (x.n if section.input_scale else 0)
            held[x.name, "vectors"] = 4 * min(run.slots, run.recipe.training.per_device_train_batch_size) * numbers
        trains_A = run.method.source is Source.TRAINED
        reads_x = run.keeps_input(x) or trains_A or (section.input_scale and not section.dropout)
        if run.sampled_tokens is not None:  # rows of its own, with a number and a weight each
            held[x.name if section.dropout else source, "x"] = run.sampled_tokens * (x.n * size + 8 + 4)
        elif reads_x and not (source == "attention" and attention_keeps):
            held[source, "x"] = T * x.n * size
        own = run.method_bytes(x)
        held[x.name, "of the method's own"] = own.kept
        if run.method.change is Change.SCALED:
            held[x.name, "y"] = T * x.m * size + 8 * x.m  # what its rows are scaled with in fp32, and their norms
        if section.dropout:  # every layer drops other elements: its own z, which elements, and its own x to scale
            held[x.name, "z"] = T * run.rank_at(x) * size + T * x.n + (T * x.n * size if section.input_scale else 0)
        elif run.keeps_input(x):
            continue
        else:
            shared = run.method.source is Source.SEEDED and not section.input_scale
            own_rank = run.rank_at(x)  # readers of other ranks have another z
            graph = "without" if run.is_summed(x) else "with"
            held[source if shared else x.name, f"z of rank {own_rank} {graph} a graph"] = T * own_rank * size
        held[x.name, "A, B"] = own.cast
    return sum(held.values())


def _product_bytes(run: PlannedRun, x: Linear) -> int:
    """The most that the weights of one linear's products take for the moment: W, C = diag(b) B diag(d), W + ΔW, M."""
    section, size, T, numbers = run.recipe.adapter, run.itemsize, run.batch.all_tokens, x.n * x.m
    read = 0
    if run.goes_by_blocks(x):  # a block of W; g W in fp32, and one block's part of it
        read = BLOCK_WEIGHTS * size + (T * x.n * (4 + size) if size < 4 else 0) + numbers // 16
    elif run.is_quantized(x):  # W, and its scales
        read = numbers * size + numbers // 16
    if x.name not in run.adapted_names:
        return read
    if run.mixes_rows:  # z scaled, u, and in fp32 what is added up
        return read + T * (x.m * (size + 4) + 2 * run.rank * size)
    if not run.has_vectors(x):
        return read + run.method_bytes(x).working
    pair, side, z = x.m * run.rank_at(x), run.rank * x.n, T * run.rank * size
    # combining d, B and b, and taking their gradients from M, goes by blocks of rows in fp32 (`low_rank.row_blocks`)
    block = pair * 4 if run.machine.on_gpu else min(pair, BLOCK_ELEMENTS) * 4
    combining = 2 * block + (pair * size if block < pair * 4 else 0)
    if run.is_summed(x):  # W + ΔW while C is made; with an a, gᵀ x beside C, M, A diag(a), N, and z's gradient or A N
        scaling = 2 * (pair + side) * size + max(z, 8 * side) if section.input_scale else 0
        return max(read, numbers * size + max(combining, scaling))
    if few_tokens(T, torch.empty(x.m, run.rank, device="meta"), section.b_groups):
        combining = T * (x.m * min(section.b_groups, 2) + run.rank) * size
    # where rows are scaled: beside the gradient of the output, that of what is scaled
    flowing = T * x.m * size if run.method.change is Change.SCALED else 0
    return max(read, pair * size + (2 if size < 4 else 1) * block, combining) + flowing


def transient_bytes(run: PlannedRun) -> int:
    """The most that exists beside what is kept while backward goes through one layer: gradients and weights."""
    T, size = run.batch.all_tokens, run.itemsize
    g, wide = T * run.shape.hidden * size, T * run.shape.ff * size
    if goes_by_tiles(run):
        tile = replace(run, batch=replace(run.batch, rows=1, tokens=tile_tokens(T), keys=0))
        kept = 2 * tile.batch.all_tokens * run.shape.ff * size  # by a tile's own graph
        kept += _adapter_bytes(tile, [x for x in run.layer if x.role in _MLP])
        # beside a tile are the gradients of the MLP's output and input; what it kept is its input
        in_mlp, of_mlp = 2 * g + kept + max(_mlp_moments(tile)), g
    else:
        z = _z_bytes(run)
        in_mlp = max(_mlp_moments(run))
        of_mlp = 2 * wide + z.get("down_proj", 0) + max(z.get("gate_proj", 0), z.get("up_proj", 0))
    in_attention = max(_attention_moments(run)) - of_mlp - norm_bytes(run)  # the MLP and its norm are through
    return max(in_mlp, in_attention) - norm_bytes(run)  # so is the final norm, since before the layers


def _mlp_moments(run: PlannedRun) -> list[int]:
    """Bytes at each kernel while backward goes through the MLP. ``g``: the gradient of the residual stream."""
    T, size, down = run.batch.all_tokens, run.itemsize, _z_bytes(run).get("down_proj", 0)
    g, wide = T * run.shape.hidden * size, T * run.shape.ff * size
    # the gradients of gate and up have taken the place of what the MLP kept
    flowing = {"down_proj": g + _input_gradients(run, "down_proj") * wide, "gate_proj": 2 * g, "up_proj": 2 * g}
    inside = [_product_bytes(run, x) + flowing[x.role] - down for x in run.layer if x.role in _MLP]
    return [g + 3 * wide - down, *inside]


def _attention_moments(run: PlannedRun) -> list[int]:
    """Bytes at each kernel while backward goes through the attention, and all that is not the MLP."""
    s, b, T, size = run.shape, run.batch, run.batch.all_tokens, run.itemsize
    g, gone = T * s.hidden * size, _z_bytes(run).get("o_proj", 0)
    heads, kv = T * s.heads * s.head_dim * size, T * s.kv_heads * s.head_dim * size
    flowing = {
        "o_proj": g + _input_gradients(run, "o_proj") * heads,
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), 3 * g + heads + 2 * kv - gone),
    }
    moments = [_product_bytes(run, x) + flowing.get(x.role, 2 * g) for x in run.layer if x.role not in _MLP]
    if b.keys:  # each row's gradients of keys and values, one of them sorted, and the tokens' own
        moments.append(2 * g + 2 * heads + 3 * b.keys * s.kv_heads * s.head_dim * size + kv)
    if run.attention == "eager":
        return [*moments, 2 * g + 2 * heads + 2 * b.rows * s.heads * b.tokens**2 * 4]
    workspace = 0
    if _by_groups(run):  # the padded gradients of all, twice, and of one group in its own dtype
        sizes, each, kv_each = _group_sizes(run), s.heads * s.head_dim, s.kv_heads * s.head_dim
        workspace = sum(places for places, _ in sizes) * (3 * each + 4 * kv_each) * size
        workspace += max(places * 2 * (each + kv_each) * itemsize for places, itemsize in sizes)
    elif run.machine.on_gpu:  # flash attention: ∂q in fp32, and with grouped keys ∂k and ∂v of every head
        # read in torch's source (``mha_bwd`` in flash_api.cpp)
        workspace = 4 * T * s.heads * (s.head_dim + 1) + (2 * heads if s.kv_heads < s.heads else 0)
    return [*moments, g + 2 * heads + 2 * kv + workspace - gone]


def _z_bytes(run: PlannedRun) -> dict[str, int]:
    """Bytes of the z that each linear keeps, by its role; linears with one input share theirs."""
    kept = [x for x in run.layer if x.name in run.adapted_names and not run.keeps_input(x)]
    return {x.role: run.batch.all_tokens * run.rank_at(x) * run.itemsize for x in kept}


def _input_gradients(run: PlannedRun, role: str) -> int:
    """How many gradients of one linear's input there are at a time: of W, and of A where it has a path of its own."""
    own = (x for x in run.layer if x.role == role and x.name in run.adapted_names)
    return 1 + any(not run.is_summed(x) and not run.is_one_node for x in own)
