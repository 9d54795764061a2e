"""The forward pass of an adapted linear: the frozen base plus VeRA's low-rank path, in whichever form is cheapest.

Two layers run through it: qvera's own (`layer`) and PEFT's VeRA layers after `accelerate_peft` (`stock`). They differ in where
A, B and the vectors live; what is computed from them is here.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from qvera.adapters import functional, fused
from qvera.adapters.multi_adapter import RowPlan
from qvera.models import linear, quantization


class SharedInput:
    """The last z = x Aᵀ: layers that read the very same x (q, k and v; gate and up) get the same z.

    Autograd then adds up their ∂z before the one product of backward. z is given again only for the same live tensor
    object, unchanged since (``_version``), under the same grad mode, dtype, pair and backward pass (a checkpoint's
    recomputation must build its own), and is let go of with x.
    """

    def __init__(self) -> None:
        self._recent: tuple[weakref.ref[torch.Tensor], tuple[Any, ...], torch.Tensor] | None = None

    def project(self, x: torch.Tensor, A: torch.Tensor, dtype: torch.dtype, pair: Any) -> torch.Tensor:
        """Z = x Aᵀ [..., rank] in ``dtype``; ``pair`` tells A from every other A that this x may meet."""
        if torch.compiler.is_compiling() or x.is_inference():
            return functional.project(x.to(dtype), A.to(dtype))
        # the number of the backward pass we are in, -1 outside: checkpointing itself tells its phases apart by it
        task = torch._C._current_graph_task_id()
        key = (A.shape, pair, dtype, x._version, x.requires_grad, torch.is_grad_enabled(), task)
        recent = self._recent
        if recent is not None and recent[0]() is x and recent[1] == key:
            return recent[2]
        z = functional.project(x.to(dtype), A.to(dtype))
        self._recent = (weakref.ref(x, self._forget), key, z)
        if z.requires_grad:  # once backward has come through, z's graph is spent: the next forward needs a new one
            z.register_hook(self._forget_spent)
        return z

    def forget(self) -> None:
        self._recent = None

    def _forget_spent(self, _: torch.Tensor) -> None:
        self._recent = None

    def _forget(self, dead: weakref.ref[torch.Tensor]) -> None:
        if self._recent is not None and self._recent[0] is dead:
            self._recent = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_recent": None}  # a weak reference can't be copied to another process


class LowRankPath:
    """Mixed into a layer that has ``base_layer``, ``in_features``, ``out_features`` and PEFT's ``active_adapters``."""

    base_layer: Any
    in_features: int
    out_features: int
    active_adapters: Any
    disable_adapters: bool
    merged: bool
    _inference_weight: torch.Tensor | None = None
    _inference_adapters: tuple[str, ...] = ()
    _row_plan: RowPlan | None = None
    _layer_name: str = ""

    def carries(self, adapter: str) -> bool:
        """Whether this layer has vectors of that adapter."""
        raise NotImplementedError

    def parts(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float]:
        """A [r, n], B [m, r], d [r], b [m] or [groups, m], and the scalar s of one adapter in this layer."""
        raise NotImplementedError

    def input_vector(self, adapter: str) -> torch.Tensor | None:
        """A [n] of an adapter that scales its input, else None."""
        return None

    def dropout_of(self, adapter: str) -> nn.Module:
        """The dropout on the adapter's input; an Identity where there is none."""
        raise NotImplementedError

    def shared_z(self, adapter: str, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Z = x Aᵀ in ``dtype``, shared with the layers that read the same x."""
        raise NotImplementedError

    def pair_dtype(self) -> torch.dtype:
        """The dtype in which the shared pair is held."""
        raise NotImplementedError

    def active_names(self) -> list[str]:
        """The active adapters that this layer carries."""
        return [name for name in self.active_adapters if self.carries(name)]

    def low_rank_forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """base(x) + the low-rank path of every active adapter; x [..., n] gives [..., m] in the base's output dtype."""
        if self.disable_adapters and self.merged:
            self.unmerge()  # type: ignore[attr-defined]
        if self._row_plan is not None:
            return self._mixed_forward(x, self._row_plan, *args, **kwargs)
        if self._inference_weight is not None and self._answers_from_inference_weight():
            return self._held_product(x, self._inference_weight)
        names = [] if self.disable_adapters or self.merged else self.active_names()
        if len(names) == 1 and (result := self._through_summed_weight(x, names[0])) is not None:
            return result
        result = self.base_layer(x, *args, **kwargs)
        for adapter in names:
            A, B, d, b, scale = self.parts(adapter)
            dtype = linear.compute_dtype(self.base_layer, x)
            dropout, a = self.dropout_of(adapter), self.input_vector(adapter)
            if isinstance(dropout, nn.Identity) and a is None:
                z = self.shared_z(adapter, x, dtype)
            else:  # every layer drops other elements and has its own a, so there is nothing to share
                inner = dropout(x).to(dtype)
                z = functional.project(inner if a is None else functional.scale_input(inner, a), A.to(dtype))
            result = functional.expand(result, z, d, b, B, scale)
        return result

    def _held_product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        bias: Any = self.base_layer.bias
        return F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)).to(x.dtype)

    def _mixed_forward(self, x: torch.Tensor, plan: RowPlan, *args: Any, **kwargs: Any) -> torch.Tensor:
        """base(x), and for each row of x [rows, ..., n] the low-rank path of its own adapter."""
        if self.merged:
            raise ValueError("adapter_names: adapters are merged into the base weights; unmerge them first.")
        if x.shape[0] != plan.rows:
            raise ValueError(f"adapter_names: has {plan.rows} names for a batch of {x.shape[0]} rows.")
        if self._inference_weight is not None and not self._inference_adapters and not torch.is_grad_enabled():
            result = self._held_product(x, self._inference_weight)
        else:
            result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        dtype = linear.compute_dtype(self.base_layer, x)
        for rows, z, d, b, B in self._mixed_parts(x, plan, dtype):
            between = (1,) * (x.dim() - 2)
            inner = z * d.to(dtype).view(d.shape[0], *between, -1)
            change = functional.outward(inner, B, b.view(b.shape[0], *between, *b.shape[1:]))
            if rows is None:
                result = result + change.to(result.dtype)
            else:
                result = result.index_add(0, rows, change.to(result.dtype))
        return result

    def _mixed_parts(self, x: torch.Tensor, plan: RowPlan, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
        """For each pair A, B in the plan: its rows, their z, d with the scale in it [rows, r], b [rows, groups, m], and B."""
        raise NotImplementedError("mixed batches are QVERA's; an accelerated PEFT adapter runs one adapter at a time")

    def _through_summed_weight(self, x: torch.Tensor, adapter: str) -> torch.Tensor | None:
        """Y by one product with W + ΔW where that is cheaper and loses nothing (`summed.pays`), else None."""
        # ZeRO-3 gathers a weight when its module is called, and here it is not
        if isinstance(self.base_layer, Conv1D) or hasattr(self.base_layer.weight, "ds_id"):
            return None
        A, B, d, b, scale = self.parts(adapter)
        a = self.input_vector(adapter)
        dtype = linear.compute_dtype(self.base_layer, x)
        shape = x.numel() // self.in_features, self.in_features, self.out_features, d.numel()
        if not isinstance(self.dropout_of(adapter), nn.Identity):
            return None
        if not fused.pays(*shape, dtype, x.device.type, a is not None):
            return None
        z = None
        if torch.is_grad_enabled() and not fused.keeps_input(*shape, a is not None):
            with torch.no_grad():
                z = self.shared_z(adapter, x, dtype)
        return fused.summed_linear(self.base_layer, x.to(dtype), z, d, b, A, B, scale, a).to(x.dtype)

    def delta_weight_fp32(self, adapter: str) -> torch.Tensor:
        """ΔW of one adapter in fp32, oriented as the base layer's weight: [out, in], or [in, out] for a Conv1D."""
        A, B, d, b, scale = self.parts(adapter)
        a = self.input_vector(adapter)
        a = None if a is None else a.detach().float()
        delta = functional.delta_weight(A.float(), B.float(), d.detach().float(), b.detach().float(), scale, a)
        return delta.t() if isinstance(self.base_layer, Conv1D) else delta

    def hold_inference_weight(self, hold: bool, base_only: bool = False) -> None:
        """Hold (or let go of) W + ΔW of the active adapters [m, n] in the compute dtype, beside the untouched base weight.

        ``base_only``: hold W alone, for batches whose rows use different adapters.

        One product then serves base and adapters: on a CPU that is as fast as the 4-bit kernel on the base alone. For
        answers only; with gradients enabled the layer takes its normal path.
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
        base: Any = self.base_layer
        dtype = getattr(base, "compute_dtype", None) or base.weight.dtype
        # int8: the pair is held in the dtype that its layers compute in
        return dtype if dtype.is_floating_point else self.pair_dtype()

    def _answers_from_inference_weight(self) -> bool:
        # another adapter may have been made active since, or this one merged: then the normal path is the right one
        names = tuple(self.active_names())
        blocked = torch.is_grad_enabled() or self.disable_adapters or self.merged
        return not blocked and bool(names) and names == self._inference_adapters

    @property
    def holds_inference_weight(self) -> bool:
        return self._inference_weight is not None
