"""RMS norm, SwiGLU and rotary position embedding of a frozen base: what each computes, and its kernel.

    norm     h = x f      y = w h           ∂x = f (u - h mean(h u))        f = 1 / rms(x), u = w ∂y, in fp32
    SwiGLU   y = silu(a) c                  ∂c = ∂y silu(a)                 ∂a = silu'(a) c ∂y
    RoPE     y = x cos + R x sin            ∂x = ∂y cos - R (∂y sin)        R (x1, x2) = (-x2, x1), so Rᵀ = -R

No function has a derivative: call it inside a `torch.autograd.Function`, or without gradients.
"""

import torch
import torch.nn.functional as F

from qvera.kernels.choice import register_operator, use_kernels


def _empty_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


def _empty_rms_norm_backward(
    g: torch.Tensor, x: torch.Tensor, factor: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    return x.new_empty(x.shape)


def _empty_swiglu(a: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return a.new_empty(a.shape)


def _empty_swiglu_backward(g: torch.Tensor, a: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return a.new_empty(a.shape), c.new_empty(c.shape)


def _empty_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backward: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    # in memory they lie as [B, T, H, D]
    q_out, k_out = (t.new_empty(t.transpose(1, 2).shape).transpose(1, 2) for t in (q, k))
    return q_out, k_out


_rms_norm = register_operator("rms_norm", _empty_rms_norm)
_rms_norm_backward = register_operator("rms_norm_backward", _empty_rms_norm_backward)
_swiglu = register_operator("swiglu", _empty_swiglu)
_swiglu_backward = register_operator("swiglu_backward", _empty_swiglu_backward)
_rope = register_operator("rope", _empty_rope)


def _one_dtype(*tensors: torch.Tensor) -> bool:
    """Kernels read and write one dtype only."""
    dtype = tensors[0].dtype
    for tensor in tensors:  # as in `use_kernels`
        if tensor.dtype != dtype:
            return False
    return use_kernels(*tensors)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """y = w x f [..., n] in x's dtype, and f = 1 / rms(x) [..., 1] in fp32 (transformers' ``LlamaRMSNorm``)."""
    if _one_dtype(x, weight):
        return _rms_norm(x, weight, eps)
    wide = x.to(torch.float32)
    factor = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * factor).to(x.dtype), factor


def rms_norm_backward(g: torch.Tensor, x: torch.Tensor, factor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """∂x [..., n] in x's dtype from g = ∂y and the ``factor`` of `rms_norm`; the weight gets no gradient."""
    if _one_dtype(g, x, weight):
        return _rms_norm_backward(g, x, factor, weight)
    u = (g * weight).to(torch.float32)
    h = x.to(torch.float32) * factor
    along = (h * u).mean(-1, keepdim=True)
    return torch.addcmul(u, h, along, value=-1).mul_(factor).to(x.dtype)


def swiglu(a: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """silu(a) c, all of one shape."""
    return _swiglu(a, c) if _one_dtype(a, c) else F.silu(a).mul_(c)


def swiglu_backward(g: torch.Tensor, a: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """∂a and ∂c from g = ∂y."""
    if _one_dtype(g, a, c):
        return _swiglu_backward(g, a, c)
    return torch.ops.aten.silu_backward(g * c, a), F.silu(a).mul_(g)


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backward: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q [B, H, T, D] and k [B, K, T, D], of one dtype, by the angles of cos and sin [B or 1, T, D]; D is even.

    cos and sin repeat their first half. With ``backward`` q and k are output gradients and become input gradients.
    Source: transformers' ``apply_rotary_pos_emb``. The kernel's results lie in memory as [B, T, H, D].
    """
    if _one_dtype(q, k, cos, sin):
        return _rope(q, k, cos, sin, backward)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        one, two = x.chunk(2, dim=-1)
        return torch.cat((-two, one), dim=-1)

    if backward:
        return q * cos - rotated(q * sin), k * cos - rotated(k * sin)
    return q * cos + rotated(q) * sin, k * cos + rotated(k) * sin
