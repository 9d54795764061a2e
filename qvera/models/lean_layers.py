"""RMS norms, gated MLPs and rotary positions of a frozen base: less saved for backward, fewer kernels.

transformers writes norms and gated MLPs as chains of elementwise operations, and autograd saves the input of each. With
frozen weights, backward needs only the norm's input and one factor a token, and the two branches of the MLP
(`kernels.elementwise` has the formulas). On a CPU forward gives the same values as transformers, bit for bit.

The rotation of q and k is a global function of each model's module. A changed class runs the same code of ``forward``,
with `_rotate` under that name. Only module objects that compute what Llama's do get a changed class. A ``forward`` set
on the object would keep it alive in a cycle, and displace a hook of accelerate.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers.activations import ACT2FN
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from qvera.kernels import elementwise
from qvera.kernels.choice import use_kernels
from qvera.models import tiled_mlp


class Mixin(nn.Module):
    """Mixed before a transformers module, in a class made for the pair. Unpickling makes that class again."""

    @classmethod
    def members(cls, theirs: type) -> dict[str, Any]:
        """Members of the class made with ``theirs``, besides the inherited ones."""
        return {}

    def __reduce__(self) -> tuple[object, ...]:
        ours, theirs = type(self).__bases__
        return _new_instance, (ours, theirs), self.__dict__


@functools.cache
def mixed(ours: type[Mixin], theirs: type) -> type:
    """A subclass of both, in which ``ours`` comes first."""
    return type(f"LowMemory{theirs.__name__}", (ours, theirs), {"__module__": __name__, **ours.members(theirs)})


def _new_instance(ours: type[Mixin], theirs: type) -> nn.Module:
    return object.__new__(mixed(ours, theirs))  # type: ignore[arg-type]  # a module class has its own idea of a hash


@functools.cache
def same_text(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Whether two functions have the same text: most Llama-like models copy Llama's parts."""
    try:
        return inspect.getsource(one) == inspect.getsource(other)
    except (OSError, TypeError):  # written in a notebook, say
        return False


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
    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return elementwise.rms_norm(hidden_states, self.weight, self.variance_epsilon)[0]
        if self.weight.requires_grad:  # somebody trains norms
            return super().forward(hidden_states)  # type: ignore[misc]  # the transformers class behind this one
        return _RMSNormFunction.apply(hidden_states, self)


class _GatedMLP(Mixin):
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
    """Let the gated MLPs of recomputed layers go by tiles if there are many tokens."""
    for module in model.modules():
        if isinstance(module, _GatedMLP):
            module.by_tiles = True


def reduce_saved_activations(model: nn.Module) -> int:
    """Let norms and gated MLPs like Llama's save less for backward; returns their number. A second call is harmless."""
    count = 0
    for module in model.modules():
        theirs: Any = type(module)
        if same_text(theirs.forward, LlamaRMSNorm.forward):
            module.__class__ = mixed(_RMSNorm, theirs)
        elif same_text(theirs.forward, LlamaMLP.forward) and isinstance(module.act_fn, type(ACT2FN["silu"])):
            module.__class__ = mixed(_GatedMLP, theirs)
        count += isinstance(module, (_RMSNorm, _GatedMLP))
    return count


_NAME = "apply_rotary_pos_emb"


class _RotaryFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        return elementwise.rope(q, k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, g_q: torch.Tensor, g_k: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors  # type: ignore[attr-defined]
        return *elementwise.rope(g_q, g_k, cos, sin, backward=True), None, None


def _rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, H, T, D], k [B, K, T, D], cos and sin [B or 1, T, D]."""
    if args or kwargs or cos.requires_grad or not use_kernels(q, k, cos, sin):
        return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, *args, **kwargs)
    return (_RotaryFunction.apply if torch.is_grad_enabled() else elementwise.rope)(q, k, cos, sin)


def _calling(function: FunctionType, names: dict[str, Any]) -> FunctionType:
    """Copy a function, or the one that it decorates, with other meanings of some global names."""
    scope, closure, inner = function.__globals__, function.__closure__, getattr(function, "__wrapped__", None)
    if inner is None:
        scope = {**scope, **names}
        scope.pop("__name__", None)  # else torch.compile looks the names up in the module that this is no longer
    else:
        changed = _calling(inner, names)
        closure = tuple(CellType(changed) if cell.cell_contents is inner else cell for cell in closure or ())
    made = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(made, function)
    del made.__dict__["__wrapped__"]
    if inner is not None:
        made.__dict__["__wrapped__"] = changed
    return made


class _Attention(Mixin):
    @classmethod
    def members(cls, theirs: Any) -> dict[str, Any]:
        return {"forward": _calling(theirs.forward, {_NAME: _rotate})}


def _rotates_as_llama(forward: Callable[..., Any]) -> bool:
    innermost = inspect.unwrap(forward)
    if not isinstance(innermost, FunctionType) or _NAME not in innermost.__code__.co_names:
        return False
    theirs = innermost.__globals__.get(_NAME)
    if not isinstance(theirs, FunctionType):
        return False
    return all(
        same_text(
            theirs.__globals__.get("rotate_half") if name == "rotate_half" else theirs, getattr(modeling_llama, name)
        )
        for name in (_NAME, "rotate_half")
    )


def fuse_rotation(model: nn.Module) -> int:
    """Let attention like Llama's rotate by `kernels.elementwise.rope`; returns how many. A second call is harmless."""
    count = 0
    for module in model.modules():
        theirs: Any = type(module)
        if not isinstance(module, _Attention) and _rotates_as_llama(theirs.forward):
            module.__class__ = mixed(_Attention, theirs)
        count += isinstance(module, _Attention)
    return count
