"""RMS norms and gated MLPs of a frozen base that save less memory for backward.

transformers writes an RMS norm and a gated MLP as chains of elementwise operations. Autograd saves the input of each: a
norm's input once more in fp32, and three tensors as wide as the MLP. With frozen weights, backward needs only the
norm's input and one factor a token, and the two branches of the MLP. `kernels.elementwise` has the formulas; on an
accelerator each pass is one launch. On a CPU forward gives the same values as transformers, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from qvera.kernels import elementwise
from qvera.models import tiled_mlp
from qvera.models.mixed_class import Mixin, mixed, same_text


class _RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, module: _RMSNorm) -> torch.Tensor:
        y, factor = elementwise.rms_norm(x, module.weight, module.variance_epsilon)
        ctx.save_for_backward(x, factor)
        ctx.module = module  # type: ignore[attr-defined]  # and not its weight, which ZeRO-3 may release in between
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, g: torch.Tensor) -> tuple[torch.Tensor, None]:
        x, factor = ctx.saved_tensors  # type: ignore[attr-defined]
        return elementwise.rms_norm_backward(g, x, factor, ctx.module.weight), None  # type: ignore[attr-defined]


class _GatedFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, a: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, c)
        return elementwise.swiglu(a, c)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return elementwise.swiglu_backward(g, *ctx.saved_tensors)  # type: ignore[attr-defined]


class _RMSNorm(Mixin):
    """Mixed before a transformers RMS norm."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return elementwise.rms_norm(hidden_states, self.weight, self.variance_epsilon)[0]
        if self.weight.requires_grad:  # somebody trains norms
            return super().forward(hidden_states)  # type: ignore[misc]  # the transformers class behind this one
        return _RMSNormFunction.apply(hidden_states, self)


class _GatedMLP(Mixin):
    """Mixed before a transformers gated MLP."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    by_tiles: bool = False  # of a checkpointed layer; `qvera.models.tiled_mlp`

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.by_tiles and torch.is_grad_enabled() and self.training and tiled_mlp.can_tile(self, x):
            return tiled_mlp.tiled(self, self._whole, x)
        return self._whole(x)

    def _whole(self, x: torch.Tensor) -> torch.Tensor:
        gated = _GatedFunction.apply if torch.is_grad_enabled() else elementwise.swiglu
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


def tile_mlps(model: nn.Module) -> None:
    """Let the gated MLPs of layers that are recomputed go by tiles of tokens where there are many."""
    for module in model.modules():
        if isinstance(module, _GatedMLP):
            module.by_tiles = True


def reduce_saved_activations(model: nn.Module) -> int:
    """Make the RMS norms and SiLU-gated MLPs of this model save less for backward; returns how many there are.

    Changes the class of these module objects only (`mixed_class`). Modules that compute anything else than Llama's are
    left alone, and doing it twice is harmless.
    """
    count = 0
    for module in model.modules():
        theirs: Any = type(module)
        if same_text(theirs.forward, LlamaRMSNorm.forward):
            module.__class__ = mixed(_RMSNorm, theirs)
        elif same_text(theirs.forward, LlamaMLP.forward) and isinstance(module.act_fn, type(ACT2FN["silu"])):
            module.__class__ = mixed(_GatedMLP, theirs)
        count += isinstance(module, (_RMSNorm, _GatedMLP))
    return count
