"""Measures what training did to each weight, and draws a page: intruder dimensions, size and effective rank of ΔW.

One of the first k left singular vectors of W + ΔW is an intruder dimension if its cosine with every left singular
vector of W is below ε, signs aside (LoRA vs Full Fine-tuning, arXiv 2410.21228).

Works on the CPU with one linear in memory at a time, in fp32, or fp64 where intruders are to be reduced.
"""

import dataclasses
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qvera.config.sections import ModelSection
from qvera.evaluation.report.charts import Chart, Scale, tooltips_json
from qvera.evaluation.report.pages import render
from qvera.exporting.base import open_adapter_on_base, read_trained_weight
from qvera.exporting.deltas import AdapterDeltas, Delta
from qvera.lab.svd import TruncatedSvd, leading_singular_vectors, singular_vectors
from qvera.models.safetensors_stream import rows_per_block
from qvera.utils.errors import InputError, RunFailed
from qvera.utils.formatting import count, percent, significant

Factors = tuple[Tensor, Tensor]
"""A [r, n] and B [m, r] of a change B A."""
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


@dataclasses.dataclass(frozen=True)
class LinearAnalysis:
    """The measurements of one adapted linear.

    Attributes:
        role: see `roles_of`.
        layer: the number in the name, or None.
        shape: (out_features, in_features).
        rank: of the factors of ΔW; 0 for a sparse ΔW, which has none.
        weight_norm, delta_norm: ‖W‖ and ‖ΔW‖, Frobenius.
        singular_values: the first k of W + ΔW.
        cosines: of each left vector [k], the largest with any left singular vector of W; ``exact``: see `Intruders`.
        intruders: indices among the k.
        relative_norm: ‖ΔW‖ / ‖W‖; 0 for a weight of zeros.
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
    relative_norm: float


@dataclasses.dataclass(frozen=True)
class Analysis:
    """All adapted ``linears`` in model order. With ``keep``, ``mitigations`` has factors to add to each."""

    adapter: AdapterDeltas
    linears: list[LinearAnalysis]
    mitigations: dict[str, Factors]

    @property
    def reduced_rank(self) -> int:
        """The rank of the reduced adapter. Zeros fill up where a linear needs less."""
        return max(each.rank + len(each.intruders) for each in self.linears)

    def reduced(self) -> dict[str, Factors]:
        """The adapter with reduced intruders, exact: name → A' [rank, n] and B' [m, rank]."""
        found = {}
        for name, (more_A, more_B) in self.mitigations.items():
            A, B = self.adapter.layers[name].lora()
            zeros = self.reduced_rank - len(A) - len(more_A)
            A = torch.cat([A, more_A, A.new_zeros(zeros, A.shape[1])])
            found[name] = A, torch.cat([B, more_B, B.new_zeros(len(B), zeros)], dim=1)
        return found


def analyze_adapter(
    adapter_dir: Path,
    section: ModelSection,
    *,
    top_k: int,
    epsilon: float,
    keep: float | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Analysis:
    """Analyze every linear that an adapter changes, but no experts; ``section`` is the base that it was trained on.

    ``top_k`` singular vectors of each W + ΔW are looked at; an intruder's cosines are below ``epsilon``. ``keep`` is λ,
    the share of an intruder that mitigation keeps; None: no mitigation is computed. ``progress`` is called with
    (linears done, linears in all, name of the next one).

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
    layers = base.adapter.layers
    if any(delta.experts for delta in layers.values()):
        if keep is not None:
            raise InputError(
                f"--reduce: {adapter_dir} changes experts (adapter.experts), which qvera analyze does not read, so the "
                "LoRA would be without them. Leave out --reduce."
            )
        if all(delta.experts for delta in layers.values()):
            raise InputError(f"{adapter_dir}: changes experts only (adapter.experts); qvera analyze reads linears.")
    reader = base.reader(section, {})
    entries = {entry.name: entry for entry in base.entries}
    names = [name for name, _ in base.model.named_modules() if name in layers]
    found, roles = Analysis(base.adapter, [], {}), roles_of(names)
    for done, name in enumerate(names):
        if progress is not None:
            progress(done, len(names), name)
        weight = read_trained_weight(reader, entries[base.names[f"{name}.weight"]])
        factors = layers[name].lora() if base.adapter.is_low_rank else None
        linear, mitigation = _analyze(name, roles[name], weight, layers[name], factors, top_k, epsilon, keep)
        found.linears.append(linear)
        if mitigation is not None:
            found.mitigations[name] = mitigation
    return found


