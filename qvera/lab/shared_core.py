"""ΔW = s B R A, with R [rank, rank] trained. A and B are VeRA's: random, frozen and shared.

Unlike LoRA-XS (arXiv 2405.17604), a file holds only R, and linears that read the same input share z.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qvera.adapters.factors import Factors
from qvera.adapters.methods.base import LinearSpec, Method
from qvera.adapters.products.functional import at_least_fp32
from qvera.adapters.projection import Pair, vera_scale
from qvera.lab.keys import Settings


class SharedCore(Method):
    """R [rank, rank] for each linear starts at 0."""

    name = "shared-core"
    usual = {"adapter.rank": 64, "training.learning_rate": 4e-3}

    def tensors(self, adapter: Settings, spec: LinearSpec) -> dict[str, tuple[int, ...]]:
        return {"qvera_R": (adapter.rank, adapter.rank)}

    def start(self, name: str, shape: tuple[int, ...], adapter: Settings, spec: LinearSpec) -> torch.Tensor:
        return torch.zeros(shape) if getattr(adapter, "init_weights", True) else torch.randn(shape)

    def factors(
        self, adapter: Settings, spec: LinearSpec, tensors: Mapping[str, torch.Tensor], pair: Pair | None
    ) -> Factors:
        assert pair is not None
        scale = vera_scale(adapter.rank, spec.in_features)
        return Factors(*pair, scale=scale, R=at_least_fp32(tensors["qvera_R"]))
