"""What autograd keeps of one decoder layer, and the most that exists beside it while its backward runs. Bytes.

Read off the code that runs: `qvera.models.linear` (keeps the module and nothing else), `qvera.adapters.functional`
(keeps z), `qvera.adapters.fused` (keeps z or x), `qvera.models.norm_mlp`, and transformers' Llama layer.
tests/training/plan/test_activations.py counts the same with ``torch.autograd.graph.saved_tensors_hooks``. Notation: T
tokens of the batch in all, S tokens a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qvera.adapters import fused
from qvera.adapters.functional import BLOCK_ELEMENTS, few_tokens
from qvera.models.linear import BLOCK_WEIGHTS, backward_by_blocks
from qvera.training.plan.machine import Machine
from qvera.training.plan.shapes import Linear, Shape

_INPUTS = {
    "q_proj": "norm1", "k_proj": "norm1", "v_proj": "norm1", "o_proj": "attention",
    "gate_proj": "norm2", "up_proj": "norm2", "down_proj": "product",
}  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """One forward pass.

    Attributes:
        rows: B.
        tokens: S, of each row, padding included; of the one joined sequence where ``joined``.
        trained_tokens: in all rows; only these reach the head.
        padded: rows differ in length, so that attention gets a mask.
        joined: the rows stand in one sequence behind their common prefix (`qvera.data.collate`), with a mask of its
        own.
        source: where the numbers come from, in words.
        longest_row: tokens of the longest row of all, for answers.
        packed_rows: rows of the data in it where they are packed (``data.packing``), else 0.
        token_counts: how many different numbers of tokens the run's forward passes have.
    """

    rows: int
    tokens: int
    trained_tokens: int
    padded: bool
    joined: bool
    source: str
    longest_row: int
    packed_rows: int = 0
    token_counts: int = 1

    @property
    def all_tokens(self) -> int:
        """Tokens of all rows, padding included."""
        return self.rows * self.tokens


@dataclass(frozen=True)
class Adapted:
    """What the layers of a plan run with."""

    shape: Shape
    machine: Machine
    batch: Batch
    rank: int
    b_groups: int
    input_scale: bool
    names: frozenset[str]
    """Adapted linears."""
    dropout: bool
    attention: str
    quantization: str
    """As in the recipe: nf4, fp4, int8 or none."""

    @property
    def quantized(self) -> bool:
        """Whether the base model is quantized."""
        return self.quantization != "none"

    def goes_by_blocks(self, x: Linear) -> bool:
        """Whether the weight is never whole: its products take some rows at a time (`qvera.models.linear`)."""
        four_bit = self.quantization in ("nf4", "fp4") and x.quantizable and self.machine.device_type == "cpu"
        large = x.n * x.m > BLOCK_WEIGHTS and x.n % 64 == 0
        return four_bit and large and not self.is_summed(x) and backward_by_blocks(self.batch.all_tokens, x.n)

    def layer(self) -> list[Linear]:
        """The linears of one decoder layer that stands for all; the second one, where some first ones differ."""
        present = sorted({x.layer for x in self.shape.linears if x.layer is not None})
        number = present[min(1, len(present) - 1)]
        return [x for x in self.shape.linears if x.layer == number]

    def is_adapted(self, x: Linear) -> bool:
        """Whether the adapter changes this linear."""
        return x.name in self.names

    def is_summed(self, x: Linear) -> bool:
        """Whether the layer goes through W + ΔW (`qvera.adapters.fused`)."""
        return (
            self.is_adapted(x)
            and not self.dropout
            and fused.pays(
                self.batch.all_tokens,
                x.n,
                x.m,
                self.rank,
                self.machine.dtype,
                self.machine.device_type,
                self.input_scale,
            )
        )

    def keeps_input(self, x: Linear) -> bool:
        """Whether the backward pass needs the layer's input (`qvera.adapters.fused`)."""
        return self.is_summed(x) and fused.keeps_input(self.batch.all_tokens, x.n, x.m, self.rank, self.input_scale)


def kept_bytes(a: Adapted) -> int:
    """What one decoder layer keeps from forward for backward, its input included: the first norm keeps that."""
    s, T, size = a.shape, a.batch.all_tokens, a.machine.itemsize
    return norm_bytes(a) * 2 + _attention_bytes(a) + 2 * T * s.ff * size + _adapter_bytes(a)


def product_shapes(a: Adapted) -> int:
    """Different matrix products in which one token count meets a decoder layer, forward and backward."""
    pairs = {("W", x.n, x.m) for x in a.layer()}
    for x in a.layer():
        if a.is_adapted(x) and not a.is_summed(x):
            pairs |= {("A", x.n, a.rank), ("B", a.rank, x.m)}
    return 2 * len(pairs)


def norm_bytes(a: Adapted) -> int:
    """An RMS norm keeps its input and one factor a token in fp32 (`qvera.models.norm_mlp`)."""
    return a.batch.all_tokens * (a.shape.hidden * a.machine.itemsize + 4)


