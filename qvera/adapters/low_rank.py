"""The forward pass of an adapted linear: y = W x + s diag(b) B diag(d) A x, and faster ways to the same y.

Two layers run through it: qvera's own (`layer`) and PEFT's VeRA layers after `accelerate_peft` (`peft_compat`). They
differ in where A, B and the vectors live; what is computed from them is here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from qvera.adapters import functional, fused
from qvera.models import linear, quantization

if TYPE_CHECKING:
    from qvera.adapters.multi_adapter import RowPlan


class Factors(NamedTuple):
    """What one adapter adds to one layer: ΔW = s diag(b) B diag(d) A diag(a)."""

    A: torch.Tensor
    """[r, n], frozen"""
    B: torch.Tensor
    """[m, r], frozen"""
    d: torch.Tensor
    """[r], fp32 or wider"""
    b: torch.Tensor
    """[m], or [G, m] with ``b_groups``"""
    scale: float
    a: torch.Tensor | None = None
    """[n] with ``input_scale``, else None"""


class LowRankPath:
    """Mixed into a layer, before `nn.Module`, that has a frozen ``base_layer`` and PEFT's ``active_adapters``."""

    base_layer: Any  # a linear of torch, bitsandbytes or transformers
    in_features: int
    out_features: int
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    if TYPE_CHECKING:  # from PEFT's BaseTunerLayer

        def _get_available_adapters(self) -> set[str]: ...

        def unmerge(self) -> None:
            """Take merged adapters out of the base weight."""

    _inference_weight: torch.Tensor | None = None
    _inference_adapters: tuple[str, ...] = ()
    _row_plan: RowPlan | None = None

    def carries(self, adapter: str) -> bool:
        """Whether this layer has vectors of that adapter."""
        raise NotImplementedError

    def parts(self, adapter: str) -> Factors:
        """The factors of one adapter in this layer; A and B are views of the shared pair."""
        raise NotImplementedError

    def dropout_of(self, adapter: str) -> nn.Module:
        """The dropout on the adapter's input; an Identity where there is none."""
        raise NotImplementedError

    def shared_z(self, adapter: str, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """z = A x in ``dtype``, shared with the layers that read the same x."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """y = W x + s diag(b) B diag(d) A x, summed over the active adapters (VeRA, arXiv 2310.11454, equation 2).

        x [..., in_features] gives y [..., out_features] in the base layer's output dtype.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        if (y := self._fast_forward(x, *args, **kwargs)) is not None:
            return y
        y = self.base_layer(x, *args, **kwargs)  # W x
        for adapter in self._adapters_in_use():
            factors = self.parts(adapter)
            z = self._project(x, adapter, factors)  # A x
            y = functional.expand(y, z, factors.d, factors.b, factors.B, factors.scale)  # y + s diag(b) B diag(d) z
        return y

    def active_names(self) -> list[str]:
        """The active adapters that this layer carries."""
        return [name for name in self.active_adapters if self.carries(name)]

    def _adapters_in_use(self) -> list[str]:
        return [] if self.disable_adapters or self.merged else self.active_names()

    def _project(self, x: torch.Tensor, adapter: str, factors: Factors) -> torch.Tensor:
        """z = A diag(a) dropout(x) in the compute dtype."""
        dtype = linear.compute_dtype(self.base_layer, x)
        dropout = self.dropout_of(adapter)
        if isinstance(dropout, nn.Identity) and factors.a is None:
            return self.shared_z(adapter, x, dtype)
        # every layer drops other elements and has its own a, so there is nothing to share
        inner = dropout(x).to(dtype)
        if factors.a is not None:
            inner = functional.scale_input(inner, factors.a)
        return functional.project(inner, factors.A.to(dtype))

    def _fast_forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor | None:
        """The same y in a cheaper way, or with another adapter for each row.

        None where the formula itself has to be taken.
        """
        if self._row_plan is not None:
            return self._row_plan.forward(self, x, *args, **kwargs)
        if self._inference_weight is not None and self._answers_from_inference_weight():
            return self.inference_product(x)
        names = self._adapters_in_use()
        return self._summed_forward(x, names[0]) if len(names) == 1 else None

    def _summed_forward(self, x: torch.Tensor, adapter: str) -> torch.Tensor | None:
        """y by one product with W + ΔW where that is cheaper and loses nothing (`fused.pays`), else None."""
        base = self.base_layer
        # ZeRO-3 gathers a weight when its module is called, and here it is not
        if (
            isinstance(base, Conv1D)
            or hasattr(base.weight, "ds_id")
            or (base.bias is not None and base.bias.requires_grad)
        ):
            return None
        if not isinstance(self.dropout_of(adapter), nn.Identity):
            return None
        A, B, d, b, scale, a = self.parts(adapter)
        dtype = linear.compute_dtype(base, x)
        sizes = x.numel() // self.in_features, self.in_features, self.out_features, d.numel()
        if not fused.pays(*sizes, dtype, x.device.type, a is not None):
            return None
        z = None
        if torch.is_grad_enabled() and not fused.keeps_input(*sizes, a is not None):
            with torch.no_grad():
                z = self.shared_z(adapter, x, dtype)
        return fused.summed_linear(base, x.to(dtype), z, d, b, A, B, scale, a).to(x.dtype)

    def delta_weight_fp32(self, adapter: str) -> torch.Tensor:
        """ΔW of one adapter in fp32, oriented as the base layer's weight: [out, in], or [in, out] for a Conv1D."""
        A, B, d, b, scale, a = self.parts(adapter)
        a = None if a is None else a.detach().float()
        delta = functional.delta_weight(A.float(), B.float(), d.detach().float(), b.detach().float(), scale, a)
        return delta.t() if isinstance(self.base_layer, Conv1D) else delta

    def hold_inference_weight(self, hold: bool, base_only: bool = False) -> None:
        """Hold W + ΔW of the active adapters [m, n] in the compute dtype, or let go of it.

        One product then serves base and adapters: on a CPU that is as fast as the 4-bit kernel on the base alone. For
        answers only; with gradients enabled the layer takes its normal path.

        Args:
            hold: False lets go.
            base_only: hold W alone, for batches whose rows use different adapters.
        """
        self._inference_weight = None
        names = [] if base_only else self.active_names()
        if hold and (names or base_only) and not self.merged and not isinstance(self.base_layer, Conv1D):
            weight = quantization.dequantized_weight(self.base_layer, torch.float32).detach()
            for name in names:
                weight = weight + self.delta_weight_fp32(name)
            self._inference_weight, self._inference_adapters = weight.to(self.held_dtype()), tuple(names)

    def held_dtype(self) -> torch.dtype:
        """The dtype of `hold_inference_weight`."""
        base = self.base_layer
        dtype = getattr(base, "compute_dtype", None) or base.weight.dtype
        # int8: A and B are held in the dtype that their layers compute in
        return dtype if dtype.is_floating_point else self.parts(min(self._get_available_adapters())).A.dtype

    def inference_product(self, x: torch.Tensor) -> torch.Tensor:
        """y by one product with the held weight."""
        weight, bias = self._inference_weight, self.base_layer.bias
        assert weight is not None
        return F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)).to(x.dtype)

    def _answers_from_inference_weight(self) -> bool:
        # another adapter may have been made active since, or this one merged: then the normal path is the right one
        names = tuple(self.active_names())
        blocked = torch.is_grad_enabled() or self.disable_adapters or self.merged
        return not blocked and bool(names) and names == self._inference_adapters

    @property
    def holds_inference_weight(self) -> bool:
        """Whether the layer holds W + ΔW (or W alone) now."""
        return self._inference_weight is not None
