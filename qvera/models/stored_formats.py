"""Weights that a checkpoint stores in 4 or 8 bits of another kind: gpt-oss's MXFP4 and FP8 with scales.

They are decoded to bfloat16, one expert or block of rows at a time, on their way into bitsandbytes' 4 bits. A decoded
MXFP4 value is exact in bfloat16; one of FP8 is rounded to its 8 bits of precision.

MXFP4 (Open Compute Project, Microscaling Formats v1.0): ``NAME_blocks`` uint8 [E, m, n / 32, 16] holds two e2m1 values
a byte, the first in the lower half; ``NAME_scales`` uint8 [E, m, n / 32] an exponent for each 32, biased by 127.

FP8: NAME float8_e4m3fn [m, n] beside ``NAME_scale_inv`` (a factor for each block, DeepSeek-V3) or ``NAME_scale`` (one
factor, or one a row).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from qvera.utils.safetensors_io import TensorEntry, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

DECODED = ("mxfp4", "fp8")
"""transformers' ``quant_method`` of the checkpoints that are decoded."""
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS = 127
_SCALES = ("_scale_inv", "_scale")


def is_decoded(stored: Any) -> bool:
    """Whether weights of a config's ``quantization_config`` are decoded here."""
    stored = stored if isinstance(stored, dict) or stored is None else stored.to_dict()
    return (stored or {}).get("quant_method") in DECODED


def from_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """blocks uint8 [m, G, 16] and scales uint8 [m, G] give bfloat16 [m, 32 G]."""
    values = torch.tensor([*_E2M1, *(-value for value in _E2M1)], dtype=torch.float32)
    pairs = torch.stack([values[(blocks & 15).int()], values[(blocks >> 4).int()]], dim=-1)  # [m, G, 16, 2]
    decoded = torch.ldexp(pairs.flatten(2), scales.int().unsqueeze(-1) - _BIAS)
    return decoded.flatten(1).to(torch.bfloat16)


class Mxfp4Stack:
    """A stack of experts [E, .., ..] in MXFP4: like `qvera.models.conversion.FusedTensor`."""

    is_merged = False

    def __init__(self, name: str, shape: tuple[int, ...], blocks: TensorEntry, scales: TensorEntry) -> None:
        self.spec = TensorSpec(name, torch.bfloat16, shape)
        self.sources = {"blocks": [blocks], "scales": [scales]}

    def part(self, number: int, read: Callable[[TensorEntry, int | None], torch.Tensor]) -> torch.Tensor:
        """An expert's matrix, as the model has it: gpt-oss has it turned."""
        blocks, scales = (read(self.sources[kind][0], number) for kind in ("blocks", "scales"))
        matrix = from_mxfp4(blocks, scales)
        return matrix if tuple(matrix.shape) == self.spec.shape[1:] else matrix.t().contiguous()


def mxfp4_stacks(entries: Sequence[TensorEntry], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Mxfp4Stack]:
    """The stacks in MXFP4 among a checkpoint's tensors. ``shapes``: of the model's stacks by name."""
    stored = {entry.name: entry for entry in entries}
    found = {}
    for name, shape in shapes.items():
        blocks, scales = stored.get(f"{name}_blocks"), stored.get(f"{name}_scales")
        if blocks is not None and scales is not None and 2 * blocks.numel == math.prod(shape):
            found[name] = Mxfp4Stack(name, shape, blocks, scales)
    return found


def fp8_factors(entries: Sequence[TensorEntry]) -> dict[str, TensorEntry]:
    """Name of a tensor in FP8 → the tensor of its factors."""
    stored = {entry.name: entry for entry in entries}
    candidates = ((entry.name, [f"{entry.name}{end}" for end in _SCALES]) for entry in entries if is_fp8(entry.dtype))
    return {name: stored[key] for name, keys in candidates for key in keys[::-1] if key in stored}


def is_fp8(dtype: torch.dtype) -> bool:
    """Whether a dtype is FP8."""
    return dtype in (torch.float8_e4m3fn, torch.float8_e5m2)


def from_fp8(rows: torch.Tensor, factors: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """Rows [first, first + k) of a weight of ``count`` rows, FP8 [k, n], times their factors: bfloat16 [k, n].

    Of a stack of experts the rows are those of all experts, one after the other, and ``count`` is that of one.
    """
    factors = factors.float()
    if factors.dim() < 2:
        factors = factors.view(-1, 1)
    # a factor for each block of rows and columns; blocks at the end may be short
    blocks = factors.shape[-2]
    high, wide = -(-count // blocks), -(-rows.shape[1] // factors.shape[-1])
    high, wide = (2 ** math.ceil(math.log2(size)) if size > 1 else 1 for size in (high, wide))
    high = count if blocks == 1 else high
    numbers = torch.arange(first, first + len(rows))
    numbers = numbers // count * blocks + numbers % count // high
    spread = factors.flatten(0, -2)[numbers].repeat_interleave(wide, 1)
    return (rows.float() * spread[:, : rows.shape[1]]).to(torch.bfloat16)
