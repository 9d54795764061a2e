"""Quantize weights to packed 4-bit values on a CPU, bit-equal to bitsandbytes and faster (bench/quantize.py).

The arithmetic is that of bitsandbytes' CPU `quantize_4bit` (QLoRA, arXiv 2305.14314, section 3; bitsandbytes
`backends/default/ops.py`), in the same order and in fp32. For a block of 64 weights

    a = max |w|        s = w · (1 / max(a, 1e-38))        rank = number of thresholds below s

with thresholds halfway between neighbouring values of the code; a last block of fewer than 64 divides by a instead. It
is faster by chunks that stay in the cache, maxima taken over the bits, and thresholds counted in vector instructions.
numpy's loops stay on the calling thread, so that a caller can spread blocks over threads.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch

from qvera.models.quantization import bnb_functional

BLOCK = 64
"""Weights that share one scale."""
CHUNK = 2048 * BLOCK
"""Weights worked on at a time: 512 KiB in fp32, what a core's second-level cache holds."""
_SMALLEST = np.float32(1e-38)


class _Code(NamedTuple):
    thresholds: np.ndarray
    """fp32 [15], ascending."""
    lowest: np.uint8
    """The nibble of a value below all thresholds."""
    steps: np.ndarray
    """uint8 [15]: what each threshold passed adds to the nibble, modulo 256; all 1 for NF4, whose nibbles are ranks."""


@functools.cache
def _code(quant_type: str) -> _Code:
    values = bnb_functional.get_4bit_type(quant_type, device="cpu")
    order = torch.argsort(values)  # as bitsandbytes does it, ties (FP4 has two zeros) included
    nibbles = order.numpy().astype(np.uint8)
    return _Code(((values[order[:-1]] + values[order[1:]]) / 2).numpy(), nibbles[0], np.diff(nibbles))


class _Scratch:
    def __init__(self, size: int, bits: np.dtype) -> None:
        self.scaled = np.empty(size, np.float32)
        self.above = np.empty(size, np.bool_)
        self.nibble = np.empty(size, np.uint8)
        self.one, self.other = np.empty(size // 2, np.uint16), np.empty(size // 2, np.uint16)
        self.maxima = np.empty(size, bits), np.empty(size, bits)


def _widen(bits: np.ndarray, dtype: torch.dtype, out: np.ndarray) -> None:
    """Write values that are given by their bits to ``out`` as fp32."""
    if dtype is torch.bfloat16:
        wide = out.view(np.uint32)
        wide[...] = bits.view(np.uint16)
        np.left_shift(wide, 16, out=wide)
    elif dtype is torch.float16:
        out[...] = bits.view(np.float16)
    else:
        out[...] = bits.view(np.float32)


def _block_maxima(bits: np.ndarray, dtype: torch.dtype, scratch: _Scratch, absmax: np.ndarray) -> None:
    """Without their sign, floating-point numbers are ordered as their bits are (NaN above Inf)."""
    size = bits.size
    held, next_ = (buffer[:size] for buffer in scratch.maxima)
    np.bitwise_and(bits, np.iinfo(bits.dtype).max, out=held)
    for step in (1, 2, 4, 8, 16, 32):  # afterwards element i is the maximum of the 64 from i on
        size -= step
        np.maximum(held[:size], held[step : size + step], out=next_[:size])
        held, next_ = next_, held
    _widen(np.ascontiguousarray(held[: size + 63 : BLOCK]), dtype, absmax)


def _pack(scaled: np.ndarray, code: _Code, scratch: _Scratch, packed: np.ndarray) -> None:
    """An even number of scaled weights → two nibbles a byte, the first one high."""
    size = scaled.size
    nibble, above = scratch.nibble[:size], scratch.above[:size]
    ones = above.view(np.uint8)
    nibble[...] = code.lowest
    for threshold, step in zip(code.thresholds, code.steps, strict=True):
        np.greater(scaled, threshold, out=above)
        if step != 1:
            np.multiply(ones, step, out=ones)
        np.add(nibble, ones, out=nibble)
    pairs, one, other = nibble.view("<u2"), scratch.one[: size // 2], scratch.other[: size // 2]
    np.left_shift(pairs, 4, out=one)
    np.right_shift(pairs, 8, out=other)
    np.bitwise_or(one, other, out=one)
    np.copyto(packed, one, casting="unsafe")


def pack(weights: torch.Tensor, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a contiguous CPU tensor of n weights (bf16, fp16 or fp32) as one flat row, on this thread.

    A tensor can come in parts, each but the last of a multiple of 64 weights. Returns packed nibbles uint8 [⌈n/2⌉] and
    absmax fp32 [⌈n/64⌉], which is NaN or Inf for a block that has one.
    """
    dtype, code = weights.dtype, _code(quant_type)
    bits = weights.detach().reshape(-1).view(torch.int16 if dtype.itemsize == 2 else torch.int32).numpy()
    packed, absmax = np.empty(-(-bits.size // 2), np.uint8), np.empty(-(-bits.size // BLOCK), np.float32)
    whole = bits.size - bits.size % BLOCK
    scratch = _Scratch(min(whole, CHUNK), bits.dtype)
    with np.errstate(all="ignore"):  # NaN and Inf are the caller's to find, in absmax
        for start in range(0, whole, CHUNK):
            part = bits[start : min(start + CHUNK, whole)]
            scales, scaled = absmax[start // BLOCK :][: part.size // BLOCK], scratch.scaled[: part.size]
            _block_maxima(part, dtype, scratch, scales)
            _widen(part, dtype, scaled)
            rows, factor = scaled.reshape(-1, BLOCK), np.float32(1.0) / np.maximum(scales, _SMALLEST)
            np.multiply(rows, factor[:, None], out=rows)
            _pack(scaled, code, scratch, packed[start // 2 :][: part.size // 2])
        if rest := bits.size - whole:  # of a last block, which divides, and may have an odd number of weights
            scaled = np.zeros(rest + rest % 2, np.float32)
            values = scaled[:rest]
            _widen(bits[whole:], dtype, values)
            absmax[-1] = np.maximum(np.abs(values).max(), _SMALLEST)
            np.divide(values, absmax[-1], out=values)
            _pack(scaled, code, _Scratch(scaled.size, bits.dtype), packed[whole // 2 :])
    return torch.from_numpy(packed), torch.from_numpy(absmax)
