"""RMS norms and gated MLPs of a frozen base that save less memory for backward.

transformers writes an RMS norm and a gated MLP as chains of elementwise operations. Autograd saves the input of each: a
norm's input once more in fp32, and three tensors as wide as the MLP. With frozen weights, backward needs only the
norm's input and one factor a token, and the two branches of the MLP:

    h = x / rms(x)     y = w h            ∂x = (u - h mean(h u)) / rms(x)          with u = w ∂y, all but y in fp32
    p = silu(a) c                         ∂c = ∂p silu(a)     ∂a = silu'(a) (c ∂p)

Forward gives the same values as transformers, bit for bit.
"""

import functools
import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm


class _RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, module: LlamaRMSNorm) -> torch.Tensor:
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


def _norm_forward(module: LlamaRMSNorm, hidden_states: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled() or module.weight.requires_grad:  # generation, or somebody trains norms
        return type(module).forward(module, hidden_states)
    return _RMSNormFunction.apply(hidden_states, module)


def _gated_forward(module: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return type(module).forward(module, x)
    return module.down_proj(_GatedFunction.apply(module.gate_proj(x), module.up_proj(x)))


@functools.cache
def _same_forward(one: type, other: type) -> bool:
    """Whether two classes compute the same, by the text of their forward: most Llama-like models copy Llama's parts."""
    try:
        return inspect.getsource(one.forward) == inspect.getsource(other.forward)  # type: ignore[attr-defined]
    except (OSError, TypeError):  # written in a notebook, say
        return False


def reduce_saved_activations(model: nn.Module) -> int:
    """Make the RMS norms and SiLU-gated MLPs of this model save less for backward; returns how many there are.

    Changes the forward of these module objects only. Modules that compute anything else than Llama's are left alone,
    and doing it twice is harmless.
    """
    count = 0
    for module in model.modules():
        forward: Callable[..., torch.Tensor]
        kind: type = type(module)
        if _same_forward(kind, LlamaRMSNorm):
            forward = _norm_forward
        elif _same_forward(kind, LlamaMLP) and isinstance(module.act_fn, type(ACT2FN["silu"])):
            forward = _gated_forward
        else:
            continue
        module.forward = functools.partial(forward, module)  # a partial, since copies and pickles keep it
        count += 1
    return count
