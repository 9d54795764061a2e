"""What autograd keeps of one decoder layer, and the most that exists beside it while its backward runs. Bytes.

Read off the code that runs: `qvera.models.linear` (keeps the module and nothing else),
`qvera.adapters.products.functional` (keeps z), `qvera.adapters.products.fused` (keeps z or x),
`qvera.models.norm_mlp`, and transformers' Llama layer.
tests/training/plan/test_activations.py counts the same with ``torch.autograd.graph.saved_tensors_hooks``. Notation: T
tokens of the batch in all, S tokens a row.
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
from qvera.models.copy_stream import CHUNK_BYTES
from qvera.models.linear import BLOCK_WEIGHTS
from qvera.models.tiled_mlp import TILED_ABOVE_TOKENS, tile_tokens
from qvera.training.plan.bank import row_bytes, row_product_bytes
from qvera.training.plan.run import PlannedRun
from qvera.training.plan.shape import Linear

_MLP = ("gate_proj", "up_proj", "down_proj")
RANDOM_STATE_BYTES = 5056  # of torch's CPU generator

_INPUTS = {
    "q_proj": "norm1", "k_proj": "norm1", "v_proj": "norm1", "o_proj": "attention",
    "gate_proj": "norm2", "up_proj": "norm2", "down_proj": "product",
}  # fmt: skip


def kept_bytes(run: PlannedRun) -> int:
    """What one decoder layer keeps from forward for backward, its input included: the first norm keeps that."""
    T, size = run.batch.all_tokens, run.itemsize
    if goes_by_tiles(run):  # the MLP keeps its input
        inside, outside = T * run.shape.hidden * size, [x for x in run.layer if x.role not in _MLP]
    else:
        inside, outside = 2 * T * run.shape.ff * size, run.layer
    return norm_bytes(run) * 2 + _attention_bytes(run) + inside + _adapter_bytes(run, outside)


def goes_by_tiles(run: PlannedRun) -> bool:
    """Whether MLPs take some tokens at a time (`qvera.models.tiled_mlp`)."""
    if not run.checkpointing or run.recipe.adapter.dropout or run.sharing.stage == 3 or run.mixes_rows:
        return False
    return run.batch.all_tokens > TILED_ABOVE_TOKENS and {x.role for x in run.layer} >= set(_MLP)


def _one_tile(run: PlannedRun) -> PlannedRun:
    tokens = tile_tokens(run.batch.all_tokens)
    return replace(run, batch=replace(run.batch, rows=1, tokens=tokens, keys=0))


def input_bytes(run: PlannedRun) -> int:
    """What checkpointed layers keep on the device: their inputs, and random state where they drop elements."""
    layers = run.shape.layers
    inputs = INPUTS_ON_DEVICE if run.checkpointing == "offload" else layers
    # a dropout in the model's config counts as well, but a shape does not hold it
    random = layers * RANDOM_STATE_BYTES if run.recipe.adapter.dropout else 0
    return min(inputs, layers) * run.batch.all_tokens * run.shape.hidden * run.itemsize + random


def offloaded_bytes(run: PlannedRun) -> int:
    """Pinned RAM that the inputs of checkpointed layers take where they are offloaded (`qvera.models.copy_stream`)."""
    if run.checkpointing != "offload":
        return 0
    one = run.batch.all_tokens * run.shape.hidden * run.itemsize
    return run.shape.layers * -(-one // CHUNK_BYTES) * CHUNK_BYTES


def product_shapes(run: PlannedRun) -> int:
    """Different matrix products in which one token count meets a decoder layer, forward and backward."""
    pairs = {("W", x.n, x.m) for x in run.layer}
    for x in run.layer:
        if x.name in run.adapted_names and not run.is_summed(x):
            pairs |= {("A", x.n, run.rank), ("B", run.rank, x.m)}
    return 2 * len(pairs)


def norm_bytes(run: PlannedRun) -> int:
    """An RMS norm keeps its input and one factor a token in fp32 (`qvera.models.norm_mlp`)."""
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
    """Of each group its places, padding included, and the bytes of a number in it."""
    wide = max(run.itemsize, 4)
    return [(rows * length, wide if length <= FP32_TOKENS else run.itemsize) for rows, length in run.batch.groups]


def _group_kept_bytes(run: PlannedRun) -> int:
    """The padded queries, keys and values, each group's own where it goes to fp32; the output and a number for each."""
    s, sizes = run.shape, _group_sizes(run)
    qkv = (s.heads + 2 * s.kv_heads) * s.head_dim
    gathered = sum(places for places, _ in sizes) * qkv * run.itemsize
    own = sum(places * qkv * size for places, size in sizes if size > run.itemsize)
    kept = own + (gathered if any(size == run.itemsize for _, size in sizes) else 0)
    return kept + sum(places * s.heads * (s.head_dim * size + 4) for places, size in sizes)


