"""Tiny mixtures of experts of fourteen classes, and the dense model in fp64 that they are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from qvera.adapters.layer import QveraLinear, adapted_layers
from qvera.adapters.tuner import QveraExperts
from qvera.models import quantization
from qvera.models.experts import ExpertStack
from qvera.models.structure import share_tied_modules
from tests.conftest import small_tokenizer

_COMMON: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 304, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.1, "num_experts_per_tok": 2,
}  # fmt: skip
_NARROW = {"head_dim": 16, "moe_intermediate_size": 64}
_ROUTED = {**_NARROW, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
CLASSES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {**_NARROW, "num_experts": 4},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "sliding_window": 64},
    "deepseek_v3": {
        "moe_intermediate_size": 64, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
        "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "glm4_moe": {**_ROUTED, "first_k_dense_replace": 1},
    "granitemoe": {"num_local_experts": 4},
    "lfm2_moe": {
        "num_experts": 4, "moe_intermediate_size": 64, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"],
    },
    "olmoe": {"num_experts": 4},
    "qwen3_5_moe_text": {
        **_NARROW, "num_experts": 4, "shared_expert_intermediate_size": 64,
        "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2, "linear_num_key_heads": 2,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    },
    "llama4_text": {
        "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1,
        "intermediate_size_mlp": 128, "layer_types": ["full_attention", "full_attention"], "no_rope_layers": [1, 1],
    },
    "nemotron_h": {
        **_ROUTED, "moe_shared_expert_intermediate_size": 64, "layers_block_type": ["attention", "moe"],
        "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1,
    },
    "dbrx": {
        "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "jetmoe": {"num_local_experts": 4, "kv_channels": 16, "num_attention_heads": 4},
    "longcat_flash": {
        "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
        "num_key_value_heads": 4, "num_layers": 2, "ffn_hidden_size": 128, "head_dim": 8, "moe_topk": 2,
        "n_routed_experts": 4, "zero_expert_num": 2, "expert_ffn_hidden_size": 64,
    },
}  # fmt: skip
"""Model type → the config beside what is common. gpt-oss has biases, it and Llama 4 transposed weights, nemotron_h no gate,
DBRX three matrices for each expert, JetMoE experts in its attention, LongCat-Flash experts without weights."""
_OF_ITS_OWN = {
    "dbrx": {"num_hidden_layers", "num_attention_heads", "hidden_size"},
    "longcat_flash": {"num_hidden_layers"},
}
"""What these call otherwise."""


def write(name: str, directory: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A random checkpoint, as transformers saves it: of single experts, or of stacked ones."""
    torch.manual_seed(0)
    common = {key: value for key, value in _COMMON.items() if key not in _OF_ITS_OWN.get(name, ())}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name, **{**common, **CLASSES.get(name, {}), **changes})
    )
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("bias", "gate.weight")) or "expert" in key or "router" in key:
                parameter.normal_(std=0.1)
    model.to(dtype).save_pretrained(directory)
    small_tokenizer().save_pretrained(directory)
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
