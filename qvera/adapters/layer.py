"""The adapted linear: a frozen base layer plus VeRA's low-rank path, for every adapter attached to it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from qvera.adapters.config import KINDS, QveraConfig, vector_shapes
from qvera.adapters.functional import grouped
from qvera.adapters.low_rank import LowRankPath
from qvera.adapters.multi_adapter import RowPlan
from qvera.adapters.projection import SharedProjection, vera_scale
from qvera.models import quantization


def layer_shape(base_layer: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a layer that can be adapted, else None."""
    if isinstance(base_layer, Conv1D):
        return base_layer.weight.shape[0], base_layer.weight.shape[1]
    if isinstance(base_layer, nn.Linear):  # bitsandbytes' linears are nn.Linear too
        return base_layer.in_features, base_layer.out_features
    return None


class VectorDict(nn.ParameterDict):
    """Adapter name → vector. Stays fp32 when the model is cast to 16 bits: the optimizer's steps are finer than bf16."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        def at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype.itemsize < tensor.dtype.itemsize else moved

        return super()._apply(at_least_fp32, recurse)


class QveraLinear(nn.Module, LowRankPath, BaseTunerLayer):
    """y = base(x) + b ⊙ ((s d ⊙ ((a ⊙ x) Aᵀ)) Bᵀ) (VeRA, equation 2) over `Linear4bit`, `Linear8bitLt`, `Linear` or `Conv1D`.

    Shapes: x [..., in_features] to y [..., out_features]; per adapter d [rank] and b [out_features] (with ``b_groups`` above 1:
    [b_groups, out_features]), fp32, trained, and a [in_features] with ``input_scale`` (else it is not there, and 1).
    The low-rank path runs in the base layer's compute dtype.
    """

    adapter_layer_names: tuple[str, ...] = KINDS
    other_param_names: tuple[str, ...] = ("qvera_rank", "qvera_dropout", "qvera_projection")
    # PEFT's, which a type checker can't see
    set_adapter: Any
    enable_adapters: Any

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, projection: SharedProjection, config: QveraConfig
    ) -> None:
        super().__init__()
        shape = layer_shape(base_layer)
        if shape is None:
            raise TypeError(f"QVERA adapts linear layers, not {type(base_layer).__name__}")
        self.base_layer = base_layer
        self.in_features, self.out_features = shape
        self.qvera_b = VectorDict()
        self.qvera_d = VectorDict()
        self.qvera_a = VectorDict()
        self.qvera_dropout: Any = nn.ModuleDict()
        # every layer names the same module, so that moving any part of the model moves the one pair with it
        self.qvera_projection: Any = nn.ModuleDict()
        self.qvera_rank: dict[str, int] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unmerged_weight: Any = None
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, projection, config)

    def update_layer(self, adapter_name: str, projection: SharedProjection, config: QveraConfig) -> None:
        """Add the vectors of one more adapter: b = 0, d = d_initial and a = 1, so that the model starts unchanged."""
        base: Any = self.base_layer
        device = base.weight.device
        self.qvera_rank[adapter_name] = config.rank
        self.qvera_projection[adapter_name] = projection
        self.qvera_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        starts = {"qvera_b": 0.0, "qvera_d": config.d_initial, "qvera_a": 1.0}
        for kind, shape in vector_shapes(config, self.in_features, self.out_features).items():
            start = torch.full(shape, starts[kind], device=device, dtype=torch.float32)
            getattr(self, kind)[adapter_name] = nn.Parameter(start)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own also casts to the dtype of the base weight, which rounds fp32 vectors over a 16-bit base, and which
        # for packed weights is not even the dtype that the layer computes in
        base: Any = self.base_layer
        device = device or base.weight.device
        if device.type == "meta":
            return
        for vectors in (getattr(self, kind) for kind in KINDS):
            if adapter_name in vectors and not vectors[adapter_name].is_meta:
                vectors[adapter_name].data = vectors[adapter_name].data.to(device)
        if adapter_name in self.qvera_projection:
            self.qvera_projection[adapter_name].to(device)

    def parts(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float]:
        """A [r, n], B [m, r], d [r], b [m] or [groups, m], and the scalar s of one adapter in this layer."""
        rank = self.qvera_rank[adapter]
        A, B = self.qvera_projection[adapter].slices(rank, self.in_features, self.out_features)
        return A, B, self.qvera_d[adapter], self.qvera_b[adapter], vera_scale(rank, self.in_features)

    def input_vector(self, adapter: str) -> torch.Tensor | None:
        return self.qvera_a[adapter] if adapter in self.qvera_a else None

    def carries(self, adapter: str) -> bool:
        return adapter in self.qvera_d

    def dropout_of(self, adapter: str) -> nn.Module:
        return self.qvera_dropout[adapter]

    def shared_z(self, adapter: str, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.qvera_projection[adapter].project(x, self.qvera_rank[adapter], dtype)

    def pair_dtype(self) -> torch.dtype:
        return next(iter(self.qvera_projection.values())).A.dtype

    def _mixed_parts(self, x: torch.Tensor, plan: RowPlan, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
        for bank, rows, adapters in plan.banked:
            vectors = bank.vectors(self._layer_name, adapters, self.in_features, self.out_features)
            if vectors is not None:
                pair = next(p for p in self.qvera_projection.values() if p.seed == bank.seed)
                yield self._mixed_part(x, rows, pair, *vectors, dtype)
        for names, rows in plan.live:
            for name in dict.fromkeys(n for n in names if self.carries(n)):
                chosen = [i for i, other in enumerate(names) if other == name]
                picked = torch.tensor(chosen, device=x.device)
                _, _, d, b, scale = self.parts(name)
                pair = self.qvera_projection[name]
                d_rows, b_rows = (d * scale).expand(len(chosen), -1), grouped(b).expand(len(chosen), -1, -1)
                a = self.input_vector(name)
                a_rows = None if a is None else a.expand(len(chosen), -1)
                yield self._mixed_part(x, picked if rows is None else rows[picked], pair, d_rows, b_rows, a_rows, dtype)

    def _mixed_part(
        self,
        x: torch.Tensor,
        rows: torch.Tensor | None,
        pair: Any,
        d: torch.Tensor,
        b: torch.Tensor,
        a: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Any, ...]:
        rank = d.shape[1]
        x = x if rows is None else x[rows]
        if a is not None:
            x = x.to(dtype) * a.to(dtype).view(a.shape[0], *(1,) * (x.dim() - 2), -1)
        z = pair.project(x, rank, dtype)  # shared by q, k and v where all rows take part and none has a of its own
        return rows, z, d, b, pair.B[: self.out_features, :rank]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.low_rank_forward(x, *args, **kwargs)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """PEFT's name for `delta_weight_fp32`."""
        return self.delta_weight_fp32(adapter)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW of the given (default: active) adapters to the base weight; `unmerge` restores the original bytes.

        A quantized weight is quantized again; a warning gives the measured error of that.

        Raises:
            ValueError: ``safe_merge`` and the merged weight has NaN or Inf; the layer is left as it was.
        """
        adapter_names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.qvera_d]
        if not adapter_names:
            return
        base: Any = self.base_layer
        merged = quantization.dequantized_weight(base, torch.float32)
        merged = merged + sum(self.get_delta_weight(name) for name in adapter_names)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"merging {adapter_names} gives NaN or Inf: the adapter or the base weight is broken")
        original = base.weight
        if isinstance(base, quantization.Linear8bit):
            # a stock forward before qvera moves rows and scales into the layer's state: unmerge needs them on the weight
            original.CB, original.SCB = quantization.int8_rows(base)
        if isinstance(base, (quantization.Linear4bit, quantization.Linear8bit)):
            replacement = quantization.requantized(base, merged)
            self._install(replacement)
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
        """Put the original weight back: the very bytes that were there before `merge`."""
        if self._unmerged_weight is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._install(self._unmerged_weight)
        self._unmerged_weight = None
        self.merged_adapters.clear()

    def _install(self, weight: Any) -> None:
        base: Any = self.base_layer
        base.weight = weight
        if isinstance(base, quantization.Linear4bit):
            base.quant_state = weight.quant_state
        elif isinstance(base, quantization.Linear8bit):
            base.state.CB, base.state.SCB = weight.CB, weight.SCB

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: rank={rank}" for name, rank in self.qvera_rank.items())
