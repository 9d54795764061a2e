"""Norms and gated MLPs of a frozen base that keep for backward only what it needs.

transformers writes an RMS norm and a gated MLP as chains of elementwise operations, and autograd keeps what each link read: of
a norm its input once more in fp32, of an MLP three tensors as wide as the MLP. With frozen weights backward needs the norm's input
and one factor a token, and the two branches of the MLP:

    h = x / rms(x)     y = w h            ∂x = (u - h mean(h u)) / rms(x)          with u = w ∂y, all but y in fp32
    p = silu(a) c                         ∂c = ∂p silu(a)     ∂a = silu'(a) (c ∂p)

Forward makes the same numbers as before, bit for bit.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: Any) -> torch.Tensor:
        wide = x.to(torch.float32)
        factor = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
        ctx.save_for_backward(x, factor)
        ctx.module = module  # and not its weight, which ZeRO-3 may let go of in between
        return module.weight * (wide * factor).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None]:
        x, factor = ctx.saved_tensors
        u = (g * ctx.module.weight).to(torch.float32)
        h = x.to(torch.float32) * factor
        along = (h * u).mean(-1, keepdim=True)
        return torch.addcmul(u, h, along, value=-1).mul_(factor).to(x.dtype), None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, c)
        return F.silu(a).mul_(c)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, c = ctx.saved_tensors
        return torch.ops.aten.silu_backward(g * c, a), F.silu(a).mul_(g)


class _Lean(nn.Module):
    """Mixed before a transformers module, in a class made for the pair; a copy in another process makes that class again."""

    def __reduce__(self) -> tuple[Any, ...]:
        lean, kind = type(self).__bases__
        return _empty, (lean, kind), self.__dict__


class _LeanNorm(_Lean):
    """Mixed before a transformers RMS norm."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled() or self.weight.requires_grad:  # answers, or somebody trains norms
            return super().forward(hidden_states)  # type: ignore[misc]  # the transformers class behind this one
        return _Norm.apply(hidden_states, self)


class _LeanMLP(_Lean):
    """Mixed before a transformers gated MLP."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)  # type: ignore[misc]
        return self.down_proj(_Gated.apply(self.gate_proj(x), self.up_proj(x)))


@functools.cache
def _same_forward(kind: type, model: type) -> bool:
    """Whether a class computes what another does, by the text of its forward: most Llama-like models copy Llama's parts."""
    try:
        return inspect.getsource(kind.forward) == inspect.getsource(model.forward)  # type: ignore[attr-defined]
    except (OSError, TypeError):  # written in a notebook, say
        return False


@functools.cache
def _mixed(lean: type, kind: type) -> type:
    return type(f"Lean{kind.__name__}", (lean, kind), {"__module__": __name__})


def _empty(lean: Any, kind: Any) -> Any:
    made: Any = _mixed(lean, kind)
    return made.__new__(made)


def reduce_saved_activations(model: nn.Module) -> int:
    """Make the RMS norms and SiLU-gated MLPs of this model keep less for backward; returns how many there are.

    Changes these module objects only (their class). Modules that compute anything else than Llama's are left alone, and doing it
    twice is harmless.
    """
    count = 0
    for module in model.modules():
        kind: Any = type(module)  # functools asks for Hashable, which a type checker does not see in it
        lean: Any = None
        if _same_forward(kind, LlamaRMSNorm):
            lean = _LeanNorm
        elif _same_forward(kind, LlamaMLP) and isinstance(module.act_fn, type(ACT2FN["silu"])):
            lean = _LeanMLP
        if lean is not None:
            module.__class__ = _mixed(lean, kind)
        count += isinstance(module, _Lean)
    return count
