"""What training did to each weight: intruder dimensions, and the size and effective rank of ΔW.

One of the first k left singular vectors of W + ΔW is an intruder dimension if its cosine with every left singular
vector of W is below ε, signs aside (LoRA vs Full Fine-tuning, arXiv 2410.21228).

Works on the CPU with one linear in memory at a time, in fp32, or fp64 where intruders are to be reduced.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from qvera.config.schema import ModelSection
from qvera.exporting.base import open_adapter_on_base, read_trained_weight
from qvera.exporting.deltas import AdapterDeltas, Delta
from qvera.lab.svd import TruncatedSvd, leading_singular_vectors, singular_vectors
from qvera.models.safetensors_stream import rows_per_block
from qvera.utils.errors import InputError, RunFailed

Factors = tuple[torch.Tensor, torch.Tensor]
"""A [r, n] and B [m, r] of a change B A."""
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


@dataclasses.dataclass(frozen=True)
class LinearAnalysis:
    """One adapted linear.

    Attributes:
        role: see `roles_of`.
        layer: the number in the name, or None.
        shape: (out_features, in_features).
        rank: of the factors of ΔW; 0 for a sparse ΔW, which has none.
        weight_norm, delta_norm: ‖W‖ and ‖ΔW‖, Frobenius.
        singular_values: the first k of W + ΔW.
        cosines: of each left vector [k], the largest with any left singular vector of W; ``exact``: see `Cosines`.
        intruders: indices among the k.
    """

    name: str
    role: str
    layer: int | None
    shape: tuple[int, int]
    rank: int
    weight_norm: float
    delta_norm: float
    effective_rank: float
    singular_values: list[float]
    cosines: list[float]
    exact: list[bool]
    intruders: list[int]

    @property
    def relative_norm(self) -> float:
        """‖ΔW‖ / ‖W‖; 0 for a weight of zeros."""
        return self.delta_norm / self.weight_norm if self.weight_norm else 0.0


@dataclasses.dataclass(frozen=True)
class Analysis:
    """All adapted ``linears`` in model order; with ``keep``, ``mitigations`` has the factors of each."""

    adapter: AdapterDeltas
    linears: list[LinearAnalysis]
    mitigations: dict[str, Factors]

    @property
    def rank(self) -> int:
        return max(linear.rank for linear in self.linears)

    def mitigated(self) -> MitigatedFactors:
        """The adapter with reduced intruders, for `qvera.exporting.lora.export_lora`."""
        ranks = {linear.name: linear.rank + len(linear.intruders) for linear in self.linears}
        return MitigatedFactors(self.adapter, self.mitigations, max(ranks.values()))


class MitigatedFactors(Mapping[str, Factors]):
    """Name → A' [rank, n] and B' [m, rank] of the mitigated ΔW, exact; zeros fill up to the largest rank needed."""

    def __init__(self, adapter: AdapterDeltas, mitigations: Mapping[str, Factors], rank: int) -> None:
        self._adapter, self._mitigations, self.rank = adapter, mitigations, rank

    def __getitem__(self, name: str) -> Factors:
        (A, B), (more_A, more_B) = self._adapter.layers[name].lora(), self._mitigations[name]
        zeros = self.rank - len(A) - len(more_A)
        return (
            torch.cat([A, more_A, A.new_zeros(zeros, A.shape[1])]),
            torch.cat([B, more_B, B.new_zeros(len(B), zeros)], dim=1),
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._mitigations)

    def __len__(self) -> int:
        return len(self._mitigations)


def analyze_adapter(
    adapter_dir: Path,
    section: ModelSection,
    *,
    top_k: int,
    epsilon: float,
    keep: float | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Analysis:
    """Analyze every linear that an adapter changes.

    Args:
        section: the base that the adapter was trained on.
        top_k: singular vectors of each W + ΔW to look at.
        epsilon: an intruder's cosines are below it.
        keep: λ, the share of an intruder that mitigation keeps. None: no mitigation is computed.
        progress: called with (linears done, linears in all, name of the next one).

    Raises:
        InputError: adapter, base and ``keep`` do not fit, or the base is quantized but not in bitsandbytes' 4 bits.
        RunFailed: a weight has NaN or Inf in it, or a file changed while it was read.
    """
    base = open_adapter_on_base(adapter_dir, section)
    if base.adapter.magnitude:
        raise InputError(
            f"{adapter_dir}: was trained with adapter.magnitude, which scales rows of W + ΔW. qvera analyze reads "
            "adapters that only add a ΔW."
        )
    if keep is not None and not base.adapter.is_low_rank:
        raise InputError(
            f"--reduce: {adapter_dir} is of adapter.method {base.adapter.method}, whose change is of no low rank, so "
            "no LoRA is that change with smaller intruders. Leave out --reduce, or analyze another adapter."
        )
    reader, layers = base.reader(section, {}), base.adapter.layers
    entries = {entry.name: entry for entry in base.entries}
    names = [name for name, _ in base.model.named_modules() if name in layers]
    linears, mitigations, roles = [], {}, roles_of(names)
    for done, name in enumerate(names):
        if progress is not None:
            progress(done, len(names), name)
        weight = read_trained_weight(reader, entries[f"{name}.weight"])
        factors = layers[name].lora() if base.adapter.is_low_rank else None
        linear, mitigation = _analyze(name, roles[name], weight, layers[name], factors, top_k, epsilon, keep)
        linears.append(linear)
        if mitigation is not None:
            mitigations[name] = mitigation
    return Analysis(base.adapter, linears, mitigations)


def roles_of(names: Iterable[str]) -> dict[str, str]:
    """Name of a linear → its shortest end that no other kind has: ``q_proj``, ``attention.output.dense`` (RoBERTa)."""
    kinds = {name: tuple(_LAYER.sub(".*.", name, count=1).strip(".").split(".")) for name in names}
    sharing: Counter[tuple[str, ...]] = Counter()
    for kind in set(kinds.values()):
        sharing.update(kind[start:] for start in range(len(kind)))

    def role(kind: tuple[str, ...]) -> str:
        ends = [kind[start:] for start in reversed(range(len(kind)))]
        own = next((end for end in ends if sharing[end] == 1), kind)
        return ".".join(own).removeprefix("*.")

    return {name: role(kind) for name, kind in kinds.items()}


@torch.no_grad()
def _analyze(
    name: str,
    role: str,
    weight: torch.Tensor,
    delta: Delta,
    factors: Factors | None,
    top_k: int,
    epsilon: float,
    keep: float | None,
) -> tuple[LinearAnalysis, Factors | None]:
    """``weight`` is as in the checkpoint: [in, out] for a Conv1D. ``factors`` are those of ΔW."""
    if keep is not None:  # fp32's singular vectors are 1e-5 off where values are near to each other
        weight = weight.double()
    tuned, step = weight.clone(), rows_per_block(weight.shape[1])
    for first in range(0, len(tuned), step):
        part = tuned[first : first + step]
        part += delta.rows(first, len(part))
    if not torch.isfinite(tuned).all():
        raise RunFailed(f"{name}: W + ΔW has NaN or Inf in it, so it has no singular vectors. Look at this adapter.")
    values = torch.linalg.svdvals(delta.rows()) if factors is None else delta_singular_values(*factors)
    if delta.transposed:
        weight, tuned = weight.t(), tuned.t()
    found = find_intruders(weight, tuned, top_k, epsilon)
    layer = _LAYER.search(name)
    linear = LinearAnalysis(
        name=name,
        role=role,
        layer=int(layer[1]) if layer else None,
        shape=delta.shape,
        rank=0 if factors is None else len(factors[0]),
        weight_norm=weight.norm().item(),
        delta_norm=values.norm().item(),
        effective_rank=effective_rank(values),
        singular_values=found.top.S.tolist(),
        cosines=found.cosines.values.tolist(),
        exact=found.cosines.exact.tolist(),
        intruders=found.found.nonzero().flatten().tolist(),
    )
    return linear, None if keep is None else mitigation_factors(found, keep)


DENSE_SIDE = 1024
"""If a side of a weight is at most this long, it is decomposed fully, and all of its cosines are exact."""


class Cosines(NamedTuple):
    """For each vector its largest cosine with a left singular vector of the base weight, fp64 [k].

    Not ``exact``: a bound on the same side of ε, an upper one for an intruder, else a lower one.
    """

    values: torch.Tensor
    exact: torch.Tensor


class Intruders(NamedTuple):
    """The ``top`` k singular vectors of W + ΔW, cosines of the left ones, and a mask [k] of the intruders."""

    top: TruncatedSvd
    cosines: Cosines
    found: torch.Tensor


def find_intruders(weight: torch.Tensor, tuned: torch.Tensor, top_k: int, epsilon: float) -> Intruders:
    """The intruders among the first ``top_k`` singular vectors of ``tuned`` = W + ΔW [m, n]."""
    top = leading_singular_vectors(tuned, min(top_k, *tuned.shape))
    cosines = largest_cosines(weight, top.U, epsilon)
    return Intruders(top, cosines, cosines.values < epsilon)


def largest_cosines(weight: torch.Tensor, vectors: torch.Tensor, epsilon: float) -> Cosines:
    """The largest |cosine| of each of ``vectors`` [m, k], of length 1, with any left singular vector of W [m, n].

    For a large weight, only enough is computed to know on which side of ``epsilon`` each is:

    1. The cosines with the leading vectors of W; what these leave of a vector bounds its other cosines.
    2. `largest_share_bounds` of what they leave: a vector that is spread over many others is close to none.
    3. All singular vectors of W, if one is still undecided.
    """
    m, n = weight.shape
    if min(m, n) <= DENSE_SIDE:
        return _exact_cosines(weight, vectors)
    leading = leading_singular_vectors(weight, 2 * vectors.shape[1], at_least=0).U
    shares = leading.t() @ vectors
    rest = vectors - leading @ shares
    none = shares.new_zeros(1, shares.shape[1])
    found, left = torch.cat([none, shares.abs()]).amax(dim=0).double(), rest.norm(dim=0).double()
    unclear = (found < epsilon) & (left >= epsilon)
    if unclear.any():
        inner, unknown = weight, rest[:, unclear]
        if m > n:  # a part of a vector outside the span of W belongs to no singular vector
            basis, inner = torch.linalg.qr(weight)
            unknown = basis.t() @ unknown
            del basis
        for steps in (32, 96):
            left[unclear] = torch.minimum(left[unclear], largest_share_bounds(inner, unknown, steps).sqrt())
            if (left[unclear] < epsilon).all():
                break
        else:
            return _exact_cosines(weight, vectors)
    return Cosines(torch.where(found < epsilon, torch.maximum(found, left), found), left <= found)


def _exact_cosines(weight: torch.Tensor, vectors: torch.Tensor) -> Cosines:
    values = (singular_vectors(weight).U.t() @ vectors).abs().amax(dim=0).double()
    return Cosines(values, torch.ones_like(values, dtype=torch.bool))


def largest_share_bounds(weight: torch.Tensor, vectors: torch.Tensor, steps: int) -> torch.Tensor:
    """For each vector x [m], an upper bound on the largest (u_iᵀ x)² over all left singular vectors u_i of W [m, n].

    The Lanczos process on W Wᵀ from x, ``steps`` long, gives nodes and weights of the Gauss quadrature of x's spectral
    measure Σ (u_iᵀ x)² δ(σ_i²). By the inequalities of Chebyshev, Markov and Stieltjes no point has more of the measure
    than two neighbouring weights together (Golub and Meurant, "Matrices, Moments and Quadrature with Applications",
    2010, chapters 4 and 6). m <= n, else a part of x outside the span of W would count as one more vector.
    """
    norms = vectors.norm(dim=0)
    alone = torch.finfo(weight.dtype).eps * weight.norm() ** 2  # a shorter remainder is rounding
    space = vectors.new_zeros(steps, *vectors.shape)
    space[0] = vectors / norms.clamp_min(torch.finfo(norms.dtype).tiny)
    diagonal, beside = [], []
    for step in range(steps):
        product = weight @ (weight.t() @ space[step])
        diagonal.append((space[step].double() * product.double()).sum(dim=0))
        if step == steps - 1:
            break
        known = space[: step + 1]
        for _ in range(2):
            product = product - torch.einsum("smj,sj->mj", known, torch.einsum("smj,mj->sj", known, product))
        length = product.norm(dim=0)
        goes_on = length > alone  # else the space holds all of x's measure
        space[step + 1] = torch.where(goes_on, product / length.clamp_min(alone), 0)
        beside.append(torch.where(goes_on, length, 0).double())
    matrix = torch.diag_embed(torch.stack(diagonal, dim=1))
    off = torch.stack(beside, dim=1) if beside else matrix.new_zeros(len(matrix), 0)
    matrix += torch.diag_embed(off, offset=1) + torch.diag_embed(off, offset=-1)
    weights = torch.linalg.eigh(matrix).eigenvectors[:, 0] ** 2  # [j, steps], nodes rising
    pairs = weights[:, 1:] + weights[:, :-1] if steps > 1 else weights
    return pairs.max(dim=1).values * norms.double() ** 2


def mitigation_factors(intruders: Intruders, keep: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A [k, n] and B [m, k] that take k intruders down to λ = ``keep``: B A = (λ − 1) Σ_i σ_i u_i v_iᵀ (section 5)."""
    U, S, V = (part[..., intruders.found] for part in intruders.top)
    return V.t().contiguous(), (keep - 1) * S * U


def delta_singular_values(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Those of ΔW = B A: [min(m, n, r)], falling, fp64, from the factors' small cores."""
    left, right = (torch.linalg.qr(factor.double(), mode="r").R for factor in (B, A.t()))
    return torch.linalg.svdvals(left @ right.t())


def effective_rank(singular_values: torch.Tensor) -> float:
    """exp of the entropy of the singular values' shares of their sum (Roy and Vetterli, 2007); 0 for a zero matrix."""
    total = singular_values.sum()
    if not total > 0:
        return 0.0
    shares = (singular_values / total).double()
    return torch.special.entr(shares).sum().exp().item()
