"""The truncated singular value decomposition of a frozen weight, of which some adapters take their A and B.

    W [m, n] ≈ U Σ Vᵀ,  r singular values      A = Σ Vᵀ [r, n]      B = U [m, r]      (LoRA-XS, arXiv 2405.17604)

It is found by block Krylov iteration (Musco and Musco, arXiv 1504.05477, algorithm 2), from a sketch Q₁ [n, r + 10]
that is always the same:

    K = [Q₁, Q₂, …, Q_`BLOCKS`]      Q_{i+1} = Wᵀ (W Q_i), made orthonormal to those before it
    W K = U Σ Ṽᵀ                     V = K Ṽ

W is read once for each block and once at the end, some rows at a time, so no whole weight is dequantized.

The core that an adapter trains is tied to these very vectors, so they have to come out the same wherever the adapter is
opened. Hence three rules:

- W is what its stored numbers say, in fp32: a 4-bit weight is not rounded to the compute dtype, which differs from
  machine to machine.
- Products are summed in fp64. Neighbouring singular values of a language model differ by as little as 1 in 10,000, and
  rounding then mixes their vectors. In SmolLM2-135M at rank 64, sums in fp32 in another order moved a vector by up to
  3e-3 of its length; with sums in fp64, another fp32 rounding of the weight moved it by up to 4e-5.
- uᵢ and vᵢ have the sign that makes uᵢ·p positive for a fixed random p. A rule by the largest element, which
  scikit-learn has, changes the sign whenever rounding changes which of two elements is the larger one.

The same machine gives the same bits. Another one gives the same to rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qvera.adapters.projection import uniform_matrix
from qvera.models import quantization

BLOCKS = 8
"""Blocks of the Krylov space. With 8 the captured energy of SmolLM2-135M's weights is within 3e-6 of the best possible
for ranks 8 to 128; as many passes of plain subspace iteration leave up to 1e-2."""
OVERSAMPLING = 10
"""Columns of the sketch beyond the rank (Halko, Martinsson and Tropp, section 4.3)."""
_SEED, _SKETCH, _SIGNS = 0, 2, 3
"""The seed and the streams of the sketch and of p (`qvera.adapters.projection`); streams 0 and 1 are A and B."""
_CHUNK_ELEMENTS = 1 << 22
"""Elements in fp64 at a time: 32 MB."""


@dataclasses.dataclass(frozen=True)
class WeightRows:
    """A weight W [m, n] that is read some rows at a time, as often as one likes.

    Attributes:
        shape: (m, n).
        device: where the rows come.
        read: a fresh iterator over all rows, in blocks [k, n] of fp32 or fp64.
    """

    shape: tuple[int, int]
    device: torch.device
    read: Callable[[], Iterator[torch.Tensor]]

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """The rows in fp64, with their place; 32 MB at a time."""
        step, first = max(1, _CHUNK_ELEMENTS // self.shape[1]), 0
        for rows in self.read():
            for part in rows.split(step):
                yield slice(first, first + len(part)), part.double()
                first += len(part)


def rows_of(layer: nn.Module, step: int | None = None) -> WeightRows:
    """The weight [out_features, in_features] of a linear layer or Conv1D, as its stored numbers say.

    ``step`` is how many rows come at a time; by default as many as take 16 MB in fp32.
    """
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    if isinstance(layer, Conv1D):
        return rows_of_tensor(weight.detach().t(), step)
    assert isinstance(layer, nn.Linear)
    if not isinstance(layer, (quantization.Linear4bit, quantization.Linear8bit)):
        return rows_of_tensor(weight.detach(), step)
    shape = (layer.out_features, layer.in_features)
    each = step or max(1, _CHUNK_ELEMENTS // layer.in_features)
    return WeightRows(shape, weight.device, lambda: _quantized_rows(layer, each))


def _quantized_rows(layer: nn.Linear, step: int) -> Iterator[torch.Tensor]:
    if isinstance(layer, quantization.Linear4bit) and quantization.ends_with_rows(layer):
        for _, rows in quantization.dequantized_rows(layer, torch.float32, step, exact=True):
            yield rows
    else:
        yield quantization.dequantized_weight(layer, torch.float32, exact=True)


def rows_of_tensor(weight: torch.Tensor, step: int | None = None) -> WeightRows:
    """The rows of a dense weight [m, n]; ``step`` as in `rows_of`."""
    m, n = weight.shape
    each = step or max(1, _CHUNK_ELEMENTS // n)
    return WeightRows((m, n), weight.device, lambda: iter(weight.split(each)))


class TruncatedSvd(NamedTuple):
    """W ≈ U diag(S) Vᵀ, fp64, on the device of W."""

    U: torch.Tensor  # [m, r], orthonormal columns
    S: torch.Tensor  # [r], from the largest down
    V: torch.Tensor  # [n, r], orthonormal columns

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """LoRA-XS's frozen A = Σ Vᵀ [r, n] and B = U [m, r], fp64."""
        return self.S.unsqueeze(1) * self.V.t(), self.U


