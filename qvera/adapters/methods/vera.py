"""VeRA (arXiv 2310.11454): ΔW = s diag(b) B diag(d) A diag(a), A and B random, frozen and shared by all linears.

b_groups and input_scale go beyond the paper (`qvera.adapters.products.functional`).
With ``magnitude`` it is DVoRA, which the authors of DoRA (arXiv 2402.09353) made of it
(`qvera.adapters.products.magnitude`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.pytorch_utils import Conv1D

from qvera.adapters.factors import Factors
from qvera.adapters.methods.base import LinearSpec, Method
from qvera.adapters.products import functional
from qvera.adapters.products.functional import at_least_fp32
from qvera.adapters.products.magnitude import RowNorms
from qvera.adapters.projection import Pair, vera_scale
from qvera.models import quantization

if TYPE_CHECKING:
    from qvera.adapters.adapted_forward import AdaptedForward
    from qvera.adapters.layer import QveraLinear
    from qvera.adapters.methods.base import AdapterSettings


class Vera(Method):
    """d [rank] and b [out_features] for each linear, or b [b_groups, out_features]; with input_scale a [in_features].

    b starts at 0, d at d_initial and a at 1. With ``init_weights`` False, as in PEFT's VeRA, b is 1 and d random.
    """

    name = "vera"
    title = "VeRA"
    keys = frozenset({"b_groups", "input_scale", "magnitude", "d_initial", "train_d"})
    usual = {"adapter.rank": 256, "training.learning_rate": 4e-3}
    has_vectors = True
    is_banked = True
    is_stock_vera = True

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

    def is_trained(self, name: str, adapter: AdapterSettings) -> bool:
        return name != "qvera_d" or adapter.train_d


class _WithMagnitude(Vera):
    """m [out_features] beside d and b: the norms of the rows of W + ΔW, from those of W."""

    title = "DVoRA"
    is_low_rank = False
    stands_alone = True
    is_banked = False
    is_stock_vera = False
    keeps_output = True

    def tensors(self, adapter: AdapterSettings, spec: LinearSpec) -> dict[str, tuple[int, ...]]:
        return {**super().tensors(adapter, spec), "qvera_m": (spec.out_features,)}

    def start(self, name: str, shape: tuple[int, ...], adapter: AdapterSettings, spec: LinearSpec) -> torch.Tensor:
        return torch.ones(shape) if name == "qvera_m" else super().start(name, shape, adapter, spec)

    def put_on(self, layer: QveraLinear, adapter_name: str) -> None:
        pair = layer.qvera_projection[adapter_name]
        A, rank = layer.parts(adapter_name).A, layer.parts(adapter_name).rank
        held = next(
            (
                norms
                for other, norms in layer.qvera_frozen.items()
                if layer.qvera_projection[other] is pair and norms.products.shape[1] >= rank
            ),
            None,
        )
        norms = RowNorms(layer.base_layer, A, layer.out_features) if held is None else held
        layer.qvera_frozen[adapter_name] = norms
        magnitude = layer.vectors(adapter_name)["qvera_m"]
        if not magnitude.is_meta:
            magnitude.data.copy_(norms.of_weight())

    def held_bytes(self, adapter: AdapterSettings, specs: Sequence[LinearSpec], itemsize: int) -> int:
        """W Aᵀ and ‖w_i‖² for each linear, and A Aᵀ for each in_features."""
        rows = sum(spec.out_features for spec in specs)
        sizes = {spec.in_features for spec in specs}
        return rows * (adapter.rank * itemsize + 4) + 4 * adapter.rank**2 * len(sizes)

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

    def delta(self, layer: AdaptedForward, adapter_name: str) -> torch.Tensor:
        """W' - W [m, n] in fp32, without a graph."""
        weight = quantization.dequantized_weight(layer.base_layer, torch.float32)
        return layer.parts(adapter_name).change(weight.t() if isinstance(layer.base_layer, Conv1D) else weight)


_WITH_MAGNITUDE = _WithMagnitude()
