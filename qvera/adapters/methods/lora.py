"""LoRA (arXiv 2106.09685): ΔW = s B A with A [r, n] and B [m, r] trained; s = alpha / r, rank-stabilised alpha / √r.

Sources: rank-stabilised scale, arXiv 2312.03732; learning rate of B, LoRA+, arXiv 2402.12354.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from qvera.adapters.factors import Factors
from qvera.adapters.methods.base import LinearSpec, Method, Shapes, Source, Tensors, Traits
from qvera.adapters.products.functional import at_least_fp32
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from qvera.adapters.methods.base import AdapterSettings
    from qvera.adapters.projection import Pair


class Lora(Method):
    """LoRA, with an A and a B for each linear, which start as in PEFT (``init_lora_weights``)."""

    name = "lora"
    title = "LoRA"
    keys = {"alpha": True, "use_rslora": True, "init_lora_weights": False, "loraplus_lr_ratio": False, "experts": True}
    usual = {"adapter.rank": 16, "training.learning_rate": 2e-4}
    source = Source.TRAINED
    peft_type = "LORA"

    def variant(self, adapter: AdapterSettings) -> Method:
        if adapter.experts == "shared":
            raise InputError("adapter.experts: shared is VeRA's; a LoRA of experts is one for each. Set each.")
        if adapter.experts == "each" and adapter.dropout:
            raise InputError(
                "adapter.dropout: can't be combined with a LoRA of experts, in which PEFT has none; remove one of them."
            )
        return self

    def tensors(self, adapter: AdapterSettings, spec: LinearSpec) -> Shapes:
        rank = self.rank_at(adapter, spec)
        stack = (spec.experts,) if spec.experts else ()
        return {"qvera_A": (*stack, rank, spec.in_features), "qvera_B": (*stack, spec.out_features, rank)}

    def start(self, name: str, shape: tuple[int, ...], adapter: AdapterSettings, spec: LinearSpec) -> Tensor:
        *_, rank, n = self.tensors(adapter, spec)["qvera_A"]
        generator = start_generator(adapter, spec.name)
        if adapter.init_lora_weights == "orthogonal":  # B A = 0 up to rounding, as in PEFT's `orthogonal_init`
            # A and B must come from the same Q: the calls for the two draw the same numbers, and each keeps one of them
            if rank % 2:
                raise InputError(f"adapter.init_lora_weights: orthogonal takes even ranks, and {spec.name} has {rank}.")
            each = []
            for _ in range(max(spec.experts, 1)):
                Q, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator))
                A = torch.randn(n, rank // 2, generator=generator) @ Q[0::2] / 10
                B = torch.randn(spec.out_features, rank // 2, generator=generator) @ Q[1::2] / 10
                each.append(A.t() if name == "qvera_A" else B)
            return torch.stack(each).view(shape)
        if name == "qvera_A" and adapter.init_lora_weights == "gaussian":
            return torch.randn(shape, generator=generator) / rank
        if name == "qvera_B" and getattr(adapter, "init_weights", True):
            return torch.zeros(shape)
        # A as PEFT starts it, Kaiming-uniform with a = √5; B only where ``init_weights`` is False
        return uniform(shape, math.sqrt(1 / (n if name == "qvera_A" else rank)), generator)

    def factors(self, adapter: AdapterSettings, spec: LinearSpec, tensors: Tensors, pair: Pair | None) -> Factors:
        A, B = at_least_fp32(tensors["qvera_A"]), at_least_fp32(tensors["qvera_B"])
        rank, default = A.shape[-2], adapter.rank if adapter.alpha is None else adapter.alpha
        alpha = _of_pattern(getattr(adapter, "alpha_pattern", None), spec, default)
        return Factors(A, B, scale=alpha / (math.sqrt(rank) if adapter.use_rslora else rank))

    def traits(self, name: str, adapter: AdapterSettings) -> Traits:
        return Traits(rate=getattr(adapter, "loraplus_lr_ratio", 1.0) if name == "qvera_B" else 1.0)

    def rank_at(self, adapter: AdapterSettings, spec: LinearSpec) -> int:
        return int(_of_pattern(getattr(adapter, "rank_pattern", None), spec, adapter.rank))


def _of_pattern(pattern: Mapping[str, float] | None, spec: LinearSpec, default: float) -> float:
    """Look up a linear in PEFT's ``rank_pattern`` or ``alpha_pattern``; the first match counts."""
    return default if not pattern else pattern.get(get_pattern_key(list(pattern), spec.name), default)


def seed_of(adapter: AdapterSettings) -> int:
    """Return the seed of a recipe's adapter section (``seed``) or of an adapter's config (``projection_seed``)."""
    seed: int = getattr(adapter, "projection_seed", getattr(adapter, "seed", 0))
    return seed


def start_generator(adapter: AdapterSettings, name: str) -> torch.Generator:
    """Return the random stream that the adapter's seed gives to a name."""
    # Each name has a stream of its own. So a linear starts the same, whichever other linears are adapted.
    key = f"{seed_of(adapter)}/{name}".encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "little"))


def uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    """Draw fp32 numbers that are uniform on [-bound, bound)."""
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
