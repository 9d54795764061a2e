"""LoRA-XS (arXiv 2405.17604): ΔW = B R A with R [rank, rank] trained between the truncated SVD of the frozen weight.

A = Σ Vᵀ and B = U of the weight as the base holds it, quantized or not (`qvera.models.svd`). They are kept in the
cache and never in the adapter's file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from qvera.adapters.factors import Factors
from qvera.adapters.files.factor_cache import FactorCache
from qvera.adapters.methods.base import LinearSpec, Method, Source
from qvera.adapters.products.functional import at_least_fp32
from qvera.adapters.projection import Pair
from qvera.distributed.zero_params import gathered
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from qvera.adapters.config import QveraConfig
    from qvera.adapters.methods.base import AdapterSettings


def require_rank(rank: int, spec: LinearSpec) -> None:
    """Raise InputError where a linear has fewer singular values than the rank asks for."""
    most = min(spec.in_features, spec.out_features)
    if rank > most:
        raise InputError(
            f"adapter.rank: {spec.name} [{spec.out_features}, {spec.in_features}] has {most} singular values, and "
            f"the rank is {rank}. Lower the rank, or name other layers in adapter.targets."
        )


def svd_pair(adapter: QveraConfig, spec: LinearSpec, base_layer: nn.Module, rank: int) -> Pair:
    """A and B of a linear from the SVD of its weight, fp32: from the cache, or made now and put there."""
    require_rank(rank, spec)
    weight = base_layer.weight
    assert isinstance(weight, nn.Parameter)
    if weight.is_meta:
        return weight.new_empty(rank, spec.in_features), weight.new_empty(spec.out_features, rank)
    cache = FactorCache.of(adapter)
    with gathered([weight]):
        return cache.pair(spec.name, base_layer, rank)


class LoraXs(Method):
    """R [rank, rank] for each linear, from 0. The authors start it at random numbers of size 1e-5."""

    name = "lora-xs"
    title = "LoRA-XS"
    usual = {"adapter.rank": 64, "training.learning_rate": 4e-3}
    source = Source.OWN

    def tensors(self, adapter: AdapterSettings, spec: LinearSpec) -> dict[str, tuple[int, ...]]:
        require_rank(adapter.rank, spec)
        return {"qvera_R": (adapter.rank, adapter.rank)}

    def start(self, name: str, shape: tuple[int, ...], adapter: AdapterSettings, spec: LinearSpec) -> torch.Tensor:
        return torch.zeros(shape) if getattr(adapter, "init_weights", True) else torch.randn(shape)

    def own_pair(self, adapter: QveraConfig, spec: LinearSpec, base_layer: nn.Module) -> Pair | None:
        return svd_pair(adapter, spec, base_layer, adapter.rank)

    def factors(
        self, adapter: AdapterSettings, spec: LinearSpec, tensors: Mapping[str, torch.Tensor], pair: Pair | None
    ) -> Factors:
        assert pair is not None
        return Factors(*pair, R=at_least_fp32(tensors["qvera_R"]))
