"""Frozen layers of every kind that QVERA adapts, their dense weights read in a second way, and vectors away from zero."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qvera.adapters.files.save_load import named_vectors
from qvera.models import linear

IN, OUT = 64, 96

KINDS = (
    "linear",
    "linear-nobias",
    "conv1d",
    "int8",
    *(f"{q}{dq}-{s}" for q in ("nf4", "fp4") for dq in ("", "+dq") for s in ("uint8", "bfloat16")),
)
FOUR_BIT = tuple(k for k in KINDS if k[:3] in ("nf4", "fp4"))


def base_layer(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, freeze: bool = True) -> Any:
    """One frozen layer [OUT, IN] computing in ``dtype``, with a bias unless its kind says otherwise."""
    torch.manual_seed(seed)
    weight, bias = torch.randn(OUT, IN) / IN**0.5, torch.randn(OUT)
    layer: Any
    if kind == "conv1d":
        layer = Conv1D(OUT, IN).to(dtype)
        layer.weight.data = weight.t().contiguous().to(dtype)
        layer.bias.data = bias.to(dtype)
    elif kind.startswith("linear"):
        layer = nn.Linear(IN, OUT, bias=kind == "linear").to(dtype)
        layer.weight.data = weight.to(dtype)
        if layer.bias is not None:
            layer.bias.data = bias.to(dtype)
    elif kind == "int8":
        layer = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight.to(torch.float16), requires_grad=False, has_fp16_weights=False)
        layer.bias.data = bias.to(dtype)
        layer = layer.to("cpu")
    else:
        quant, storage = kind.split("-")
        layer = bnb.nn.Linear4bit(
            IN,
            OUT,
            compute_dtype=dtype,
            compress_statistics=quant.endswith("+dq"),
            quant_type=quant[:3],
            quant_storage=getattr(torch, storage),
        )
        layer.weight = bnb.nn.Params4bit(
            weight.to(dtype),
            requires_grad=False,
            compress_statistics=quant.endswith("+dq"),
            quant_type=quant[:3],
            quant_storage=getattr(torch, storage),
            module=layer,
        )
        layer.bias.data = bias.to(dtype)
        layer = layer.to("cpu")
        assert layer.weight.quant_state is not None
        assert layer.weight.dtype == getattr(torch, storage)
    if freeze:
        linear.freeze_linears(layer)
    return layer.requires_grad_(False).eval()


def dense_weight(layer: Any) -> torch.Tensor:
    """[OUT, IN] in fp64, read from the stored tensors by bitsandbytes' own functions, not by qvera."""
    if isinstance(layer, Conv1D):
        return layer.weight.data.t().double()
    if isinstance(layer, bnb.nn.Linear4bit):
        dense = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        return dense.to(layer.compute_dtype).double()
    if isinstance(layer, bnb.nn.Linear8bitLt):
        rows = layer.weight.CB if layer.weight.CB is not None else layer.state.CB
        scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        return rows.double() * scales.double()[:, None] / 127
    return layer.weight.data.double()


def perturb(model: nn.Module, seed: int = 1, size: float = 0.3, adapter: str = "default") -> None:
    """Give every vector of an adapter values away from its initial ones, so that nothing regenerated passes for loaded."""
    generator = torch.Generator().manual_seed(seed)
    vectors = named_vectors(model, adapter)
    assert vectors
    with torch.no_grad():
        for vector in vectors.values():
            vector.add_(size * torch.randn(vector.shape, generator=generator))


def weight_bytes(layer: Any) -> bytes:
    """The stored bytes of a layer's weight, whatever their dtype."""
    return layer.weight.data.contiguous().view(torch.uint8).numpy().tobytes()


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the expected."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