def _attention_bytes(a: Adapted) -> int:
    s, b, T, size = a.shape, a.batch, a.batch.all_tokens, a.machine.itemsize
    q, kv = T * s.heads * s.head_dim, T * s.kv_heads * s.head_dim
    normed = T * (s.heads + s.kv_heads) * (s.head_dim + 1) * 4 if s.head_norms else 0
    if a.attention == "eager":
        squares = b.rows * s.heads * b.tokens**2
        return 3 * q * size + squares * 4 + (squares * size if size < 4 else 0) + normed
    masked = b.padded or b.joined
    keys = q if masked and a.attention == "sdpa" else kv  # with a mask sdpa repeats grouped keys and values
    # sdpa turns a padding mask into an additive one in every layer; a joined sequence's is additive and shared
    mask = b.rows * b.tokens**2 * size if b.padded and not b.joined and a.attention == "sdpa" else 0
    return (2 * q + 2 * keys) * size + T * s.heads * 4 + mask + normed


def _adapter_bytes(a: Adapted) -> int:
    """Z of each input that low-rank paths read (shared by its readers), x where `summed.keeps_input`."""
    T, size, rank = a.batch.all_tokens, a.machine.itemsize, a.rank
    held: dict[tuple[str, str], int] = {}
    for x in a.layer():
        if not a.is_adapted(x):
            continue
        source = _INPUTS.get(x.role, x.name)
        if a.input_scale and not a.dropout and (source != "attention" or a.attention == "eager"):
            held[source, "x"] = T * x.n * size
        if a.dropout:  # every layer drops other elements: its own z, and which elements; and its own x, to scale
            held[x.name, "z"] = T * rank * size + T * x.n + (T * x.n * size if a.input_scale else 0)
        elif a.keeps_input(x):
            if source != "attention" or a.attention == "eager":  # else attention keeps it
                held[source, "x"] = T * x.n * size
        elif a.is_summed(x):
            held[source, "z without a graph"] = T * rank * size
        else:
            held[x.name if a.input_scale else source, "z"] = T * rank * size
    return sum(held.values())


def weight_bytes(a: Adapted, x: Linear) -> int:
    """The most that reading the weight W [m, n] takes: itself or a block of it in the compute dtype, and its scales."""
    if not (a.quantized and x.quantizable):
        return 0
    numbers, size, T = x.n * x.m, a.machine.itemsize, a.batch.all_tokens
    if a.goes_by_blocks(x):
        added_up = T * x.n * (4 + size) if size < 4 else 0  # g W in fp32, and one block's part of it
        return BLOCK_WEIGHTS * size + added_up + numbers // 16
    return numbers * size + numbers // 16


def product_bytes(a: Adapted, x: Linear) -> int:
    """The most that the weights of one linear's products take for the moment: W, C = diag(b) B diag(d), W + ΔW, M."""
    read, size = weight_bytes(a, x), a.machine.itemsize
    if not a.is_adapted(x):
        return read
    pair = x.m * a.rank
    # combining d, B and b, and taking their gradients from M, goes by blocks of rows in fp32 (`functional.row_blocks`)
    block = pair * 4 if a.machine.device_type != "cpu" else min(pair, BLOCK_ELEMENTS) * 4
    combining = 2 * block + (pair * size if block < pair * 4 else 0)
    if a.is_summed(x):
        building = x.n * x.m * size + combining
        adding = x.n * x.m * size + pair * size
        gradient = (x.n * x.m * size if a.keeps_input(x) else 0) + pair * size
        if (
            a.input_scale
        ):  # A diag(a); then z or M's blocks; then C, N, and z's gradient or A and its product with N in fp32
            side, z = a.rank * x.n, a.batch.all_tokens * a.rank * size
            gradient += side * size + max(z, block, (pair + side) * size + max(z, side * 8))
        else:
            gradient += block
        return max(read, building, adding, gradient)
    gradient = pair * size + block + (block if size < 4 else 0)
    if few_tokens(a.batch.all_tokens, torch.empty(x.m, a.rank, device="meta"), a.b_groups):
        combining = a.batch.all_tokens * (x.m * min(a.b_groups, 2) + a.rank) * size
    return max(read, gradient, combining)


def transient_bytes(a: Adapted) -> int:
    """The most that exists beside what is kept while backward goes through one layer: gradients and weights."""
    s, T, size = a.shape, a.batch.all_tokens, a.machine.itemsize
    stream, wide = T * s.hidden * size, T * s.ff * size
    heads, kv = T * s.heads * s.head_dim * size, T * s.kv_heads * s.head_dim * size
    flowing = {
        "down_proj": stream + wide,
        "gate_proj": 2 * stream + 2 * wide,
        "up_proj": 2 * stream + 2 * wide,
        "o_proj": 2 * stream + heads,
        "q_proj": 2 * stream + heads + 2 * kv,
        "k_proj": 2 * stream + heads + 2 * kv,
        "v_proj": 2 * stream + heads + 2 * kv,
    }
    # what the MLP kept is gone once its elementwise part is through; down_proj comes before that
    moments = [
        product_bytes(a, x) + flowing.get(x.role, 2 * stream) - (0 if x.role == "down_proj" else 2 * wide)
        for x in a.layer()
    ]
    moments.append(stream + 3 * wide)
    if a.attention == "eager":
        squares = a.batch.rows * s.heads * a.batch.tokens**2 * 4
        moments.append(2 * stream + 2 * heads + 2 * squares - 2 * wide)
    return max(moments)
