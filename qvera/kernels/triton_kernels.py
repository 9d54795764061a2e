"""The Triton kernels and their launchers. The modules beside this one have the formulas.

They compute in fp32 and round once, at the end. Forward passes of a frozen base round where transformers does.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton import language

tl: Any = language
jit: Any = triton.jit

BLOCK_ROWS, BLOCK_COLUMNS = 16, 128
"""2,048 elements at a time: 16 for each of a program's 128 threads."""


@jit
def combined_kernel(
    B, d, b, C, scale, out_features, width, row_stride, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """C [m, r] contiguous; B has ``row_stride`` elements from row to row; b [G, m]; ``width`` is r / G."""
    # a program has BLOCK_ROWS rows of one group of columns
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    group, rank = tl.program_id(1), tl.num_programs(1) * width
    is_row = rows < out_features
    b_rows = tl.load(b + group * out_features + rows, mask=is_row, other=0.0).to(tl.float32) * scale
    at = rows.to(tl.int64)[:, None]
    for start in range(0, width, BLOCK_COLUMNS):
        inside = start + tl.arange(0, BLOCK_COLUMNS)
        columns, is_column = group * width + inside, inside < width
        mask = is_row[:, None] & is_column[None, :]
        d_columns = tl.load(d + columns, mask=is_column, other=0.0).to(tl.float32)
        tile = tl.load(B + at * row_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        product = tile * d_columns[None, :] * b_rows[:, None]
        tl.store(C + at * rank + columns[None, :], product.to(C.dtype.element_ty), mask=mask)


@jit
def vector_gradients_kernel(
    M, B, d, b, grad_b, grad_d_parts, C, scale, c_scale, out_features, width, row_stride, WRITE_C: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """∂b [G, m] whole, ∂d in parts [programs, r], one for each block of rows, and C if WRITE_C; M [m, r] contiguous."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    group, rank = tl.program_id(1), tl.num_programs(1) * width
    is_row = rows < out_features
    b_rows = tl.load(b + group * out_features + rows, mask=is_row, other=0.0).to(tl.float32)
    b_sum = tl.zeros((BLOCK_ROWS,), tl.float32)
    at = rows.to(tl.int64)[:, None]
    for start in range(0, width, BLOCK_COLUMNS):
        inside = start + tl.arange(0, BLOCK_COLUMNS)
        columns, is_column = group * width + inside, inside < width
        mask = is_row[:, None] & is_column[None, :]
        d_columns = tl.load(d + columns, mask=is_column, other=0.0).to(tl.float32)
        tile = tl.load(B + at * row_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        weighted = tl.load(M + at * rank + columns[None, :], mask=mask, other=0.0).to(tl.float32) * tile
        b_sum += tl.sum(weighted * d_columns[None, :], 1)
        # a row of its own for each program: atomic sums into one would have no fixed order
        d_part = tl.sum(weighted * b_rows[:, None], 0) * scale
        tl.store(grad_d_parts + tl.program_id(0) * rank + columns, d_part, mask=is_column)
        if WRITE_C:
            product = tile * d_columns[None, :] * (b_rows * c_scale)[:, None]
            tl.store(C + at * rank + columns[None, :], product.to(C.dtype.element_ty), mask=mask)
    tl.store(grad_b + group * out_features + rows, b_sum * scale, mask=is_row)


def launch_combined(
    B: torch.Tensor, d: torch.Tensor, b: torch.Tensor, scale: float, dtype: torch.dtype, C: torch.Tensor
) -> None:
    """Write diag(b) B diag(scale d) into C [m, r]; b [m] or [G, m]."""
    (m, r), groups = B.shape, b.numel() // B.shape[0]
    grid, sizes = (-(-m // BLOCK_ROWS), groups), (m, r // groups, B.stride(0))
    combined_kernel[grid](B, d, b, C, scale, *sizes, BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLUMNS=BLOCK_COLUMNS)


def launch_vector_gradients(
    M: torch.Tensor, B: torch.Tensor, d: torch.Tensor, b: torch.Tensor, scale: float, c_scale: float,
    dtype: torch.dtype | None, grad_d: torch.Tensor, grad_b: torch.Tensor, C: torch.Tensor,
) -> None:  # fmt: skip
    """Write ∂d [r], ∂b in b's shape, and diag(b) B diag(c_scale d) into C [m, r] unless it is empty."""
    # the second launch adds up the parts of ∂d, one for each block of rows, always in the same order
    (m, r), groups = B.shape, b.numel() // B.shape[0]
    grid, sizes = (-(-m // BLOCK_ROWS), groups), (m, r // groups, B.stride(0))
    parts = torch.empty(grid[0], r, dtype=torch.float32, device=B.device)
    vector_gradients_kernel[grid](
        M, B, d, b, grad_b, parts, C, scale, c_scale, *sizes,
        WRITE_C=C.numel() > 0, BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLUMNS=BLOCK_COLUMNS,
    )  # fmt: skip
    torch.sum(parts, 0, out=grad_d)


BACKWARD_ROWS = 64


@jit
def scaled_columns_kernel(
    x, vectors, base, out, index, scale, columns, x_stride, base_stride, vector_stride, ADD: tl.constexpr,
    INDEXED: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """out [T, k] contiguous = scale x vectors, plus base if ADD; strides in elements, row to row."""
    # row t takes the first vector, or index[t] if INDEXED; a program has BLOCK_COLUMNS columns of one row
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = at < columns
    own = tl.load(index + row) if INDEXED else 0
    vector = tl.load(vectors + own * vector_stride + at, mask=mask).to(tl.float32) * scale
    result = tl.load(x + row * x_stride + at, mask=mask).to(tl.float32) * vector
    if ADD:
        result += tl.load(base + row * base_stride + at, mask=mask).to(tl.float32)
    tl.store(out + row * columns + at, result.to(out.dtype.element_ty), mask=mask)


@jit
def scaled_columns_backward_kernel(
    g, x, vector, grad_x, grad_vector_parts, rows, columns, g_stride, x_stride, ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad_x [T, k] = g ⊙ vector, and Σ_t g_t x_t of each ROWS rows in its own row of grad_vector_parts [-, k]."""
    # a program goes through ROWS rows of BLOCK_COLUMNS columns, BLOCK_ROWS at a time
    at = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_column = at < columns
    own = tl.load(vector + at, mask=is_column, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    for start in range(0, ROWS, BLOCK_ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + start + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & is_column[None, :]
        g_tile = tl.load(g + row[:, None] * g_stride + at[None, :], mask=mask, other=0.0).to(tl.float32)
        x_tile = tl.load(x + row[:, None] * x_stride + at[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(g_tile * x_tile, 0)
        product = (g_tile * own[None, :]).to(grad_x.dtype.element_ty)
        tl.store(grad_x + row[:, None] * columns + at[None, :], product, mask=mask)
    tl.store(grad_vector_parts + tl.program_id(0).to(tl.int64) * columns + at, total, mask=is_column)


def launch_scaled_columns_backward(
    g: torch.Tensor, x: torch.Tensor, vector: torch.Tensor, grad_x: torch.Tensor, grad_vector: torch.Tensor
) -> None:
    """Write ∂vector [k] in fp32 from g and x [T, k], and g ⊙ vector into grad_x. A second launch adds up parts."""
    rows, columns = x.shape
    grid = -(-rows // BACKWARD_ROWS), -(-columns // BLOCK_COLUMNS)
    parts = torch.empty(grid[0], columns, dtype=torch.float32, device=x.device)
    scaled_columns_backward_kernel[grid](
        g, x, vector, grad_x, parts, rows, columns, g.stride(0), x.stride(0),
        ROWS=BACKWARD_ROWS, BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLUMNS=BLOCK_COLUMNS,
    )  # fmt: skip
    torch.sum(parts, 0, out=grad_vector)


def launch_scaled_columns(
    x: torch.Tensor, vectors: torch.Tensor, base: torch.Tensor | None, index: torch.Tensor | None, scale: float,
    out: torch.Tensor,
) -> None:  # fmt: skip
    """x, base and out [T, k] with dense rows, vectors [V, k], or [1, k] where there is no index int64 [T]."""
    rows, columns = x.shape
    added = x if base is None else base
    scaled_columns_kernel[(rows, -(-columns // BLOCK_COLUMNS))](
        x, vectors, added, out, out if index is None else index, scale, columns, x.stride(0), added.stride(0),
        vectors.stride(0), ADD=base is not None, INDEXED=index is not None, BLOCK_COLUMNS=BLOCK_COLUMNS,
    )  # fmt: skip


PROGRAM_WEIGHTS = 4096
"""Weights that a program dequantizes: 32 for each of its 128 threads."""


@jit
def dequantize_4bit_kernel(
    packed, absmax, code, nested_absmax, nested_code, offset, weight, count, bytes, blocks,
    NESTED_BLOCK: tl.constexpr, HALF: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Dequantize ``BLOCKS`` blocks of ``2 * HALF`` consecutive weights; ``NESTED_BLOCK`` 0 is one level only."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    present = block < blocks
    scale = tl.load(absmax + block, mask=present, other=0)
    if NESTED_BLOCK:  # the scales themselves are quantized
        outer = tl.load(nested_absmax + block // NESTED_BLOCK, mask=present, other=0.0)
        scale = tl.load(nested_code + scale.to(tl.int32)) * outer + tl.load(offset)
    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    # a byte has two neighbouring weights, the first in its upper half
    pair = tl.load(packed + byte, mask=byte < bytes, other=0).to(tl.int32)
    first = tl.load(code + (pair >> 4)) * scale[:, None]
    second = tl.load(code + (pair & 15)) * scale[:, None]
    at = block[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(weight + at, tl.interleave(first, second), mask=at < count)


def launch_dequantize_4bit(
    packed: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, nested_absmax: torch.Tensor | None,
    nested_code: torch.Tensor | None, offset: torch.Tensor | None, blocksize: int, nested_blocksize: int,
    shape: list[int], dtype: torch.dtype, weight: torch.Tensor,
) -> None:  # fmt: skip
    """Write the weight, from the parts of bitsandbytes' quantization state."""
    count, blocks, each = weight.numel(), absmax.numel(), max(1, PROGRAM_WEIGHTS // blocksize)
    if nested_absmax is None:  # the kernel doesn't read them
        nested_absmax = nested_code = offset = code
        nested_blocksize = 0
    if count:
        dequantize_4bit_kernel[(-(-blocks // each),)](
            packed.view(torch.uint8), absmax, code, nested_absmax, nested_code, offset, weight,
            count, (count + 1) // 2, blocks, NESTED_BLOCK=nested_blocksize, HALF=blocksize // 2, BLOCKS=each,
            enable_fp_fusion=False,  # rounded where bitsandbytes rounds
        )  # fmt: skip


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
    h = (wide * scale).to(stored.dtype).to(tl.float32)  # rounded here, as transformers does
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
    silu = (wide * tl.sigmoid(wide)).to(stored.dtype).to(tl.float32)  # rounded here, as transformers does
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
    source, target, batch, token, first, tokens, heads, s_batch, s_head, s_token, cos1, cos2, sin1, sin2, half,
    BACKWARD: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
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
    q, k, cos, sin, q_out, k_out, tokens, q_heads, k_heads, half, q_batch, q_head, q_token, k_batch, k_head, k_token,
    c_batch, c_token, s_batch, s_token, BACKWARD: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
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


def _warps(elements: int) -> int:
    """Warps for a row of this many elements: 16 elements a thread, up to 512 threads."""
    return max(1, min(16, elements // 512))


def launch_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, y: torch.Tensor, factor: torch.Tensor) -> None:
    """Write y [..., n] and ``factor`` [..., 1]."""
    width, block = x.shape[-1], triton.next_power_of_2(x.shape[-1])
    if rows := factor.numel():
        rms_norm_kernel[(rows,)](x.contiguous(), weight, y, factor, width, eps, BLOCK=block, num_warps=_warps(block))


def launch_rms_norm_backward(
    g: torch.Tensor, x: torch.Tensor, factor: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor
) -> None:
    """Write ∂x to ``grad``."""
    width, block = x.shape[-1], triton.next_power_of_2(x.shape[-1])
    if rows := factor.numel():
        tensors = g.contiguous(), x.contiguous(), factor, weight, grad
        rms_norm_backward_kernel[(rows,)](*tensors, width, BLOCK=block, num_warps=_warps(block))


def launch_swiglu(a: torch.Tensor, c: torch.Tensor, y: torch.Tensor) -> None:
    """Write y = silu(a) c."""
    if count := a.numel():
        swiglu_kernel[(-(-count // SWIGLU_BLOCK),)](a.contiguous(), c.contiguous(), y, count, BLOCK=SWIGLU_BLOCK)


def launch_swiglu_backward(
    g: torch.Tensor, a: torch.Tensor, c: torch.Tensor, grad_a: torch.Tensor, grad_c: torch.Tensor
) -> None:
    """Write ∂a and ∂c."""
    if count := a.numel():
        inputs = (tensor.contiguous() for tensor in (g, a, c))
        swiglu_backward_kernel[(-(-count // SWIGLU_BLOCK),)](*inputs, grad_a, grad_c, count, BLOCK=SWIGLU_BLOCK)


def launch_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backward: bool, q_out: torch.Tensor,
    k_out: torch.Tensor,
) -> None:  # fmt: skip
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
            BACKWARD=backward, BLOCK_HEADS=ROPE_HEADS, BLOCK_HALF=triton.next_power_of_2(half),
        )  # fmt: skip


LOGITS_BLOCK = 4096


@jit
def _logit(x, at, inside, scale, cap, CAPPED: tl.constexpr):
    """z and, if CAPPED, tanh(scale x / cap), which is z / cap."""
    z = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * scale
    bent = z
    if CAPPED:
        bent = 2.0 * tl.sigmoid(2.0 * z / cap) - 1.0  # tanh
        z = bent * cap
    return z, bent


@jit
def logit_sums_kernel(
    x, most, sums, means, width, row_stride, scale, cap, CAPPED: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """max z and Σ exp(z - max z) of one row of x [rows, width] a program, in fp32, and the mean of z if MEAN."""
    row = tl.program_id(0).to(tl.int64)
    largest, total, sum_of_all = -3.4028234e38, 0.0, 0.0  # no infinity: its difference to one would be NaN
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < width
        z, _ = _logit(x + row * row_stride, at, inside, scale, cap, CAPPED)
        if MEAN:
            sum_of_all += tl.sum(tl.where(inside, z, 0.0), axis=0)
        z = tl.where(inside, z, float("-inf"))
        # one pass: the sum so far is brought to the new maximum
        now = tl.maximum(largest, tl.max(z, axis=0))
        total = total * tl.exp(largest - now) + tl.sum(tl.exp(z - now), axis=0)
        largest = now
    tl.store(most + row, largest)
    tl.store(sums + row, total)
    if MEAN:
        tl.store(means + row, sum_of_all / width)


@jit
def logit_gradient_kernel(
    x, most, sums, factor, width, row_stride, spread, scale, cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write factor (softmax(z) - spread) ∂z/∂x over BLOCK columns of one row of x."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    z, bent = _logit(x + row * row_stride, at, inside, scale, cap, CAPPED)
    share = tl.exp(z - tl.load(most + row)) / tl.load(sums + row)
    grad = tl.load(factor + row) * (share - spread) * scale
    if CAPPED:
        grad *= 1.0 - bent * bent
    tl.store(x + row * row_stride + at, grad.to(x.dtype.element_ty), mask=inside)


def launch_logit_sums(
    x: torch.Tensor, scale: float, cap: float, mean: bool, most: torch.Tensor, sums: torch.Tensor, means: torch.Tensor
) -> None:
    """Write max z and Σ exp(z - max z) [n, 1] of the rows of x [n, V], and the mean of z if asked for. No cap: 0."""
    if len(x):
        block = min(LOGITS_BLOCK, triton.next_power_of_2(x.shape[1]))
        logit_sums_kernel[(len(x),)](
            x, most, sums, means, x.shape[1], x.stride(0), float(scale), cap or 1.0,
            CAPPED=cap != 0.0, MEAN=mean, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip


def launch_logit_gradient(
    x: torch.Tensor, most: torch.Tensor, sums: torch.Tensor, factor: torch.Tensor, spread: float, scale: float,
    cap: float,
) -> None:  # fmt: skip
    """Write the gradient over x [n, V]; the others fp32 [n, 1]."""
    if len(x):
        block = min(LOGITS_BLOCK, triton.next_power_of_2(x.shape[1]))
        logit_gradient_kernel[(len(x), -(-x.shape[1] // block))](
            x, most, sums, factor.contiguous(), x.shape[1], x.stride(0), spread, float(scale), cap or 1.0,
            CAPPED=cap != 0.0, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
