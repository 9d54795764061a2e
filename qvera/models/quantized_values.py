"""The values of a weight as a quantized base holds them: quantized by bitsandbytes, and dequantized again."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qvera.config.schema import ModelSection
from qvera.models import quantization
from qvera.models.quantization import bnb_functional


def quantize_dequantize(weight: torch.Tensor, section: ModelSection) -> torch.Tensor:
    """A 16-bit weight [m, n] as the quantized base holds it: quantized as the recipe says, and dequantized again."""
    return quantized_reader(weight, section)()


def quantized_reader(weight: torch.Tensor, section: ModelSection) -> Callable[[], torch.Tensor]:
    """Quantize a weight [m, n] as the recipe says; each call of what is returned dequantizes it to its dtype."""
    dtype = weight.dtype
    if section.quantization == "none":
        return lambda: weight
    if section.quantization == "int8":
        rows, scales, _ = bnb_functional.int8_vectorwise_quant(weight.to(torch.float16))
        return lambda: quantization.dequantized_int8(rows, scales, dtype)
    packed, state = bnb_functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=section.double_quant, quant_type=section.quantization
    )
    return lambda: quantization.dequantized_packed(packed, state)


def double_quantized_absmax(absmax: torch.Tensor) -> torch.Tensor:
    """The absolute maxima of a whole weight's blocks, fp32 [blocks], double quantized and dequantized again."""
    offset = absmax.mean()
    packed, state = bnb_functional.quantize_blockwise(absmax - offset, blocksize=256)
    return bnb_functional.dequantize_blockwise(packed, state) + offset


def quantize_dequantize_blocks(
    weight: torch.Tensor, absmax: torch.Tensor, quant_type: str, dtype: torch.dtype
) -> torch.Tensor:
    """`quantize_dequantize` of whole blocks of 64 elements to ``dtype``, with one ``absmax`` for each block."""
    packed, state = bnb_functional.quantize_4bit(weight, blocksize=64, compress_statistics=False, quant_type=quant_type)
    state.absmax, state.dtype = absmax.contiguous(), dtype
    return quantization.dequantized_packed(packed, state)
