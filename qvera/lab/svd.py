"""Singular values and vectors of a weight: the largest ones, all of them, and how many make up a share of their sum.

The largest are found by block Krylov iteration (Musco and Musco, arXiv 1504.05477, algorithm 2), from a sketch Q [n, b]
that is always the same:

    K = [K₁, K₂, …]      K₁ = Wᵀ (W Q)      K_{i+1} = Wᵀ (W K_i), made orthonormal to those before it
    W K = U Σ Ṽᵀ         V = K Ṽ

W [m, n] is read once for each block and once at the end, some rows at a time. There are two users:

- `truncated_svd` takes a fixed number of blocks. Its factors are the frozen A = Σ Vᵀ and B = U of some adapters
  (LoRA-XS, arXiv 2405.17604).
- `leading_singular_vectors` takes blocks until each vector has converged, as `qvera analyze` needs them.

The core that an adapter trains is tied to its very vectors, so they have to come out the same wherever the adapter is
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

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qvera.models import quantization
from qvera.utils.uniform import uniform_matrix

BLOCKS = 8
"""Blocks of the Krylov space of `truncated_svd`. With 8 the captured energy of SmolLM2-135M's weights is within 3e-6 of
the best possible for ranks 8 to 128; as many passes of plain subspace iteration leave up to 1e-2."""
OVERSAMPLING = 10
"""Columns of the sketch beyond the rank (Halko, Martinsson and Tropp, section 4.3)."""
SMALL_SIDE = 128
"""`leading_singular_vectors` decomposes a weight with a side of at most this many fully: that is quicker there."""
_CHECKS = (4, 8, 16, 28, 40)
"""After how many blocks it looks at what has converged: each look costs as much as half of these blocks."""
_SEED, _SKETCH, _SIGNS = 0, 2, 3
"""The seed and the streams of the sketch and of p (`qvera.utils.uniform`); streams 0 and 1 are A and B."""
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

    def blocks(self, dtype: torch.dtype = torch.float64) -> Iterator[tuple[slice, torch.Tensor]]:
        """The rows, with their place; 32 MB in fp64 at a time."""
        step, first = max(1, _CHUNK_ELEMENTS // self.shape[1]), 0
        for rows in self.read():
            for part in rows.split(step):
                yield slice(first, first + len(part)), part.to(dtype)
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
    """W V = U diag(S), on the device of W."""

    U: torch.Tensor  # [m, r], orthonormal columns
    S: torch.Tensor  # [r], from the largest down
    V: torch.Tensor  # [n, r], orthonormal columns

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """LoRA-XS's frozen A = Σ Vᵀ [r, n] and B = U [m, r]."""
        return self.S.unsqueeze(1) * self.V.t(), self.U


def truncated_svd(weight: WeightRows, rank: int) -> TruncatedSvd:
    """The ``rank`` largest singular values of a weight and their vectors, fp64.

    Raises:
        ValueError: the rank is not between 1 and the smaller side of the weight.
    """
    m, n = weight.shape
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"a weight [{m}, {n}] has 1 to {min(m, n)} singular values, and {rank} were asked for")
    spaces = itertools.islice(_krylov_spaces(weight, rank, torch.float64), BLOCKS)
    space = collections.deque(spaces, maxlen=1).pop()
    return _with_fixed_signs(_svd_on(weight, space, rank))


def leading_singular_vectors(weight: torch.Tensor, count: int, at_least: int | None = None) -> TruncatedSvd:
    """The ``count`` leading singular vectors of a weight [m, n], in its dtype, each of them converged.

    Converged is one with ‖Wᵀu − σv‖ at the level of rounding. Memory beside the weight: at most 40 (count + 10) vectors
    on either side, twice while they are made orthonormal. Has run on CPUs only.

    Args:
        weight: W.
        count: how many.
        at_least: where the last ones take more than 40 blocks, fewer come back, but not fewer than this. Default: then
            the whole weight is decomposed.
    """
    needed = count if at_least is None else at_least
    if weight.shape[0] < weight.shape[1]:  # the Krylov space is of the smaller side
        U, S, V = _converged(weight.t(), count, needed)
        return _with_fixed_signs(TruncatedSvd(V, S, U))
    return _with_fixed_signs(_converged(weight, count, needed))


def singular_vectors(weight: torch.Tensor) -> TruncatedSvd:
    """All min(m, n) singular vectors of a weight [m, n], in its dtype."""
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    return _with_fixed_signs(TruncatedSvd(U, S, Vh.t()))


def _krylov_spaces(weight: WeightRows, rank: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Orthonormal K [n, …] with one block, with two, and so on until it has min(m, n) columns."""
    m, n = weight.shape
    columns, side = min(rank + OVERSAMPLING, m, n), min(m, n)
    block = torch.from_numpy(uniform_matrix(columns, n, _SEED, _SKETCH)).to(weight.device).to(dtype).t()
    space = block.new_empty(n, 0)
    while space.shape[1] < side:
        image = torch.zeros(n, columns, dtype=dtype, device=weight.device)
        for _, rows in weight.blocks(dtype):
            image.addmm_(rows.t(), rows @ block)
        # Householder's, so the columns are orthonormal even where W has fewer dimensions than the space
        space = torch.linalg.qr(torch.cat([space, image], dim=1)).Q[:, :side]
        yield space
        block = space[:, -columns:]


def _svd_on(weight: WeightRows, space: torch.Tensor, rank: int) -> TruncatedSvd:
    """The ``rank`` largest singular values of W K and their vectors, with any signs."""
    product = torch.cat([rows @ space for _, rows in weight.blocks(space.dtype)])  # W K [m, ...]
    outer, inner = torch.linalg.qr(product)
    # a small square: accelerators have several algorithms for it, a CPU one
    left, S, right = (part.to(outer) for part in torch.linalg.svd(inner.cpu().double()))
    return TruncatedSvd(outer @ left[:, :rank], S[:rank], space @ right[:rank].t())


def _converged(weight: torch.Tensor, count: int, needed: int) -> TruncatedSvd:
    """`leading_singular_vectors` for m >= n, with any signs."""
    n, rows = weight.shape[1], rows_of_tensor(weight)
    last = 0 if n <= SMALL_SIDE else min(n // (2 * (count + OVERSAMPLING)), _CHECKS[-1])
    for number, space in enumerate(itertools.islice(_krylov_spaces(rows, count, weight.dtype), last), start=1):
        if number == last or number in _CHECKS:
            found = _svd_on(rows, space, count)
            remainders = (weight.t() @ found.U - found.V * found.S).norm(dim=0)
            good = remainders <= 50 * torch.finfo(weight.dtype).eps * found.S[0]
            converged = int(good.cumprod(dim=0).sum())
            if converged == count or (number == last and converged >= needed):
                return TruncatedSvd(*(part[..., :converged] for part in found))
    return TruncatedSvd(*(part[..., :count] for part in singular_vectors(weight)))


def _with_fixed_signs(found: TruncatedSvd) -> TruncatedSvd:
    signs = torch.from_numpy(uniform_matrix(1, len(found.U), _SEED, _SIGNS)).to(found.U) @ found.U
    flip = torch.where(signs < 0, -1.0, 1.0).to(found.U.dtype)
    return TruncatedSvd(found.U * flip, found.S, found.V * flip)


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
