"""VeRA (arXiv 2310.11454): ΔW = s diag(b) B diag(d) A diag(a), A and B random, frozen and shared by all linears.

b_groups and input_scale go beyond the paper. With ``magnitude`` it is DVoRA (DoRA, arXiv 2402.09353).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from qvera.adapters.factors import Factors
from qvera.adapters.methods.base import Change, LinearSpec, Method, Traits
from qvera.adapters.products import functional
from qvera.adapters.products.functional import at_least_fp32
from qvera.adapters.projection import Pair, vera_scale

if TYPE_CHECKING:
    from qvera.adapters.methods.base import AdapterSettings


class Vera(Method):
    """d [rank], b [out_features] or [b_groups, out_features], and with input_scale a [in_features] for each linear."""

    # init_weights False starts b at 1 and d at random, as in PEFT's VeRA

    name = "vera"
    title = "VeRA"
    keys = {"b_groups": True, "input_scale": True, "magnitude": True, "d_initial": False, "train_d": False}
    usual = {"adapter.rank": 256, "training.learning_rate": 4e-3}
    peft_type: ClassVar[str | None] = "VERA"

    def variant(self, adapter: AdapterSettings) -> Method:
        return _WITH_MAGNITUDE if adapter.magnitude else self

    def tensors(self, adapter: AdapterSettings, spec: LinearSpec) -> dict[str, tuple[int, ...]]:
        m, groups = spec.out_features, adapter.b_groups
        shapes: dict[str, tuple[int, ...]] = {"qvera_b": (m,) if groups == 1 else (groups, m)}
        shapes["qvera_d"] = (adapter.rank,)
        if adapter.input_scale:
            shapes["qvera_a"] = (spec.in_features,)
        return shapes

    def start(self, name: str, shape: tuple[int, ...], adapter: AdapterSettings, spec: LinearSpec) -> torch.Tensor:
        init = getattr(adapter, "init_weights", True)
        if name == "qvera_d" and not init:
            return torch.randn(shape)
        starts = {"qvera_b": 0.0 if init else 1.0, "qvera_d": adapter.d_initial, "qvera_a": 1.0}
        return torch.full(shape, starts[name])

    def factors(
        self, adapter: AdapterSettings, spec: LinearSpec, tensors: Mapping[str, torch.Tensor], pair: Pair | None
    ) -> Factors:
        assert pair is not None
        d, b = at_least_fp32(tensors["qvera_d"]), at_least_fp32(tensors["qvera_b"])
        a = at_least_fp32(tensors["qvera_a"]) if "qvera_a" in tensors else None
        return Factors(*pair, d, b, vera_scale(adapter.rank, spec.in_features), a)

    def traits(self, name: str, adapter: AdapterSettings) -> Traits:
        return Traits(is_trained=name != "qvera_d" or adapter.train_d)


class _WithMagnitude(Vera):
    """Adds m [out_features]: the row norms of W + ΔW, which start at those of W."""

    title = "DVoRA"
    change = Change.SCALED
    peft_type = None

    def tensors(self, adapter: AdapterSettings, spec: LinearSpec) -> dict[str, tuple[int, ...]]:
        return {**super().tensors(adapter, spec), "qvera_m": (spec.out_features,)}

    def start(self, name: str, shape: tuple[int, ...], adapter: AdapterSettings, spec: LinearSpec) -> torch.Tensor:
        return torch.ones(shape) if name == "qvera_m" else super().start(name, shape, adapter, spec)

    def factors(
        self, adapter: AdapterSettings, spec: LinearSpec, tensors: Mapping[str, torch.Tensor], pair: Pair | None
    ) -> Factors:
        factors = super().factors(adapter, spec, tensors, pair)
        return factors._replace(magnitude=at_least_fp32(tensors["qvera_m"]))

    def add(self, layer: Any, adapter_name: str, x: torch.Tensor, y: torch.Tensor, overwrite: bool) -> torch.Tensor:
        """bias + f ⊙ (W x + ΔW x) with f = m / ‖W + ΔW‖, which is 1 for a fresh adapter."""
        if layer.mixed is None and len(layer.active_names()) > 1:
            raise ValueError(f"{adapter_name} scales the rows of W + ΔW and can't be active together with others.")
        factors = layer.parts(adapter_name)
        assert factors.magnitude is not None
        gram = layer.qvera_projection[adapter_name].gram(factors.rank, layer.in_features)
        factor = factors.magnitude / layer.qvera_frozen[adapter_name].of_sum(factors, gram)
        scaled = functional.scale_input(layer.add_low_rank(adapter_name, x, y, overwrite), factor)
        bias = layer.base_layer.bias
        return scaled if bias is None else scaled + (bias - bias * factor).to(scaled.dtype)


_WITH_MAGNITUDE = _WithMagnitude()
