"""Tiny mixtures of experts of fourteen classes, and the dense model in fp64 that they are compared with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from qvera.adapters.layer import QveraLinear, adapted_layers
from qvera.adapters.tuner import QveraExperts
from qvera.models import quantization
from qvera.models.experts import ExpertStack
from qvera.models.structure import share_tied_modules
from tests.families import FAMILIES

CLASSES = (
    "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "glm4_moe", "granitemoe", "lfm2_moe", "olmoe", "qwen3_5_moe_text",
    "llama4_text", "nemotron_h", "dbrx", "jetmoe", "longcat_flash",
)  # fmt: skip
"""gpt-oss has biases, it and Llama 4 transposed weights, nemotron_h no gate, DBRX three matrices for each expert, JetMoE
experts in its attention, LongCat-Flash experts without weights."""


def write(name: str, directory: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """The random checkpoint of its family, as transformers saves it: of single experts, or of stacked ones."""
    family = FAMILIES[name]
    dataclasses.replace(family, changes={**family.changes, **changes}).write(directory, dtype)
    return directory


def delta(layer: QveraLinear, vectors: dict[str, torch.Tensor]) -> torch.Tensor:
    """ΔW in fp64 with autograd in the vectors: [m, n], or of experts [E, m, n] as the file has their weights."""
    factors, d, b, a = layer.parts("default"), *(vectors.get(f"qvera_{kind}") for kind in "dba")
    if "qvera_A" in vectors:  # a LoRA
        change = factors.scale * vectors["qvera_B"] @ vectors["qvera_A"]
        return change.transpose(-2, -1) if change.dim() == 3 and layer.base_layer.spec.is_transposed else change
    A, B = factors.A.double(), factors.B.double()
    assert d is not None
    assert b is not None

    def one(d: torch.Tensor, b: torch.Tensor, a: torch.Tensor | None) -> torch.Tensor:
        groups = zip(torch.atleast_2d(b), B.chunk(len(torch.atleast_2d(b)), 1), strict=True)
        change = factors.scale * (torch.cat([own[:, None] * columns for own, columns in groups], 1) * d) @ A
        return change if a is None else change * a

    if not isinstance(layer, QveraExperts):
        return one(d, b, a)
    each = [one(*((None if v is None else v[e]) for v in (d, b, a))) if d.dim() == 2 else one(d, b, a)
            for e in range(layer.spec.experts)]  # fmt: skip
    stacked = torch.stack(each)
    return stacked.transpose(1, 2) if layer.base_layer.spec.is_transposed else stacked


def published(directory: Path) -> Any:
    """A checkpoint as plain transformers opens it, in fp32, by the class that its config names: no tensor is left over."""
    (name,) = AutoConfig.from_pretrained(directory).architectures
    plain, info = getattr(transformers, name).from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    if name == "Llama4ForConditionalGeneration":  # transformers 5.24 reads this of its text model, which has none
        plain.language_model.register_forward_hook(lambda module, given, out: setattr(out, "image_outputs", None))
    return plain.eval()


def dense_base(model: Any, directory: Path) -> Any:
    """Plain transformers in fp64 on the quantized W of a model."""
    plain = published(directory).double().requires_grad_(False)
    share_tied_modules(plain)
    if hasattr(plain.config, "_experts_implementation"):
        plain.set_experts_implementation("eager")
    for name, module in model.get_base_model().named_modules():
        name = name.replace(".base_layer", "")
        if isinstance(module, quantization.Linear4bit):
            own, weight = plain.get_submodule(name), quantization.dequantized_weight(module, torch.float32)
            own.weight.data.copy_(weight.t() if isinstance(own, Conv1D) else weight)
        elif isinstance(module, ExpertStack):
            own = plain.get_parameter(name)
            own.data.copy_(module.dense(0, module.spec.experts, torch.float32).view_as(own))
    return plain


def add_delta(model: Any, plain: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Put W + ΔW of a model's adapter into its `dense_base`; the leaves of the vectors, by layer."""
    leaves = {}
    for layer in adapted_layers(model):
        vectors = {kind: v.detach().double().requires_grad_() for kind, v in layer.vectors("default").items()}
        leaves[layer.spec.name] = vectors
        is_stack = isinstance(layer, QveraExperts)
        path, _, key = (layer.spec.name if is_stack else f"{layer.spec.name}.weight").rpartition(".")
        owner = plain.get_submodule(path)
        weight, change = owner._parameters.pop(key), delta(layer, vectors)
        change = change.t() if isinstance(owner, Conv1D) else change.reshape(weight.shape)
        setattr(owner, key, weight.data + change)
    return leaves


def dense_twin(model: Any, directory: Path) -> tuple[Any, dict[str, dict[str, torch.Tensor]]]:
    """`dense_base` with the model's adapter, and the leaves of its vectors."""
    plain = dense_base(model, directory)
    return plain, add_delta(model, plain)