def _group_moment_bytes(run: PlannedRun) -> int:
    """Backward through the groups: the padded gradients of all, twice, and of one group in its own dtype."""
    s, sizes = run.shape, _group_sizes(run)
    heads, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    places = sum(places for places, _ in sizes)
    return places * (heads + 2 * (heads + 2 * kv)) * run.itemsize + max(p * 2 * (heads + kv) * n for p, n in sizes)


def _adapter_bytes(run: PlannedRun, linears: Sequence[Linear]) -> int:
    """Z of each input that low-rank paths read (shared by its readers), x where `summed.keeps_input`."""
    T, size, section = run.batch.all_tokens, run.itemsize, run.recipe.adapter
    attention_keeps = run.attention != "eager" and not _by_groups(run)  # its output, which o_proj reads
    held: dict[tuple[str, str], int] = {}
    for x in linears:
        if x.name not in run.adapted_names:
            continue
        source = _INPUTS.get(x.role, x.name)
        if run.mixes_rows:
            held[x.name, "vectors of each row"] = row_bytes(run, x)
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


def weight_bytes(run: PlannedRun, x: Linear) -> int:
    """The most that reading the weight W [m, n] takes: itself or a block of it in the compute dtype, and its scales."""
    if not run.is_quantized(x):
        return 0
    numbers, size, T = x.n * x.m, run.itemsize, run.batch.all_tokens
    if run.goes_by_blocks(x):
        added_up = T * x.n * (4 + size) if size < 4 else 0  # g W in fp32, and one block's part of it
        return BLOCK_WEIGHTS * size + added_up + numbers // 16
    return numbers * size + numbers // 16


def product_bytes(run: PlannedRun, x: Linear) -> int:
    """The most that the weights of one linear's products take for the moment: W, C = diag(b) B diag(d), W + ΔW, M."""
    read, size, section = weight_bytes(run, x), run.itemsize, run.recipe.adapter
    if x.name not in run.adapted_names:
        return read
    if run.mixes_rows:
        return read + row_product_bytes(run, x)
    pair = x.m * run.rank_at(x)
    if not run.has_vectors(x):
        return read + run.method_bytes(x).working
    # combining d, B and b, and taking their gradients from M, goes by blocks of rows in fp32 (`low_rank.row_blocks`)
    block = pair * 4 if run.machine.on_gpu else min(pair, BLOCK_ELEMENTS) * 4
    combining = 2 * block + (pair * size if block < pair * 4 else 0)
    if run.is_summed(x):
        building = x.n * x.m * size + combining
        adding = x.n * x.m * size + pair * size
        gradient = (x.n * x.m * size if run.keeps_input(x) else 0) + pair * size
        if section.input_scale:
            # A diag(a); then z or M's blocks; then C, N, and z's gradient or A and its product with N in fp32
            side, z = run.rank * x.n, run.batch.all_tokens * run.rank * size
            gradient += side * size + max(z, block, (pair + side) * size + max(z, side * 8))
        else:
            gradient += block
        return max(read, building, adding, gradient)
    gradient = pair * size + block + (block if size < 4 else 0)
    if few_tokens(run.batch.all_tokens, torch.empty(x.m, run.rank, device="meta"), section.b_groups):
        combining = run.batch.all_tokens * (x.m * min(section.b_groups, 2) + run.rank) * size
    # where rows are scaled: beside the gradient of the output, that of what is scaled
    flowing = run.batch.all_tokens * x.m * size if run.method.change is Change.SCALED else 0
    return max(read, gradient, combining) + flowing