def truncated_svd(weight: WeightRows, rank: int) -> TruncatedSvd:
    """The ``rank`` largest singular values of a weight and their vectors.

    Raises:
        ValueError: the rank is not between 1 and the smaller side of the weight.
    """
    m, n = weight.shape
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"a weight [{m}, {n}] has 1 to {min(m, n)} singular values, and {rank} were asked for")
    columns, side = min(rank + OVERSAMPLING, m, n), min(m, n)
    block = torch.from_numpy(uniform_matrix(columns, n, _SEED, _SKETCH)).to(weight.device).double().t()
    space = block.new_empty(n, 0)
    for _ in range(BLOCKS):
        image = torch.zeros(n, columns, dtype=torch.float64, device=weight.device)
        for _, rows in weight.blocks():
            image.addmm_(rows.t(), rows @ block)
        # Householder's, so the columns are orthonormal even where W has fewer dimensions than the space
        space = torch.linalg.qr(torch.cat([space, image], dim=1)).Q[:, :side]
        if space.shape[1] == side:
            break
        block = space[:, -columns:]
    product = torch.cat([rows @ space for _, rows in weight.blocks()])  # W K [m, ...]
    outer, inner = torch.linalg.qr(product)
    # a small square: accelerators have several algorithms for it, a CPU one
    left, S, right = (part.to(weight.device) for part in torch.linalg.svd(inner.cpu()))
    U, V = outer @ left[:, :rank], space @ right[:rank].t()
    signs = torch.from_numpy(uniform_matrix(1, m, _SEED, _SIGNS)).to(weight.device).double() @ U
    flip = torch.where(signs < 0, -1.0, 1.0).to(U.dtype)
    return TruncatedSvd(U * flip, S[:rank], V * flip)


def singular_values(weight: WeightRows) -> torch.Tensor:
    """All min(m, n) singular values of a weight, fp64 on the CPU, from the largest down.

    They are the roots of the eigenvalues of WᵀW or WWᵀ, whichever is smaller, in fp64. Those below 1e-8 of the largest
    are noise.
    """
    m, n = weight.shape
    side = min(m, n)
    gram = torch.zeros(side, side, dtype=torch.float64, device=weight.device)
    if n <= m:
        for _, rows in weight.blocks():
            gram.addmm_(rows.t(), rows)
    else:  # one weight in fp32 at a time, and its columns in fp64
        for columns in torch.cat(list(weight.read())).split(max(1, _CHUNK_ELEMENTS // m), dim=1):
            part = columns.double()
            gram.addmm_(part, part.t())
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(0).cpu()


def rank_of_share(values: torch.Tensor, share: float) -> int:
    """The smallest number of leading singular values whose sum is at least ``share`` of the sum of all.

    The rule of SARA (arXiv 2408.03290): the values themselves, not their squares.

    Args:
        values: all singular values, from the largest down.
        share: above 0, at most 1.

    Returns:
        1 to the number of values.
    """
    sums = values.double().cumsum(0)
    wanted = share * sums[-1]
    return min(int((sums < wanted).sum().item()) + 1, len(values))
