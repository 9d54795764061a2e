"""VeRA (arXiv 2310.11454): ΔW = s diag(b) B diag(d) A diag(a), A and B random, frozen and shared by all linears.

b_groups and input_scale go beyond the paper (`qvera.adapters.functional`), and so do phases (`VeraPhases`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from qvera.adapters.factors import Factors
from qvera.adapters.functional import at_least_fp32
from qvera.adapters.methods.base import Method, Place
from qvera.adapters.projection import Pair, vera_scale

if TYPE_CHECKING:
    from qvera.adapters.methods.base import AdapterSettings


class Vera(Method):
    """d [rank] and b [out_features] for each linear, or b [b_groups, out_features]; with input_scale a [in_features].

    b starts at 0, d at d_initial and a at 1. With ``init_weights`` False, as in PEFT's VeRA, b is 1 and d random.
    """

    name = "vera"
    keys = frozenset({"b_groups", "input_scale", "d_initial", "train_d"})
    usual = {"adapter.rank": 256, "training.learning_rate": 4e-3}
    upper_kinds = frozenset({"qvera_d"})  # where BiLoRA's P Λ Q has Λ
    can_resample = True
    has_vectors = True
    is_banked = True

    def variant(self, adapter: AdapterSettings) -> Method:
        return _PHASES if getattr(adapter, "seed_chain", None) else self

    def tensors(self, adapter: AdapterSettings, place: Place) -> dict[str, tuple[int, ...]]:
        m, groups = place.out_features, adapter.b_groups
        shapes: dict[str, tuple[int, ...]] = {"qvera_b": (m,) if groups == 1 else (groups, m)}
        shapes["qvera_d"] = (adapter.rank,)
        if adapter.input_scale:
            shapes["qvera_a"] = (place.in_features,)
        return shapes

    def start(self, name: str, shape: tuple[int, ...], adapter: AdapterSettings, place: Place) -> torch.Tensor:
        init = getattr(adapter, "init_weights", True)
        if name == "qvera_d" and not init:
            return torch.randn(shape)
        starts = {"qvera_b": 0.0 if init else 1.0, "qvera_d": adapter.d_initial, "qvera_a": 1.0}
        return torch.full(shape, starts[name])

    def factors(
        self, adapter: AdapterSettings, place: Place, tensors: Mapping[str, torch.Tensor], pair: Pair | None
    ) -> Factors:
        assert pair is not None
        d, b = at_least_fp32(tensors["qvera_d"]), at_least_fp32(tensors["qvera_b"])
        a = at_least_fp32(tensors["qvera_a"]) if "qvera_a" in tensors else None
        return Factors(*pair, d, b, vera_scale(adapter.rank, place.in_features), a)

    def is_trained(self, name: str, adapter: AdapterSettings) -> bool:
        return name != "qvera_d" or getattr(adapter, "train_d", True)


class VeraPhases(Vera):
    """VeRA in phases: every some steps the vectors are frozen, and a new random pair with fresh vectors goes on.

        ΔW = Σ_p s diag(b_p) B_p diag(d_p) A_p        A_p, B_p of seed p, all of one rank r

    As ReLoRA merges and begins again, and as Flora draws a new random subspace (arXiv 2402.03293): one pair reaches
    changes of rank r only, and the sum has rank p r. Nothing is merged into the base; the sum is an exact LoRA of the
    summed rank.

    In tensors it is VeRA with ``b_groups``: A [p r, n] and B [m, p r] hold the pairs of all seeds, d [p r], b [p, m].
    Only the scale s is that of rank r. A phase that has not begun has b = 0, adds nothing, and is left out of the
    products. While it is trained (``current_phase``), only the current phase gets gradients.
    """

    is_banked = False

    def variant(self, adapter: AdapterSettings) -> VeraPhases:
        return self

    def rank_at(self, adapter: AdapterSettings, place: Place) -> int:
        phases, current = _phases(adapter)
        return adapter.rank // phases * (current + 1)

    def factors(
        self, adapter: AdapterSettings, place: Place, tensors: Mapping[str, torch.Tensor], pair: Pair | None
    ) -> Factors:
        assert pair is not None
        phases, current = _phases(adapter)
        rank = adapter.rank // phases
        d, b = at_least_fp32(tensors["qvera_d"]), at_least_fp32(tensors["qvera_b"])
        if getattr(adapter, "current_phase", None) is not None:
            d = torch.cat([d[: current * rank].detach(), d[current * rank : (current + 1) * rank]])
            b = torch.cat([b[:current].detach(), b[current : current + 1]])
        return Factors(*pair, d, b, vera_scale(rank, place.in_features))


def _phases(adapter: Any) -> tuple[int, int]:
    """How many phases an adapter has, and the number of the last one that is in use."""
    phases, current = len(adapter.seed_chain), getattr(adapter, "current_phase", None)
    return phases, phases - 1 if current is None else current


_PHASES = VeraPhases()
