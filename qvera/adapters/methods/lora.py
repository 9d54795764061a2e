"""LoRA (arXiv 2106.09685): ΔW = s B A with A [r, n] and B [m, r] trained; s = alpha / r, rank-stabilised alpha / √r.

The rank-stabilised scale is that of arXiv 2312.03732, the learning rate of B that of LoRA+ (arXiv 2402.12354). Adapters
are files of PEFT's LoRA (`qvera.adapters.files.adapter_file`), and the options have PEFT's names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from peft.utils.other import get_pattern_key

from qvera.adapters.factors import Factors
from qvera.adapters.methods.base import LinearSpec
from qvera.adapters.methods.trained_pair import TrainedPair, start_generator, uniform
from qvera.adapters.products.functional import at_least_fp32
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from qvera.adapters.config import QveraConfig
    from qvera.adapters.methods.base import AdapterSettings
    from qvera.adapters.projection import Pair
    from qvera.config.schema import Recipe


class Lora(TrainedPair):
    """A and B for each linear; ``init_lora_weights`` says where they start."""

    name = "lora"
    title = "LoRA"
    keys = frozenset({"alpha", "use_rslora", "init_lora_weights", "loraplus_lr_ratio"})
    usual = {"adapter.rank": 16, "training.learning_rate": 2e-4}
    writes_lora = True
    fields_of_start = ("rank_pattern", "alpha_pattern")

    def tensors(self, adapter: AdapterSettings, spec: LinearSpec) -> dict[str, tuple[int, ...]]:
        rank = self.rank_at(adapter, spec)
        return {"qvera_A": (rank, spec.in_features), "qvera_B": (spec.out_features, rank)}

    def start(self, name: str, shape: tuple[int, ...], adapter: AdapterSettings, spec: LinearSpec) -> torch.Tensor:
        rank, n = self.tensors(adapter, spec)["qvera_A"]
        generator = start_generator(adapter, spec.name)
        if adapter.init_lora_weights == "orthogonal":
            A, B = orthogonal_pair(rank, n, spec.out_features, generator)
            return A if name == "qvera_A" else B
        bound = math.sqrt(1 / n)  # Kaiming's with a = √5
        if name == "qvera_A" and adapter.init_lora_weights == "gaussian":
            return torch.randn(shape, generator=generator) / rank
        if name == "qvera_A":
            return uniform(shape, bound, generator)
        if getattr(adapter, "init_weights", True):
            return torch.zeros(shape)
        return uniform(shape, math.sqrt(1 / rank), generator)

    def factors(
        self, adapter: AdapterSettings, spec: LinearSpec, tensors: Mapping[str, torch.Tensor], pair: Pair | None
    ) -> Factors:
        A, B = at_least_fp32(tensors["qvera_A"]), at_least_fp32(tensors["qvera_B"])
        rank = A.shape[0]
        scale = alpha_at(adapter, spec) / (math.sqrt(rank) if adapter.use_rslora else rank)
        return Factors(A, B, scale=scale)

    def conditions(self, config: QveraConfig) -> dict[str, object]:
        alpha = config.rank if config.alpha is None else config.alpha
        return {"alpha": alpha, "use_rslora": config.use_rslora}

    def rate_factor(self, name: str, adapter: AdapterSettings) -> float:
        return getattr(adapter, "loraplus_lr_ratio", 1.0) if name == "qvera_B" else 1.0

    def rank_at(self, adapter: AdapterSettings, spec: LinearSpec) -> int:
        return int(_of_pattern(getattr(adapter, "rank_pattern", None), spec, adapter.rank))

    def check(self, recipe: Recipe) -> None:
        adapter = recipe.adapter
        if adapter.init_lora_weights == "orthogonal" and adapter.rank % 2:
            raise InputError(f"adapter.init_lora_weights: orthogonal takes an even adapter.rank, got {adapter.rank}.")


def alpha_at(adapter: AdapterSettings, spec: LinearSpec) -> float:
    """alpha of one linear: of a PEFT adapter's ``alpha_pattern``, else the adapter's, else its rank."""
    alpha = adapter.rank if adapter.alpha is None else adapter.alpha
    return _of_pattern(getattr(adapter, "alpha_pattern", None), spec, alpha)


def _of_pattern(pattern: Mapping[str, float] | None, spec: LinearSpec, default: float) -> float:
    """The value of the first name or regular expression in PEFT's ``rank_pattern`` that fits, as PEFT looks it up."""
    return default if not pattern else pattern.get(get_pattern_key(list(pattern), spec.name), default)


def orthogonal_pair(
    rank: int, in_features: int, out_features: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, n] and B [m, r] with orthogonal rows and columns between them, so that B A = 0 up to rounding.

    Each is a random matrix times half of the rows of one orthogonal matrix [r, r], over 10, as in PEFT's
    ``LoraLayer.orthogonal_init``.
    """
    Q, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator))
    A = torch.randn(in_features, rank // 2, generator=generator) @ Q[0::2] / 10
    B = torch.randn(out_features, rank // 2, generator=generator) @ Q[1::2] / 10
    return A.t().contiguous(), B
