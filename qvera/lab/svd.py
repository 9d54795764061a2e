"""Singular values and vectors of a weight.

The largest are found by block Krylov iteration (Musco and Musco, arXiv 1504.05477, algorithm 2), from a sketch Q [n, b]
that is always the same:

    K = [K₁, K₂, …]      K₁ = Wᵀ (W Q)      K_{i+1} = Wᵀ (W K_i), made orthonormal to those before it
    W K = U Σ Ṽᵀ         V = K Ṽ

W [m, n] is read some rows at a time: once for each block and once at the end.

A trained core belongs to its very vectors, so they must come out the same wherever the adapter is opened:

- W is what its stored numbers say, in fp32. A 4-bit weight is not rounded to the compute dtype, which differs from
  machine to machine.
- Products are summed in fp64. Neighbouring singular values of a language model may differ by 1 in 10,000, and rounding
  mixes their vectors. In SmolLM2-135M at rank 64, fp32 sums in another order moved a vector by up to 3e-3 of its
  length. With fp64 sums, another fp32 rounding of the weight moved it by up to 4e-5.
- The signs of uᵢ and vᵢ make uᵢ·p positive for a fixed random p. A rule by the largest element (scikit-learn's) flips
  when rounding changes which of two elements is larger.

The same machine gives the same bits, another one the same up to rounding.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qvera.adapters.projection import uniform_matrix
from qvera.models import quantization

BLOCKS = 8
"""Blocks of the Krylov space. With 8, `truncated_svd` captures SmolLM2-135M's weights within 3e-6 of the best energy
for ranks 8 to 128."""
OVERSAMPLING = 10
"""Columns of the sketch beyond the rank (Halko, Martinsson and Tropp, section 4.3)."""
SMALL_SIDE = 128
"""`leading_singular_vectors` decomposes a weight fully if a side is at most this long: that is quicker."""
_CHECKS = (4, 8, 16, 28, 40)
"""The numbers of blocks after which convergence is checked; a check costs half as much as these blocks."""
_SEED, _SKETCH, _SIGNS = 0, 2, 3
"""Seed and streams (`uniform_matrix`) of the sketch and of p; streams 0 and 1 are A and B."""
_CHUNK_ELEMENTS = 1 << 22
"""Elements in fp64 at a time: 32 MB."""


@dataclasses.dataclass(frozen=True)
class WeightRows:
    """A weight W [m, n] on ``device``. ``read`` starts an iterator over its rows: blocks [k, n] of fp32 or fp64."""

    shape: tuple[int, int]
    device: torch.device
    read: Callable[[], Iterator[Tensor]]

    def blocks(self, dtype: torch.dtype = torch.float64) -> Iterator[Tensor]:
        """Yield the rows, at most 32 MB in fp64 at a time."""
        for rows in self.read():
            for part in rows.split(max(1, _CHUNK_ELEMENTS // self.shape[1])):
                yield part.to(dtype)


def rows_of(layer: nn.Module, step: int | None = None) -> WeightRows:
    """Read the weight [out_features, in_features] of a linear or Conv1D by rows, as its stored numbers say."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if not isinstance(layer, (quantization.Linear4bit, quantization.Linear8bit)):
        return rows_of_tensor(weight.detach().t() if isinstance(layer, Conv1D) else weight.detach(), step)
    each = step or max(1, _CHUNK_ELEMENTS // layer.in_features)

    def read() -> Iterator[Tensor]:
        if isinstance(layer, quantization.Linear4bit) and quantization.ends_with_rows(layer):
            for _, rows in quantization.dequantized_rows(layer, torch.float32, each, exact=True):
                yield rows
        else:
            yield quantization.dequantized_weight(layer, torch.float32, exact=True)

    return WeightRows((layer.out_features, layer.in_features), weight.device, read)


def rows_of_tensor(weight: Tensor, step: int | None = None) -> WeightRows:
    """Read a dense weight [m, n] by rows, ``step`` at a time."""
    m, n = weight.shape
    each = step or max(1, _CHUNK_ELEMENTS // n)
    return WeightRows((m, n), weight.device, lambda: iter(weight.split(each)))


class TruncatedSvd(NamedTuple):
    """Singular values and vectors of a weight: W V = U diag(S)."""

    U: Tensor  # [m, r], orthonormal columns
    S: Tensor  # [r], from the largest down
    V: Tensor  # [n, r], orthonormal columns

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return LoRA-XS's frozen A = Σ Vᵀ [r, n] and B = U [m, r]."""
        return self.S.unsqueeze(1) * self.V.t(), self.U


def truncated_svd(weight: WeightRows, rank: int) -> TruncatedSvd:
    """Find the ``rank`` largest singular values of a weight and their vectors, fp64. ValueError if it has fewer."""
    m, n = weight.shape
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"a weight [{m}, {n}] has 1 to {min(m, n)} singular values, and {rank} were asked for")
    spaces = itertools.islice(_krylov_spaces(weight, rank, torch.float64), BLOCKS)
    space = collections.deque(spaces, maxlen=1).pop()
    return _with_fixed_signs(_svd_on(weight, space, rank))


def leading_singular_vectors(weight: Tensor, count: int, at_least: int | None = None) -> TruncatedSvd:
    """Find the ``count`` leading singular vectors of a weight [m, n], in its dtype, each of them converged.

    Converged: ‖Wᵀu − σv‖ is at the level of rounding. Where 40 blocks are not enough, the whole weight is decomposed;
    with ``at_least`` fewer vectors may come back instead, but not fewer than that. Beside the weight, memory holds at
    most 40 (count + 10) vectors on either side, twice while they are made orthonormal. Has run on CPUs only.
    """
    if weight.shape[0] < weight.shape[1]:  # the Krylov space is of the smaller side
        V, S, U = leading_singular_vectors(weight.t(), count, at_least)
        return _with_fixed_signs(TruncatedSvd(U, S, V))
    n, rows = weight.shape[1], rows_of_tensor(weight)
    last = 0 if n <= SMALL_SIDE else min(n // (2 * (count + OVERSAMPLING)), _CHECKS[-1])
    for number, space in enumerate(itertools.islice(_krylov_spaces(rows, count, weight.dtype), last), start=1):
        if number == last or number in _CHECKS:
            found = _svd_on(rows, space, count)
            remainders = (weight.t() @ found.U - found.V * found.S).norm(dim=0)
            good = remainders <= 50 * torch.finfo(weight.dtype).eps * found.S[0]
            # Only vectors before the first that has not converged count.
            converged = int(good.cumprod(dim=0).sum())
            if converged == count or (number == last and converged >= (count if at_least is None else at_least)):
                return _with_fixed_signs(TruncatedSvd(*(part[..., :converged] for part in found)))
    return TruncatedSvd(*(part[..., :count] for part in singular_vectors(weight)))


def singular_vectors(weight: Tensor) -> TruncatedSvd:
    """Find all min(m, n) singular vectors of a weight [m, n], in its dtype."""
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    return _with_fixed_signs(TruncatedSvd(U, S, Vh.t()))


def _krylov_spaces(weight: WeightRows, rank: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield orthonormal K [n, …] with one block, then with two, and so on up to min(m, n) columns."""
    m, n = weight.shape
    columns, side = min(rank + OVERSAMPLING, m, n), min(m, n)
    block = torch.from_numpy(uniform_matrix(columns, n, _SEED, _SKETCH)).to(weight.device).to(dtype).t()
    space = block.new_empty(n, 0)
    while space.shape[1] < side:
        image = torch.zeros(n, columns, dtype=dtype, device=weight.device)
        for rows in weight.blocks(dtype):
            image.addmm_(rows.t(), rows @ block)
        # Householder's, so the columns are orthonormal even where W has fewer dimensions than the space
        space = torch.linalg.qr(torch.cat([space, image], dim=1)).Q[:, :side]
        yield space
        block = space[:, -columns:]


def _svd_on(weight: WeightRows, space: Tensor, rank: int) -> TruncatedSvd:
    product = torch.cat([rows @ space for rows in weight.blocks(space.dtype)])  # W K [m, ...]
    outer, inner = torch.linalg.qr(product)
    # a small square: accelerators have several algorithms for it, a CPU one
    left, S, right = (part.to(outer) for part in torch.linalg.svd(inner.cpu().double()))
    return TruncatedSvd(outer @ left[:, :rank], S[:rank], space @ right[:rank].t())


def _with_fixed_signs(found: TruncatedSvd) -> TruncatedSvd:
    signs = torch.from_numpy(uniform_matrix(1, len(found.U), _SEED, _SIGNS)).to(found.U) @ found.U
    flip = torch.where(signs < 0, -1.0, 1.0).to(found.U.dtype)
    return TruncatedSvd(found.U * flip, found.S, found.V * flip)


def singular_values(weight: WeightRows) -> Tensor:
    """Find all min(m, n) singular values of a weight, fp64 on the CPU, falling; noise below 1e-8 of the largest."""
    m, n = weight.shape
    side = min(m, n)
    # By the eigenvalues of WᵀW or W Wᵀ, whichever is smaller.
    gram = torch.zeros(side, side, dtype=torch.float64, device=weight.device)
    if n <= m:
        for rows in weight.blocks():
            gram.addmm_(rows.t(), rows)
    else:  # one weight in fp32 at a time, and its columns in fp64
        for columns in torch.cat(list(weight.read())).split(max(1, _CHUNK_ELEMENTS // m), dim=1):
            part = columns.double()
            gram.addmm_(part, part.t())
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(0).cpu()


def rank_of_share(values: Tensor, share: float) -> int:
    """Count the leading singular ``values`` (falling) that make up ``share`` of their sum (SARA, arXiv 2408.03290)."""
    sums = values.double().cumsum(0)
    wanted = share * sums[-1]
    return min(int((sums < wanted).sum().item()) + 1, len(values))
