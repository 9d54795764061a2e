"""Rotary position embedding of a frozen base's attention: one kernel for q and k, forward and backward.

transformers rotates in a function of the module that its attention class is written in, some fifteen operations a layer
and pass. The class made here runs the same code of ``forward``, in which that one name means `_rotate`.
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
from transformers.models.llama import modeling_llama

from qvera.kernels import elementwise
from qvera.kernels.choice import use_kernels
from qvera.models.mixed_class import Mixin, mixed, same_text

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
    """`apply_rotary_pos_emb`: q [B, H, T, D], k [B, K, T, D], cos and sin [B or 1, T, D]."""
    if args or kwargs or cos.requires_grad or not use_kernels(q, k, cos, sin):
        return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, *args, **kwargs)
    return (_RotaryFunction.apply if torch.is_grad_enabled() else elementwise.rope)(q, k, cos, sin)


def _calling(function: FunctionType, names: dict[str, Any]) -> FunctionType:
    """The function, or the one that it decorates, with other meanings of some global names."""
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
    """Mixed before a transformers attention."""

    @classmethod
    def members(cls, theirs: Any) -> dict[str, Any]:
        return {"forward": _calling(theirs.forward, {_NAME: _rotate})}


def _rotates_as_llama(forward: Callable[..., Any]) -> bool:
    """Whether an attention's forward calls a rotation by the very text of Llama's."""
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
    """Make this model's attention layers rotate by `kernels.elementwise.rope` on an accelerator; returns how many do.

    Changes the class of these module objects only (`mixed_class`). Layers that rotate otherwise than Llama are left
    alone, and doing it twice is harmless.
    """
    count = 0
    for module in model.modules():
        theirs: Any = type(module)
        if not isinstance(module, _Attention) and _rotates_as_llama(theirs.forward):
            module.__class__ = mixed(_Attention, theirs)
        count += isinstance(module, _Attention)
    return count
