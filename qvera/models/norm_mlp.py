"""RMS norms and gated MLPs of a frozen base that save less memory for backward.

transformers writes an RMS norm and a gated MLP as chains of elementwise operations. Autograd saves the input of each: a
norm's input once more in fp32, and three tensors as wide as the MLP. With frozen weights, backward needs only the
norm's input and one factor a token, and the two branches of the MLP:

    h = x / rms(x)     y = w h            ∂x = (u - h mean(h u)) / rms(x)          with u = w ∂y, all but y in fp32
    p = silu(a) c                         ∂c = ∂p silu(a)     ∂a = silu'(a) (c ∂p)

Forward gives the same values as transformers, bit for bit.
"""

from __future__ import annotations

import functools
import inspect

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm


class _RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, module: _RMSNorm) -> torch.Tensor:
        wide = x.to(torch.float32)
        factor = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
        ctx.save_for_backward(x, factor)
        ctx.module = module  # type: ignore[attr-defined]  # and not its weight, which ZeRO-3 may release in between
        return module.weight * (wide * factor).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, g: torch.Tensor) -> tuple[torch.Tensor, None]:
        x, factor = ctx.saved_tensors  # type: ignore[attr-defined]
        u = (g * ctx.module.weight).to(torch.float32)  # type: ignore[attr-defined]
        h = x.to(torch.float32) * factor
        along = (h * u).mean(-1, keepdim=True)
        return torch.addcmul(u, h, along, value=-1).mul_(factor).to(x.dtype), None


class _GatedFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, a: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, c)
        return F.silu(a).mul_(c)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, c = ctx.saved_tensors  # type: ignore[attr-defined]
        return torch.ops.aten.silu_backward(g * c, a), F.silu(a).mul_(g)


class _LowMemory(nn.Module):
    """Mixed before a transformers module, in a class made for the pair; unpickling makes that class again."""

    def __reduce__(self) -> tuple[object, ...]:
        ours, theirs = type(self).__bases__
        return _new_instance, (ours, theirs), self.__dict__


class _RMSNorm(_LowMemory):
    """Mixed before a transformers RMS norm."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled() or self.weight.requires_grad:  # generation, or somebody trains norms
            return super().forward(hidden_states)  # type: ignore[misc]  # the transformers class behind this one
        return _RMSNormFunction.apply(hidden_states, self)


class _GatedMLP(_LowMemory):
    """Mixed before a transformers gated MLP."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)  # type: ignore[misc]
        return self.down_proj(_GatedFunction.apply(self.gate_proj(x), self.up_proj(x)))


@functools.cache
def _same_forward(one: type, other: type) -> bool:
    """Whether two classes compute the same, by the text of their forward: most Llama-like models copy Llama's parts."""
    try:
        return inspect.getsource(one.forward) == inspect.getsource(other.forward)  # type: ignore[attr-defined]
    except (OSError, TypeError):  # written in a notebook, say
        return False


@functools.cache
def _mixed(ours: type, theirs: type) -> type:
    return type(f"LowMemory{theirs.__name__}", (ours, theirs), {"__module__": __name__})


def _new_instance(ours: type, theirs: type) -> nn.Module:
    return object.__new__(_mixed(ours, theirs))


def reduce_saved_activations(model: nn.Module) -> int:
    """Make the RMS norms and SiLU-gated MLPs of this model save less for backward; returns how many there are.

    Changes the class of these module objects only. A ``forward`` set on an object, as accelerate's hooks do, would keep
    the module alive in a cycle, and displace the hook. Modules that compute anything else than Llama's are left alone,
    and doing it twice is harmless.
    """
    count = 0
    for module in model.modules():
        theirs: type = type(module)
        if _same_forward(theirs, LlamaRMSNorm):
            module.__class__ = _mixed(_RMSNorm, theirs)
        elif _same_forward(theirs, LlamaMLP) and isinstance(module.act_fn, type(ACT2FN["silu"])):
            module.__class__ = _mixed(_GatedMLP, theirs)
        count += isinstance(module, _LowMemory)
    return count