def transient_bytes(run: PlannedRun) -> int:
    """The most that exists beside what is kept while backward goes through one layer: gradients and weights.

    Every moment is that of one kernel, with all that is alive then. tests/gpu/test_plan.py compares them with the real
    code on a fake accelerator.
    """
    T, size = run.batch.all_tokens, run.itemsize
    g, wide = T * run.shape.hidden * size, T * run.shape.ff * size
    if goes_by_tiles(run):
        tile, mlp = _one_tile(run), [x for x in run.layer if x.role in _MLP]
        kept = 2 * tile.batch.all_tokens * run.shape.ff * size + _adapter_bytes(tile, mlp)  # by a tile's own graph
        # beside a tile are the gradients of the MLP's output and input; what it kept is its input
        in_mlp, of_mlp = 2 * g + kept + max(_mlp_moments(tile)), g
    else:
        z = _z_bytes(run)
        in_mlp = max(_mlp_moments(run))
        of_mlp = 2 * wide + z.get("down_proj", 0) + max(z.get("gate_proj", 0), z.get("up_proj", 0))
    in_attention = max(_attention_moments(run)) - of_mlp - norm_bytes(run)  # the MLP and its norm are through
    return max(in_mlp, in_attention) - norm_bytes(run)  # so is the final norm, since before the layers


def _mlp_moments(run: PlannedRun) -> list[int]:
    """Bytes while backward goes through the MLP. ``g`` is the gradient of the residual stream."""
    T, size, z = run.batch.all_tokens, run.itemsize, _z_bytes(run)
    g, wide = T * run.shape.hidden * size, T * run.shape.ff * size
    down = z.get("down_proj", 0)
    flowing = {
        "down_proj": g + _input_gradients(run, "down_proj") * wide - down,
        # the gradients of gate and up have taken the place of what the MLP kept
        **dict.fromkeys(("gate_proj", "up_proj"), 2 * g - down),
    }
    inside = [x for x in run.layer if x.role in _MLP]
    return [g + 3 * wide - down, *(product_bytes(run, x) + flowing[x.role] for x in inside)]


def _attention_moments(run: PlannedRun) -> list[int]:
    """Bytes while backward goes through the attention (and all that is not the MLP)."""
    s, T, size = run.shape, run.batch.all_tokens, run.itemsize
    g = T * s.hidden * size
    heads, kv = T * s.heads * s.head_dim * size, T * s.kv_heads * s.head_dim * size
    gone = _z_bytes(run).get("o_proj", 0)
    flowing = {
        "o_proj": g + _input_gradients(run, "o_proj") * heads,
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), 3 * g + heads + 2 * kv - gone),
    }
    moments = [product_bytes(run, x) + flowing.get(x.role, 2 * g) for x in run.layer if x.role not in _MLP]
    if run.batch.keys:  # each row's gradients of keys and values, one of them sorted, and the tokens' own
        copied = run.batch.keys * s.kv_heads * s.head_dim * size
        moments.append(2 * g + 2 * heads + 3 * copied + kv)
    if run.attention == "eager":
        moments.append(2 * g + 2 * heads + 2 * run.batch.rows * s.heads * run.batch.tokens**2 * 4)
    else:
        workspace = _group_moment_bytes(run) if _by_groups(run) else _attention_workspace(run)
        moments.append(g + 2 * heads + 2 * kv + workspace - gone)
    return moments


def _z_bytes(run: PlannedRun) -> dict[str, int]:
    """Bytes of the z that each linear keeps, by its role; linears with one input share theirs."""
    kept = [x for x in run.layer if x.name in run.adapted_names and not run.keeps_input(x)]
    return {x.role: run.batch.all_tokens * run.rank_at(x) * run.itemsize for x in kept}


def _input_gradients(run: PlannedRun, role: str) -> int:
    """How many gradients of one linear's input there are at a time: of W, and of A where it has a path of its own."""
    own = (x for x in run.layer if x.role == role and x.name in run.adapted_names)
    return 1 + any(not run.is_summed(x) and not run.is_one_node for x in own)


def _attention_workspace(run: PlannedRun) -> int:
    """What flash attention's backward allocates on a GPU: ∂q in fp32, and with grouped keys ∂k and ∂v of every head.

    Read in torch's source (``mha_bwd`` in flash_api.cpp).
    """
    s, T = run.shape, run.batch.all_tokens
    if not run.machine.on_gpu:
        return 0
    heads = T * s.heads * s.head_dim
    return 4 * heads + 4 * T * s.heads + (2 * heads * run.itemsize if s.kv_heads < s.heads else 0)
