"""Layers of every kind that QVERA adapts, and what they should compute, read and written out in a second way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from qvera.adapters import QveraConfig, QveraLinear, SharedProjection
from qvera.adapters.projection import uniform_pair
from qvera.adapters.save_load import named_vectors
from qvera.models import linear
from tests.device import DEVICE

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
        layer = layer.to(DEVICE)
    else:
        quant, storage = kind.split("-")
        settings = {"compress_statistics": quant.endswith("+dq"), "quant_type": quant[:3]}
        settings["quant_storage"] = getattr(torch, storage)
        layer = bnb.nn.Linear4bit(IN, OUT, compute_dtype=dtype, **settings)
        layer.weight = bnb.nn.Params4bit(weight.to(dtype), requires_grad=False, module=layer, **settings)
        layer.bias.data = bias.to(dtype)
        layer = layer.to(DEVICE)
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


IDS = torch.tensor([[5, 9, 200, 31, 7, 150, 42, 3], [8, 8, 30, 1, 99, 4, 250, 6]])


def logits(model: Any, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS.to(DEVICE), **kwargs).logits


def perturb(model: Any, seed: int = 1, size: float = 0.3, adapter: str = "default") -> Any:
    """Give every vector of an adapter values away from its initial ones, so that nothing regenerated passes for loaded."""
    generator = torch.Generator().manual_seed(seed)
    vectors = named_vectors(model, adapter)
    assert vectors
    for vector in vectors.values():
        if vector.is_floating_point():  # not places
            vector.data.add_(size * torch.randn(vector.shape, generator=generator))
    return model


def edit_config(directory: Path, **changes: Any) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def weight_bytes(layer: Any) -> bytes:
    """The stored bytes of a layer's weight, whatever their dtype."""
    return layer.weight.data.contiguous().view(torch.uint8).cpu().numpy().tobytes()


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the expected."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


# The formula in double precision

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def parts(
    T: int, n: int, m: int, r: int, seed: int = 0, groups: int = 1, scaled: bool = False
) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    found = {"x": normal(T, n), "W": normal(m, n), "A": normal(r, n), "B": normal(m, r), "d": normal(r)}
    found["b"] = normal(m) if groups == 1 else normal(groups, m)
    return {**found, "a": normal(n)} if scaled else found


def summed_weight(p: dict[str, torch.Tensor], scale: float) -> torch.Tensor:
    """W + Σ Λ_b B Λ_d A Λ_a over the groups (VeRA, equation 2)."""
    weight, each = p["W"], p["b"].view(-1, len(p["W"]))
    width = len(p["d"]) // len(each)
    for g, own in enumerate(each):
        k = slice(g * width, (g + 1) * width)
        delta = torch.diag(own) @ p["B"][:, k] @ torch.diag(scale * p["d"][k]) @ p["A"][k]
        weight = weight + (delta @ torch.diag(p["a"]) if "a" in p else delta)
    return weight


def textbook(p: dict[str, torch.Tensor], scale: float, upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    """y = x (W + ΔW)ᵀ and the gradients of x, d, b and a, by autograd through the plain product."""
    leaves = {k: p[k].clone().requires_grad_() for k in "xdba" if k in p}
    y = leaves["x"] @ summed_weight({**p, **leaves}, scale).t()
    y.backward(upstream)
    return {"y": y.detach(), **{k: leaf.grad for k, leaf in leaves.items() if leaf.grad is not None}}


def rounded(p: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Operands as a layer of this dtype sees them, back in fp64: x, W, A and B rounded; the vectors in fp32 or wider."""
    vector = torch.promote_types(dtype, torch.float32)
    return {k: v.to(vector if k in "dba" else dtype).double() for k, v in p.items()}


# One adapted layer

RANK = 12


def adapted(
    kind: str,
    dtype: torch.dtype = torch.float32,
    rank: int = RANK,
    dropout: float = 0.0,
    freeze: bool = True,
    groups: int = 1,
    scaled: bool = False,
) -> QveraLinear:
    base = base_layer(kind, dtype, freeze=freeze)
    linear.freeze_linears(base)
    projection = SharedProjection(3, DEVICE, dtype)
    projection.ensure(rank + 5, IN + 9, OUT + 2)  # larger than this layer, as in a model
    config = QveraConfig(rank=rank, b_groups=groups, input_scale=scaled, projection_seed=3, dropout=dropout)
    layer = QveraLinear(base, "default", projection, config)
    perturb(layer)
    return layer


def exact_parts(layer: QveraLinear, dtype: torch.dtype, adapter: str = "default") -> dict[str, torch.Tensor]:
    """W, A, B and an adapter's vectors in fp64, the pair drawn anew and with its Kaiming bounds in A."""
    rank = layer.parts(adapter).rank
    A, B = (torch.from_numpy(matrix).to(DEVICE, dtype).double() for matrix in uniform_pair(rank, IN, OUT, 3))
    vectors = {name.removeprefix("qvera_"): v.detach().double() for name, v in layer.vectors(adapter).items()}
    return {"W": dense_weight(layer.base_layer), "A": (6 / IN) ** 0.5 * (6 / rank) ** 0.5 * A, "B": B, **vectors}


def reference(layer: QveraLinear, x: torch.Tensor, upstream: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """As `run`, by the formula in fp64."""
    base: Any = layer.base_layer
    found = textbook({**exact_parts(layer, dtype), "x": x.detach().double()}, 1.0, upstream.double())
    if base.bias is not None:
        found["y"] += base.bias.double()
    return [found[name] for name in ("y", "x", "b", "d", "a") if name in found]


def run(layer: QveraLinear, x: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of x and of each vector."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(upstream)
    grads = [x.grad, *(vector.grad for vector in layer.vectors("default").values())]
    assert all(g is not None for g in grads)
    return [y.detach(), *(g.clone() for g in grads if g is not None)]


# Real shapes, on the meta device


def _shape(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": heads, "num_key_value_heads": kv_heads, **more}


SHAPES = {
    "LLaMA-7B": _shape(4096, 11008, 32, 32, 32),
    "LLaMA-13B": _shape(5120, 13824, 40, 40, 40),
    "Llama-3-8B": _shape(4096, 14336, 32, 32, 8, vocab_size=128256),
    "Llama-3.2-1B": _shape(2048, 8192, 16, 32, 8, head_dim=64, vocab_size=128256, tie_word_embeddings=True),
    "SmolLM2-135M": _shape(576, 1536, 30, 9, 3, vocab_size=49152, tie_word_embeddings=True),
}


def on_meta(name: str, **changes: Any) -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**{**SHAPES[name], **changes})).requires_grad_(False)


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
