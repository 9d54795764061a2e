"""Triton kernels of a frozen base model: RMS norm, SwiGLU and rotary position embedding, forward and backward.

They compute in fp32. Forward rounds where transformers rounds, so that it gives the same numbers; backward rounds once.
`elementwise` has the formulas.
"""

from __future__ import annotations

import torch

from qvera.kernels.triton_import import jit, tl

SWIGLU_BLOCK = 1024
ROPE_HEADS = 8
"""Heads of one token that a program rotates."""


@jit
def rms_norm_kernel(x, weight, y, factor, width, eps, BLOCK: tl.constexpr):
    """One row of x [rows, width] a program; ``factor`` [rows] in fp32."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    stored = tl.load(x + row * width + column, mask=inside, other=0.0)
    wide = stored.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
    tl.store(factor + row, scale)
    h = (wide * scale).to(stored.dtype).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + column, w * h, mask=inside)


@jit
def rms_norm_backward_kernel(g, x, factor, weight, grad, width, BLOCK: tl.constexpr):
    """One row a program: ∂x from g = ∂y; the weight gets no gradient."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    scale = tl.load(factor + row)
    h = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32) * scale
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(g + row * width + column, mask=inside, other=0.0).to(tl.float32) * w
    along = tl.sum(h * u, axis=0) / width
    tl.store(grad + row * width + column, (u - h * along) * scale, mask=inside)


@jit
def swiglu_kernel(a, c, y, count, BLOCK: tl.constexpr):
    """y = silu(a) c over ``count`` elements, BLOCK a program."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    stored = tl.load(a + at, mask=inside, other=0.0)
    wide = stored.to(tl.float32)
    silu = (wide * tl.sigmoid(wide)).to(stored.dtype).to(tl.float32)
    tl.store(y + at, silu * tl.load(c + at, mask=inside, other=0.0).to(tl.float32), mask=inside)


@jit
def swiglu_backward_kernel(g, a, c, grad_a, grad_c, count, BLOCK: tl.constexpr):
    """∂a and ∂c in one pass, BLOCK elements a program."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    upstream = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    wide = tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(c + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(wide)
    tl.store(grad_a + at, upstream * other * sigmoid * (1.0 + wide * (1.0 - sigmoid)), mask=inside)
    tl.store(grad_c + at, upstream * wide * sigmoid, mask=inside)