def roles_of(names: Iterable[str]) -> dict[str, str]:
    """Map each linear's name to its shortest end that no other kind has: ``q_proj``, ``attention.output.dense``."""
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
    weight: Tensor,
    delta: Delta,
    factors: Factors | None,
    top_k: int,
    epsilon: float,
    keep: float | None,
) -> tuple[LinearAnalysis, Factors | None]:
    """Measure a linear. ``weight`` is as in the checkpoint: [in, out] for a Conv1D. ``factors`` are those of ΔW."""
    if keep is not None:  # fp32's singular vectors are 1e-5 off where values are near to each other
        weight = weight.double()
    tuned, step = weight.clone(), rows_per_block(weight.shape[1])
    for first in range(0, len(tuned), step):
        part = tuned[first : first + step]
        part += delta.rows(first, len(part))
    if not torch.isfinite(tuned).all():
        raise RunFailed(f"{name}: W + ΔW has NaN or Inf in it, so it has no singular vectors. Look at this adapter.")
    # From the factors this is cheap; a sparse ΔW has none and is decomposed as a whole.
    values = torch.linalg.svdvals(delta.rows()) if factors is None else delta_singular_values(*factors)
    if delta.transposed:
        weight, tuned = weight.t(), tuned.t()
    found = find_intruders(weight, tuned, top_k, epsilon)
    layer, weight_norm, delta_norm = _LAYER.search(name), weight.norm().item(), values.norm().item()
    linear = LinearAnalysis(
        name=name,
        role=role,
        layer=int(layer[1]) if layer else None,
        shape=delta.shape,
        rank=0 if factors is None else len(factors[0]),
        weight_norm=weight_norm,
        delta_norm=delta_norm,
        effective_rank=effective_rank(values),
        singular_values=found.top.S.tolist(),
        cosines=found.cosines.tolist(),
        exact=found.exact.tolist(),
        intruders=found.found.nonzero().flatten().tolist(),
        relative_norm=delta_norm / weight_norm if weight_norm else 0.0,
    )
    return linear, None if keep is None else mitigation_factors(found, keep)


DENSE_SIDE = 1024
"""If a side of a weight is at most this long, it is decomposed fully, and all of its cosines are exact."""


class Intruders(NamedTuple):
    """The first k singular vectors of W + ΔW, the largest cosines of the left ones, and which are intruders, [k] each.

    Cosines are fp64. Not ``exact``: a bound on the same side of ε, an upper one for an intruder, else a lower one.
    """

    top: TruncatedSvd
    cosines: Tensor
    exact: Tensor
    found: Tensor


def find_intruders(weight: Tensor, tuned: Tensor, top_k: int, epsilon: float) -> Intruders:
    """Find the intruders among the first ``top_k`` singular vectors of ``tuned`` = W + ΔW [m, n]."""
    top = leading_singular_vectors(tuned, min(top_k, *tuned.shape))
    cosines, exact = largest_cosines(weight, top.U, epsilon)
    return Intruders(top, cosines, exact, cosines < epsilon)


