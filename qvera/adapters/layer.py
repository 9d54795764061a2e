"""The adapted linear: a frozen base layer and the tensors of each adapter. The method says what these compute."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from qvera.adapters.adapted_forward import AdaptedForward, layer_shape
from qvera.adapters.config import QveraConfig
from qvera.adapters.factors import Factors
from qvera.adapters.methods import LinearSpec, Method, method_of
from qvera.adapters.methods.base import Change, trains_pair
from qvera.adapters.products.low_rank import trained_linear
from qvera.adapters.products.magnitude import RowNorms
from qvera.adapters.projection import OwnProjection, Pair, SharedProjection
from qvera.models import linear, quantization


class VectorDict(nn.ParameterDict):
    """Adapter name → vector. Casting the model to 16 bits leaves it fp32, since optimizer steps are finer than bf16."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> VectorDict:
        def keep_precision(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype.itemsize < tensor.dtype.itemsize else moved

        return super()._apply(keep_precision, recurse)


class SharedTensors(nn.ModuleDict):
    """Adapter → `VectorDict` of the tensors that all its linears share, by name. The tuner holds it, as ``shared``."""

    def vectors(self, adapter: str) -> dict[str, nn.Parameter]:
        """One adapter's tensors, by their names in an adapter file."""
        tensors: Any = dict(self.items()).get(adapter, {})
        return dict(tensors.items())


class QveraLinear(AdaptedForward, nn.Module, BaseTunerLayer):
    """y = base(x) + ΔW x over `Linear4bit`, `Linear8bitLt`, `Linear` or `Conv1D`, in the base layer's compute dtype.

    Adapter tensors are fp32 attributes, under their names in `Method.tensors`: VeRA's ``qvera_d`` and ``qvera_b``.
    """

    adapter_layer_names: tuple[str, ...] = ("qvera_shared",)  # grows with the adapters
    tensor_names: tuple[str, ...] = ()  # likewise: all of them
    other_param_names: tuple[str, ...] = ("qvera_settings", "qvera_dropout", "qvera_projection", "qvera_frozen")
    made_in: torch.dtype = torch.float32
    """The layer's compute dtype when it was made. A trained pair does not tell it."""
    mixed: Any = None
    """The current batch's `qvera.adapters.bank.MixedForward`, if its tokens use different adapters."""
    # PEFT's, which a type checker can't see
    enable_adapters: Any

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        projection: SharedProjection | OwnProjection | None,
        config: QveraConfig,
        full_name: str = "",
        shared: VectorDict | None = None,
    ) -> None:
        super().__init__()
        shape = layer_shape(base_layer)
        if shape is None:
            raise TypeError(f"QVERA adapts linear layers, not {type(base_layer).__name__}")
        self.base_layer = base_layer
        self.in_features, self.out_features = shape
        self.qvera_dropout: Any = nn.ModuleDict()
        # every layer names the same module, so that moving any part of the model moves the one pair with it
        self.qvera_projection: Any = nn.ModuleDict()
        self.qvera_frozen: Any = nn.ModuleDict()
        """Adapter → norms of the weight's rows, if it has a magnitude."""
        self.qvera_shared: dict[str, VectorDict] = {}
        """Adapter → tensors that belong to the whole model (`SharedTensors`), so not to this module."""
        self.qvera_settings: dict[str, tuple[Method, QveraConfig]] = {}
        self.spec = LinearSpec(full_name, self.in_features, self.out_features)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unmerged_weight: nn.Parameter | None = None
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, projection, config, shared)

    def update_layer(
        self,
        adapter_name: str,
        projection: SharedProjection | OwnProjection | None,
        config: QveraConfig,
        shared: VectorDict | None = None,
    ) -> None:
        """Add the tensors of one more adapter, at their start values."""
        device, method = self.base_layer.weight.device, method_of(config)
        self.qvera_settings[adapter_name] = method, config
        if projection is not None:
            self.qvera_projection[adapter_name] = projection
        if shared is not None:
            self.qvera_shared[adapter_name] = shared
        self.qvera_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        for name, shape in method.tensors(config, self.spec).items():
            dtype = method.traits(name, config).dtype
            holds_places = not dtype.is_floating_point
            if not hasattr(self, name):
                setattr(self, name, VectorDict())
                if holds_places:  # PEFT asks every tensor of the other list for gradients
                    self.other_param_names = (*self.other_param_names, name)
                else:
                    self.adapter_layer_names = (*self.adapter_layer_names, name)
                self.tensor_names = (*self.tensor_names, name)
            if device.type == "meta":
                start = torch.empty(shape, device=device, dtype=dtype)
            else:
                start = method.start(name, shape, config, self.spec).to(device)
            getattr(self, name)[adapter_name] = nn.Parameter(start, requires_grad=not holds_places)
        if method.change is Change.SCALED:
            self._hold_norms(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _hold_norms(self, adapter: str) -> None:
        """Compute the weight's row norms, where a magnitude starts. Under ZeRO-3 all ranks must call this together."""
        pair, A = self.qvera_projection[adapter], self.parts(adapter).A
        others = (norms for other, norms in self.qvera_frozen.items() if self.qvera_projection[other] is pair)
        held = next((norms for norms in others if norms.products.shape[1] >= A.shape[0]), None)
        norms = RowNorms(self.base_layer, A, self.out_features) if held is None else held
        self.qvera_frozen[adapter] = norms
        magnitude = self.vectors(adapter)["qvera_m"]
        if not magnitude.is_meta:
            magnitude.data.copy_(norms.of_weight())

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate these adapters and train them, except what their methods keep frozen. PEFT calls it."""
        super().set_adapter(adapter_names, inference_mode)  # type: ignore[misc]
        for name, (method, config) in self.qvera_settings.items():
            for kind, vector in self.tensors(name).items():
                if not method.traits(kind, config).is_trained:
                    vector.requires_grad_(False)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own also casts to the dtype of the base weight, which rounds fp32 vectors over a 16-bit base, and which
        # for packed weights is not even the dtype that the layer computes in
        device = device or self.base_layer.weight.device
        if device.type == "meta":
            return
        for vector in self.tensors(adapter_name).values():
            if not vector.is_meta:
                vector.data = vector.data.to(device)
        for modules in (self.qvera_projection, self.qvera_frozen):
            if adapter_name in modules:
                modules[adapter_name].to(device)

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """See `AdaptedForward.forward`. While `mixed` is set, each token uses its own adapter."""
        if self.mixed is not None:
            return self.mixed.forward(self, x, *args, **kwargs)
        return super().forward(x, *args, **kwargs)

    def carries(self, adapter: str) -> bool:
        """See `AdaptedForward.carries`."""
        return adapter in self.qvera_settings

    def vectors(self, adapter: str) -> dict[str, nn.Parameter]:
        """One adapter's own tensors in this layer, by their names in an adapter file."""
        return {name: getattr(self, name)[adapter] for name in self.tensor_names if adapter in getattr(self, name)}

    def tensors(self, adapter: str) -> dict[str, nn.Parameter]:
        """One adapter's own tensors and those that it shares."""
        return {**self.vectors(adapter), **self.qvera_shared.get(adapter, {})}

    def method(self, adapter: str) -> Method:
        """The method of one adapter."""
        return self.qvera_settings[adapter][0]

    def parts(self, adapter: str) -> Factors:
        """See `AdaptedForward.parts`; a shared A and B are views of the pair."""
        method, config = self.qvera_settings[adapter]
        return method.factors(config, self.spec, self.tensors(adapter), self.pair(adapter))

    def pair(self, adapter: str) -> Pair | None:
        """The adapter's frozen A and B for this layer; None if its method has none."""
        if adapter not in self.qvera_projection:
            return None
        method, config = self.qvera_settings[adapter]
        rank = method.rank_at(config, self.spec)
        return self.qvera_projection[adapter].slices(rank, self.in_features, self.out_features)

    def add_adapter(self, adapter: str, x: torch.Tensor, y: torch.Tensor, overwrite: bool = False) -> torch.Tensor:
        """See `AdaptedForward.add_adapter`; the method computes it."""
        return self.method(adapter).add(self, adapter, x, y, overwrite)

    def with_base(self, adapter: str, x: torch.Tensor) -> torch.Tensor | None:
        """See `AdaptedForward.with_base`; a trained pair does it in one autograd node."""
        if not trains_pair(self.method(adapter)):
            return super().with_base(adapter, x)
        base: nn.Linear = self.base_layer
        if not torch.is_grad_enabled() or base._forward_hooks or base._forward_pre_hooks:
            return None
        factors, inner = self.parts(adapter), x.to(linear.compute_dtype(base, x))
        return trained_linear(base, inner, factors.A, factors.B, factors.scale, self.input_sampler).to(x.dtype)

    def delta(self, adapter: str) -> torch.Tensor:
        """The change of W [m, n] in fp32, without a graph."""
        if self.method(adapter).change is not Change.SCALED:
            return super().delta(adapter)
        weight = quantization.dequantized_weight(self.base_layer, torch.float32)
        return self.parts(adapter).change(weight.t() if isinstance(self.base_layer, Conv1D) else weight)

    def is_low_rank(self, adapter: str) -> bool:
        """See `AdaptedForward.is_low_rank`."""
        return self.method(adapter).change is Change.LOW_RANK

    def has_delta(self, adapter: str) -> bool:
        """See `AdaptedForward.has_delta`; a scaled adapter has none while others are active."""
        change = self.method(adapter).change
        return change is not Change.PER_TOKEN and not (change is Change.SCALED and len(self.active_names()) > 1)

    def dropout_of(self, adapter: str) -> nn.Module:
        """See `AdaptedForward.dropout_of`."""
        return self.qvera_dropout[adapter]

    def shared_z(self, adapter: str, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """See `AdaptedForward.shared_z`."""
        if adapter not in self.qvera_projection:
            return None
        method, config = self.qvera_settings[adapter]
        return self.qvera_projection[adapter].project(x, method.rank_at(config, self.spec), dtype)

    def int8_dtype(self) -> torch.dtype:
        """See `AdaptedForward.int8_dtype`; without a frozen pair `made_in`."""
        return next((pair.A.dtype for pair in self.qvera_projection.values()), self.made_in)

    get_delta_weight = AdaptedForward.delta_weight_fp32  # PEFT's name for it

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW of the given (default: active) adapters to the base weight; `unmerge` restores the original bytes.

        A quantized weight is quantized again, and a warning gives the error of that.

        Raises:
            ValueError: the result has NaN or Inf (with ``safe_merge``), or one of several adapters can't be merged with
                others. The layer is unchanged.
        """
        adapter_names = [n for n in check_adapters_to_merge(self, adapter_names) if self.carries(n)]
        if not adapter_names:
            return
        together = {*self.merged_adapters, *adapter_names}
        alone = [name for name in sorted(together) if self.method(name).change is Change.SCALED]
        if len(together) > 1 and alone:
            raise ValueError(f"{alone[0]} scales the rows of W + ΔW and can't be merged together with others.")
        base = self.base_layer
        merged = quantization.dequantized_weight(base, torch.float32)
        merged = merged + sum(self.get_delta_weight(name) for name in adapter_names)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"merging {adapter_names} gives NaN or Inf: the adapter or the base weight is broken")
        original = base.weight
        if isinstance(base, quantization.Linear8bit):
            # a stock forward before qvera moves rows and scales into the layer's state: unmerge needs them on the
            # weight
            original.CB, original.SCB = quantization.int8_rows(base)
        if isinstance(base, (quantization.Linear4bit, quantization.Linear8bit)):
            self._install(quantization.requantized(base, merged))
            error = quantization.dequantized_weight(base, torch.float32) - merged
            relative = (error.norm() / merged.norm()).item()
            warnings.warn(
                f"merged into a quantized weight, which is quantized again: relative error {relative:.2e} (Frobenius). "
                "Export to 16 bits for an exact merge",
                stacklevel=2,
            )
        else:
            self._install(nn.Parameter(merged.to(original.dtype), requires_grad=original.requires_grad))
        if self._unmerged_weight is None:
            self._unmerged_weight = original
        self.merged_adapters.extend(adapter_names)

    def unmerge(self) -> None:
        """Restore the weight from before `merge`, byte for byte."""
        if self._unmerged_weight is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._install(self._unmerged_weight)
        self._unmerged_weight = None
        self.merged_adapters.clear()

    def _install(self, weight: Any) -> None:
        base = self.base_layer
        base.weight = weight
        if isinstance(base, quantization.Linear4bit):
            base.quant_state = weight.quant_state
        elif isinstance(base, quantization.Linear8bit):
            base.state.CB, base.state.SCB = weight.CB, weight.SCB

    def extra_repr(self) -> str:
        """Adapters and their ranks, for `print(model)`."""
        return ", ".join(f"{name}: {m.name}, rank={c.rank}" for name, (m, c) in self.qvera_settings.items())


def adapted_layers(model: nn.Module) -> list[QveraLinear]:
    """All adapted linears of a model."""
    return [module for module in model.modules() if isinstance(module, QveraLinear)]