@jit
def _rotate_heads(
    source,
    target,
    batch,
    token,
    first,
    tokens,
    heads,
    s_batch,
    s_head,
    s_token,
    cos1,
    cos2,
    sin1,
    sin2,
    half,
    BACKWARD: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Rotate heads ``first`` to ``first + BLOCK_HEADS`` of one token; the result is laid out [batch, token, head]."""
    head = first + tl.arange(0, BLOCK_HEADS)[:, None]
    column = tl.arange(0, BLOCK_HALF)[None, :]
    inside = (head < heads) & (column < half)
    read = source + batch * s_batch + token * s_token + head.to(tl.int64) * s_head + column
    stored = tl.load(read, mask=inside, other=0.0)
    one, two = stored.to(tl.float32), tl.load(read + half, mask=inside, other=0.0).to(tl.float32)
    write = target + ((batch * tokens + token) * heads + head) * (2 * half) + column
    if BACKWARD:
        tl.store(write, one * cos1 + two * sin2, mask=inside)
        tl.store(write + half, two * cos2 - one * sin1, mask=inside)
    else:  # three roundings, as transformers' products and sum have them
        kind = stored.dtype
        left, right = (one * cos1).to(kind).to(tl.float32), (two * sin1).to(kind).to(tl.float32)
        tl.store(write, left - right, mask=inside)
        left, right = (two * cos2).to(kind).to(tl.float32), (one * sin2).to(kind).to(tl.float32)
        tl.store(write + half, left + right, mask=inside)


@jit
def rope_kernel(
    q,
    k,
    cos,
    sin,
    q_out,
    k_out,
    tokens,
    q_heads,
    k_heads,
    half,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    c_batch,
    c_token,
    s_batch,
    s_token,
    BACKWARD: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """BLOCK_HEADS heads of one token a program, of q first and then of k; ``half`` is half a head's width."""
    batch, token = (tl.program_id(0) // tokens).to(tl.int64), (tl.program_id(0) % tokens).to(tl.int64)
    part, q_parts = tl.program_id(1), tl.cdiv(q_heads, BLOCK_HEADS)
    column = tl.arange(0, BLOCK_HALF)[None, :]
    inside = column < half
    cos_row, sin_row = cos + batch * c_batch + token * c_token, sin + batch * s_batch + token * s_token
    cos1 = tl.load(cos_row + column, mask=inside, other=0.0).to(tl.float32)
    cos2 = tl.load(cos_row + half + column, mask=inside, other=0.0).to(tl.float32)
    sin1 = tl.load(sin_row + column, mask=inside, other=0.0).to(tl.float32)
    sin2 = tl.load(sin_row + half + column, mask=inside, other=0.0).to(tl.float32)
    if part < q_parts:
        _rotate_heads(
            q, q_out, batch, token, part * BLOCK_HEADS, tokens, q_heads, q_batch, q_head, q_token,
            cos1, cos2, sin1, sin2, half, BACKWARD, BLOCK_HEADS, BLOCK_HALF,
        )  # fmt: skip
    else:
        _rotate_heads(
            k, k_out, batch, token, (part - q_parts) * BLOCK_HEADS, tokens, k_heads, k_batch, k_head, k_token,
            cos1, cos2, sin1, sin2, half, BACKWARD, BLOCK_HEADS, BLOCK_HALF,
        )  # fmt: skip


def _power_of_two(count: int) -> int:
    """The least power of two that is not below ``count``, which Triton's ranges need."""
    return 1 << (count - 1).bit_length()


def _warps(elements: int) -> int:
    """Warps of a program that holds a row of this many elements: 16 elements a thread, up to 512 threads."""
    return max(1, min(16, elements // 512))


def launch_rms_norm(x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, factor: torch.Tensor, eps: float) -> None:
    """Write y [..., n] and ``factor`` [..., 1] for x [..., n]; all but ``weight`` are contiguous, as below."""
    width, block = x.shape[-1], _power_of_two(x.shape[-1])
    if rows := factor.numel():
        rms_norm_kernel[(rows,)](x, weight, y, factor, width, eps, BLOCK=block, num_warps=_warps(block))


def launch_rms_norm_backward(
    g: torch.Tensor, x: torch.Tensor, factor: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor
) -> None:
    """Write ∂x to ``grad``."""
    width, block = x.shape[-1], _power_of_two(x.shape[-1])
    if rows := factor.numel():
        rms_norm_backward_kernel[(rows,)](g, x, factor, weight, grad, width, BLOCK=block, num_warps=_warps(block))


def launch_swiglu(a: torch.Tensor, c: torch.Tensor, y: torch.Tensor) -> None:
    """Write y = silu(a) c."""
    if count := a.numel():
        swiglu_kernel[(-(-count // SWIGLU_BLOCK),)](a, c, y, count, BLOCK=SWIGLU_BLOCK)


def launch_swiglu_backward(
    g: torch.Tensor, a: torch.Tensor, c: torch.Tensor, grad_a: torch.Tensor, grad_c: torch.Tensor
) -> None:
    """Write ∂a and ∂c."""
    if count := a.numel():
        swiglu_backward_kernel[(-(-count // SWIGLU_BLOCK),)](g, a, c, grad_a, grad_c, count, BLOCK=SWIGLU_BLOCK)


def launch_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    backward: bool,
) -> None:
    """Rotate q [B, H, T, D] and k [B, K, T, D] into outputs that lie in memory as [B, T, H, D]."""
    q, k, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, cos, sin))
    batch, q_heads, tokens, width = q.shape
    k_heads, half = k.shape[1], width // 2
    cos, sin = cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)  # a batch of one serves all
    parts = -(-q_heads // ROPE_HEADS) - (-k_heads // ROPE_HEADS)
    if q.numel():
        rope_kernel[(batch * tokens, parts)](
            q, k, cos, sin, q_out, k_out, tokens, q_heads, k_heads, half, *q.stride()[:3], *k.stride()[:3],
            *cos.stride()[:2], *sin.stride()[:2],
            BACKWARD=backward, BLOCK_HEADS=ROPE_HEADS, BLOCK_HALF=_power_of_two(half),
        )  # fmt: skip