def largest_cosines(weight: Tensor, vectors: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Find the largest |cosine| of each of ``vectors`` [m, k], of length 1, with any left singular vector of W [m, n].

    Returns ``cosines`` and ``exact`` of `Intruders`. For a large weight, only enough is computed to know on which side
    of ``epsilon`` each is:

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
    return torch.where(found < epsilon, torch.maximum(found, left), found), left <= found


def _exact_cosines(weight: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    values = (singular_vectors(weight).U.t() @ vectors).abs().amax(dim=0).double()
    return values, torch.ones_like(values, dtype=torch.bool)


def largest_share_bounds(weight: Tensor, vectors: Tensor, steps: int) -> Tensor:
    """Bound, for each vector x [m], the largest (u_iᵀ x)² over all left singular vectors u_i of W [m, n] from above.

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
        # Gram and Schmidt twice: once leaves rounding errors, with which the vectors lose their right angles.
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


def mitigation_factors(intruders: Intruders, keep: float) -> tuple[Tensor, Tensor]:
    """Return A [k, n] and B [m, k] that take k intruders down to λ = ``keep``.

    B A = (λ − 1) Σ_i σ_i u_i v_iᵀ (section 5).
    """
    U, S, V = (part[..., intruders.found] for part in intruders.top)
    return V.t().contiguous(), (keep - 1) * S * U


def delta_singular_values(A: Tensor, B: Tensor) -> Tensor:
    """Return the singular values of ΔW = B A: [min(m, n, r)], falling, fp64, from the factors' small cores."""
    left, right = (torch.linalg.qr(factor.double(), mode="r").R for factor in (B, A.t()))
    return torch.linalg.svdvals(left @ right.t())


def effective_rank(singular_values: Tensor) -> float:
    """Return exp of the entropy of the singular values' shares of their sum (Roy and Vetterli, 2007); 0 for zeros."""
    total = singular_values.sum()
    if not total > 0:
        return 0.0
    shares = (singular_values / total).double()
    return torch.special.entr(shares).sum().exp().item()


Document = dict[str, Any]
"""The results that ``qvera analyze --json`` prints."""
ROLE_TITLES = ["linears", "intruder dimensions", "‖ΔW‖ / ‖W‖", "effective rank of ΔW"]


def role_rows(document: Document) -> list[tuple[str, list[str]]]:
    """Return the cells of `ROLE_TITLES` for each kind of linear, then for all; norms and ranks are medians."""
    roles: dict[str, list[dict[str, Any]]] = {}
    for linear in document["linears"]:
        roles.setdefault(linear["role"], []).append(linear)
    return [
        (
            role,
            [
                count(len(linears)),
                count(sum(len(linear["intruders"]) for linear in linears)),
                significant(statistics.median(linear["relative_norm"] for linear in linears)),
                significant(statistics.median(linear["effective_rank"] for linear in linears)),
            ],
        )
        for role, linears in [*roles.items(), ("all", document["linears"])]
    ]


def loss_titles(document: Document) -> list[str]:
    """Return the column titles of `loss_rows`."""
    reduced = document["reduced"]
    return ["Rows", "Base", "Adapter", *([] if reduced is None else [f"Reduced to {reduced['keep']:g}"])]


def loss_rows(document: Document) -> list[tuple[str, list[str]]]:
    """Return for each text its rows, and the losses of base, adapter and reduced adapter (if there is one)."""
    rows = []
    for losses in document["losses"]:
        models = [losses[model] for model in ("base", "adapter", "reduced") if losses[model] is not None]
        rows.append((losses["text"], [count(losses["rows"]), *(f"{loss:.4f}" for loss in models)]))
    return rows


def summary(document: Document) -> str:
    """Say in a sentence how many intruder dimensions there are, and in how many linears."""
    found = [len(linear["intruders"]) for linear in document["linears"]]
    total, touched = sum(found), sum(number > 0 for number in found)
    dimensions = f"{total:,} intruder dimension{'' if total == 1 else 's'}"
    where = f"{touched:,} of {len(found):,}" if total else f"{len(found):,}"
    return f"{dimensions} in {where} linears (k = {document['top_k']}, ε = {document['epsilon']:g})"


def analysis_page(document: Document) -> str:
    """Make the page: HTML with heat maps over layers, tables, and every intruder dimension."""
    pictures: list[tuple[str, Callable[[dict[str, Any]], float], Callable[[float], str], str]] = [
        ("Intruder dimensions", lambda linear: len(linear["intruders"]), count, "among the first k singular vectors"),
        ("Size of ΔW", lambda linear: linear["relative_norm"], percent, "‖ΔW‖ / ‖W‖, Frobenius"),
        ("Effective rank of ΔW", lambda linear: linear["effective_rank"], significant, "exp of the entropy of σ / Σσ"),
    ]
    charts = []
    for title, value, text, note in pictures:
        rows: dict[str, dict[int, float]] = {}
        for linear in document["linears"]:
            if linear["layer"] is not None:
                rows.setdefault(linear["role"], {})[linear["layer"]] = value(linear)
        charts.append(heat_map(title, rows, note, text))
    intruders = []
    for linear in document["linears"]:
        for index in linear["intruders"]:
            cosine = ("" if linear["exact"][index] else "at most ") + significant(linear["cosines"][index])
            place = f"{index + 1} of {len(linear['cosines'])}"
            intruders.append((linear["name"], [place, significant(linear["singular_values"][index]), cosine]))
    return render(
        Path(__file__).with_name("analysis.html"),
        document=document,
        name=Path(document["subject"]["path"]).resolve().name,
        summary=summary(document),
        charts=charts,
        roles=role_rows(document),
        role_titles=[title[0].upper() + title[1:] for title in ROLE_TITLES],
        losses=loss_rows(document),
        loss_titles=loss_titles(document),
        intruders=intruders,
    )


SHADES = 9
"""The number of shades above that of 0: the classes h1 to h9 of style.css."""


def heat_map(
    title: str, rows: Mapping[str, Mapping[int, float]], note: str, text: Callable[[float], str]
) -> Chart | None:
    """Draw a heat map of row → column → value, 0 or more; None without values. The largest has the full colour."""
    columns = sorted({column for values in rows.values() for column in values})
    if not columns:
        return None
    largest = max(value for values in rows.values() for value in values.values())
    across, down = Scale(0.0, len(columns)), Scale(0.0, len(rows))
    bars, texts = [], [[f"layer {column}"] for column in columns]
    for number, (name, values) in enumerate(rows.items()):
        for place, column in enumerate(columns):
            if column in values:
                shade = math.ceil(SHADES * values[column] / largest) if largest > 0 else 0
                cell = across.percent(place), across.percent(1), down.percent(number), down.percent(1)
                bars.append((f"bar h{shade}", *cell, f"layer {column}: {name} {text(values[column])}"))
                texts[place].append(f"{name} {text(values[column])}")
    middles, stride = [place + 0.5 for place in range(len(columns))], -(-len(columns) // 12)  # so many labels at most
    labels = [name.removesuffix("_proj") for name in rows]
    labels = [label if len(label) <= 9 else f"{label[:8]}…" for label in labels]
    ticks = [(across.percent(middle), str(column)) for middle, column in zip(middles, columns, strict=True)]
    return {
        "title": title,
        "note": note,
        "description": f"{title} by layer and kind of linear, from 0 to {text(largest)}.",
        "height": 24 * len(rows),
        "legend": [("swatch h0", "0"), (f"swatch h{SHADES}", text(largest))],
        "y_ticks": [(down.percent(number + 0.5), label) for number, label in enumerate(labels)],
        "x_ticks": ticks[::stride],
        "x_name": "layer",
        "bars": bars,
        "sync": "layers",
        "tooltips": tooltips_json(across, list(zip(middles, texts, strict=True))),
    }
