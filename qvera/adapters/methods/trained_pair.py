"""What methods have in common whose A and B are trained: the path that keeps x, and seeded random starts."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from qvera.adapters.methods.base import Method, Source
from qvera.adapters.products.low_rank import trained_linear, trained_path
from qvera.models import linear

if TYPE_CHECKING:
    from torch import nn

    from qvera.adapters.adapted_forward import AdaptedForward
    from qvera.adapters.methods.base import AdapterSettings


class TrainedPair(Method):
    """ΔW = s B A, with A and B trained themselves or made from what is trained."""

    source = Source.TRAINED
    keeps_input = True

    def add(
        self, layer: AdaptedForward, adapter_name: str, x: torch.Tensor, y: torch.Tensor, overwrite: bool
    ) -> torch.Tensor:
        factors = layer.parts(adapter_name)
        inner = layer.dropout_of(adapter_name)(x).to(linear.compute_dtype(layer.base_layer, x))
        return trained_path(y, inner, factors.A, factors.B, factors.scale, overwrite, layer.input_sampler)

    def with_base(self, layer: AdaptedForward, adapter_name: str, x: torch.Tensor) -> torch.Tensor | None:
        base: nn.Linear = layer.base_layer
        if not torch.is_grad_enabled() or base._forward_hooks or base._forward_pre_hooks:
            return None
        factors = layer.parts(adapter_name)
        inner = x.to(linear.compute_dtype(base, x))
        return trained_linear(base, inner, factors.A, factors.B, factors.scale, layer.input_sampler).to(x.dtype)


def start_generator(adapter: AdapterSettings, name: str) -> torch.Generator:
    """The random stream of an adapter's seed for a linear or a tensor of that name."""
    seed = getattr(adapter, "projection_seed", None) or getattr(adapter, "seed", 0)
    key = f"{seed}/{name}".encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "little"))


def uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> torch.Tensor:
    """Uniform in ±bound."""
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
