"""SARA (arXiv 2408.03290): VeRA's vectors, with a rank for each linear from the singular values of its weight.

The rank is the smallest number of leading singular values whose sum is ``singular_share`` of the sum of all, at most
``rank``. A and B are prefixes of VeRA's shared random pair, or with ``frozen_pair: svd`` the linear's own Σ Vᵀ and U.
The authors published no code; the vector b [out_features], 0 at first, is from a third party's.

With ``mixed_vectors`` above 1 it is Mo-SARA: several vectors d are mixed for each token, z = A x, with the gates
softmax(w_out (w_in · z / rms(z))). So there is no one ΔW to merge.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qvera.adapters.config import QveraConfig
from qvera.adapters.factors import Factors
from qvera.adapters.methods.base import Change, LinearBytes, LinearSpec, Method, Shapes, Source, Tensors
from qvera.adapters.methods.lora import seed_of
from qvera.adapters.methods.vera import Vera
from qvera.adapters.products import functional
from qvera.adapters.products.functional import at_least_fp32
from qvera.adapters.projection import Pair
from qvera.distributed.zero import gathered
from qvera.lab.keys import Settings
from qvera.lab.lora_xs import FactorCache, svd_pair
from qvera.lab.svd import rank_of_share
from qvera.utils.errors import InputError


class Sara(Vera):
    """d [k] and b [out_features] for each linear, k its rank. The scale is VeRA's for the highest rank.

    So the step of a linear does not depend on its own rank.
    """

    name = "sara"
    title = "SARA"
    keys = {"singular_share": True, "frozen_pair": True, "mixed_vectors": True, "d_initial": False, "train_d": False}
    peft_type = None

    def variant(self, adapter: Settings) -> Method:
        return _VARIANTS[adapter.frozen_pair == "svd", adapter.mixed_vectors > 1]

    def prepare(self, adapter: QveraConfig, linears: Sequence[tuple[LinearSpec, nn.Module]]) -> None:
        if adapter.ranks is not None:
            return
        ranks, cache = {}, FactorCache.of(adapter)
        for spec, base_layer in linears:
            weight = base_layer.weight
            assert isinstance(weight, nn.Parameter)
            if weight.is_meta:
                continue
            with gathered([weight]):
                values = cache.singular_values(spec.name, base_layer)
            ranks[spec.name] = min(adapter.rank, rank_of_share(values, adapter.singular_share))
        adapter.ranks = ranks or None

    def rank_at(self, adapter: Settings, spec: LinearSpec) -> int:
        """Return the rank of a linear; before its weight is known, the highest that it may have."""
        ranks = getattr(adapter, "ranks", None) or {}
        most = min(adapter.rank, spec.in_features, spec.out_features)
        return int(ranks.get(spec.name, most))

    def tensors(self, adapter: Settings, spec: LinearSpec) -> Shapes:
        return {"qvera_b": (spec.out_features,), "qvera_d": (self.rank_at(adapter, spec),)}


class _Svd(Sara):
    source = Source.OWN

    def own_pair(self, adapter: QveraConfig, spec: LinearSpec, base_layer: nn.Module | None) -> Pair | None:
        return svd_pair(adapter, spec, base_layer, self.rank_at(adapter, spec))

    def scale(self, adapter: Settings, spec: LinearSpec) -> float:
        return 1.0


class _Mixture(Sara):
    """d [experts, k], b [out_features], and the router's w_in [k] and w_out [experts]."""

    title = "Mo-SARA"
    change = Change.PER_TOKEN

    def tensors(self, adapter: Settings, spec: LinearSpec) -> Shapes:
        k, experts = self.rank_at(adapter, spec), adapter.mixed_vectors
        shapes = super().tensors(adapter, spec) | {"qvera_d": (experts, k)}
        return {**shapes, "qvera_router_in": (k,), "qvera_router_out": (experts,)}

    def start(self, name: str, shape: tuple[int, ...], adapter: Settings, spec: LinearSpec) -> Tensor:
        """Start d at random around d_initial, and the router at random: equal experts would stay equal."""
        if name == "qvera_b" or not getattr(adapter, "init_weights", True):
            return super().start(name, shape, adapter, spec)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed_of(adapter)} {spec.name} {name}".encode()))
        drawn = torch.randn(shape, generator=generator)
        return adapter.d_initial * (1 + drawn / 2) if name == "qvera_d" else drawn / shape[0] ** 0.5

    def memory(
        self, adapter: Settings, spec: LinearSpec, tokens: int, dtype: torch.dtype, on_accelerator: bool
    ) -> LinearBytes:
        # of each token: z / rms(z) in fp32 (in 16 bits also z in fp32), Σₑ gₑ dₑ, d ⊙ z, 1 / rms, score and gates
        k, size = self.rank_at(adapter, spec), dtype.itemsize
        kept = tokens * (k * ((4 if size == 4 else 8) + 2 * size) + 4 * (2 + adapter.mixed_vectors)) + 4 * k
        return LinearBytes(kept, 4 * k * (2 * spec.out_features + 3 * tokens), 0)

    def factors(self, adapter: Settings, spec: LinearSpec, tensors: Tensors, pair: Pair | None) -> Factors:
        raise InputError(
            f"adapter.mixed_vectors: the router mixes {adapter.mixed_vectors} sets of values for each token, so there "
            "is no one ΔW to merge or to write as a LoRA. Answer with the run itself, or train with mixed_vectors: 1."
        )

    def add(self, layer: Any, adapter_name: str, x: Tensor, y: Tensor, overwrite: bool) -> Tensor:
        """Return y + s b ⊙ B (d ⊙ z), where d = Σₑ gₑ dₑ and g = softmax(w_out (w_in · z / rms(z)))."""
        vectors, pair = layer.vectors(adapter_name), layer.pair(adapter_name)
        assert pair is not None
        A, B = pair
        z = layer.project(x, adapter_name, A)
        wide = at_least_fp32(z)
        score = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-12)) @ vectors["qvera_router_in"]
        gates = torch.softmax(score.unsqueeze(-1) * vectors["qvera_router_out"], dim=-1)  # [..., experts]
        mixed = z * (gates @ vectors["qvera_d"]).to(z.dtype)
        scale = self.scale(layer.qvera_settings[adapter_name][1], layer.spec)
        one = torch.ones(B.shape[1], device=z.device)
        return functional.expand(y, mixed, one, at_least_fp32(vectors["qvera_b"]), B, scale, overwrite)


class _SvdMixture(_Mixture, _Svd):
    pass


_VARIANTS: dict[tuple[bool, bool], Method] = {
    (False, False): Sara(),
    (True, False): _Svd(),
    (False, True): _Mixture(),
    (True, True): _SvdMixture(),
}
"""The methods by two questions: is the pair the weight's own, and are there several vectors d?"""
