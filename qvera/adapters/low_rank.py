"""The forward pass of an adapted linear: y = W x + s diag(b) B diag(d) A x, and faster ways to the same y.

Two layers run through it: qvera's own (`layer`) and PEFT's VeRA layers after `accelerate_peft` (`peft_compat`). They
differ in where A, B and the vectors live; what is computed from them is here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from qvera.adapters import functional, fused
from qvera.adapters.functional import Factors
from qvera.distributed.zero_params import is_sharded
from qvera.models import linear, quantization


class LowRankPath:
    """Mixed into a PEFT layer with a frozen ``base_layer``; what a kind of adapter adds is where its factors are."""

    base_layer: Any  # a linear of torch, bitsandbytes or transformers
    in_features: int
    out_features: int
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    unmerge: Callable[[], None]
    _get_available_adapters: Callable[[], set[str]]
    _inference_weight: torch.Tensor | None = None
    _inference_adapters: tuple[str, ...] = ()
    _row_forward: Callable[..., torch.Tensor] | None = None
    """The forward pass of a batch whose rows use different adapters, while there is one (`multi_adapter.RowPlan`)."""

    @abstractmethod
    def carries(self, adapter: str) -> bool:
        """Whether this layer has vectors of that adapter."""

    @abstractmethod
    def parts(self, adapter: str) -> Factors:
        """The factors of one adapter in this layer; A and B are views of the shared pair."""

    @abstractmethod
    def dropout_of(self, adapter: str) -> nn.Module:
        """The dropout on the adapter's input; an Identity where there is none."""

    @abstractmethod
    def shared_z(self, adapter: str, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """z = A x in ``dtype``, shared with the layers that read the same x."""

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
        if self._row_forward is not None:
            return self._row_forward(self, x, *args, **kwargs)
        names = self._adapters_in_use()
        # another adapter may have been made active since the weight was made: then the normal path is the right one
        held = self._inference_weight is not None and tuple(names) == self._inference_adapters
        if held and names and not torch.is_grad_enabled():
            return self.inference_product(x)
        return self._summed_forward(x, names[0]) if len(names) == 1 else None

    def _summed_forward(self, x: torch.Tensor, adapter: str) -> torch.Tensor | None:
        """y by one product with W + ΔW where that is cheaper and loses nothing (`fused.pays`), else None."""
        base = self.base_layer
        # ZeRO-3 gathers a weight when its module is called, and here it is not
        if isinstance(base, Conv1D) or is_sharded(base.weight):
            return None
        trains_bias = base.bias is not None and base.bias.requires_grad
        if trains_bias or not isinstance(self.dropout_of(adapter), nn.Identity):
            return None
        factors = self.parts(adapter)
        dtype, scaled = linear.compute_dtype(base, x), factors.a is not None
        sizes = x.numel() // self.in_features, self.in_features, self.out_features, factors.d.numel()
        if not fused.pays(*sizes, dtype, x.device.type, scaled):
            return None
        z = None
        if torch.is_grad_enabled() and not fused.keeps_input(*sizes, scaled):
            with torch.no_grad():
                z = self.shared_z(adapter, x, dtype)
        return fused.summed_linear(base, x.to(dtype), z, factors).to(x.dtype)

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

    @property
    def holds_inference_weight(self) -> bool:
        """Whether the layer holds W + ΔW (or W alone) now."""
        return self._inference_weight is not None
