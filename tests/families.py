"""The model families that docs/models.md lists: a tiny random checkpoint of each, and what is expected of it.

`python -m tests.families` writes the table of that page.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import AutoConfig

from bench.common import with_table
from qvera.exporting import gguf_metadata as gguf_families
from tests.conftest import small_tokenizer
from tests.tasks.images import image_processor

_ROOT = Path(__file__).resolve().parent.parent
PAGE = _ROOT / "docs" / "models.md"
RESULTS = _ROOT / "bench" / "results" / "architectures.json"
"""What `python -m tests.architectures --write` found."""
RIGHT = "right"

_COMMON: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 304, "max_position_embeddings": 128, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1,
}  # fmt: skip
_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_SEVEN = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
_ATTENTION = "q_proj k_proj v_proj o_proj"
_LATENT_ATTENTION = "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj"
_MLP = "gate_proj up_proj down_proj"
_IN_PROJ = "in_proj_qkv in_proj_z in_proj_b in_proj_a"
_PER_LAYER = "per_layer_input_gate per_layer_projection per_layer_model_projection"
_NEOX = "query_key_value dense dense_h_to_4h dense_4h_to_h"
_HEADS: dict[str, Any] = {"head_dim": 16}
_WINDOW: dict[str, Any] = {"sliding_window": 64}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
_LOCAL_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_NARROW: dict[str, Any] = {"moe_intermediate_size": 64}
_ROUTED: dict[str, Any] = {
    "moe_intermediate_size": 64, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_LATENT: dict[str, Any] = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
_INDEXED: dict[str, Any] = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 16}
_DENSE_FIRST: dict[str, Any] = {"mlp_layer_types": ["dense", "sparse"]}
_MAMBA: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_state": 16, "mamba_chunk_size": 8}
_LINEAR: dict[str, Any] = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_WINDOWED: dict[str, Any] = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
_NO_GROUPS: dict[str, Any] = {"num_key_value_heads": ...}
_CONV: dict[str, Any] = {"layer_types": ["conv", "full_attention"]}
_INKLING: dict[str, Any] = {
    "head_dim": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16,
    "sliding_window_size": 64, "d_rel": 8, "rel_extent": 64,
}  # fmt: skip
_NO_DROPOUT: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_ROPE: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_KEPT = "its layers can't be recomputed: `training.gradient_checkpointing: true` is refused"
_IMAGES = "AutoModelForImageTextToText"
_PARTS: dict[str, Any] = {**dict.fromkeys(_COMMON, ...), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
"""What a config of text and images has beside that of each."""
_TEXT: dict[str, Any] = {**_COMMON, **_HEADS}
_TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_SIGLIP: dict[str, Any] = {**_TOWER, "model_type": "siglip_vision_model"}
_QWEN_IMAGES: dict[str, Any] = {
    **_PARTS, "image_token_id": 300, "video_token_id": 301, "vision_start_token_id": 302, "vision_end_token_id": 303,
    "vision_config": {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64, "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0], "window_size": 16, "fullatt_block_indexes": [1],
    },
}  # fmt: skip
_THREE_ROPES: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
}  # fmt: skip
_SHARED_EXPERT: dict[str, Any] = {**_EXPERTS, **_NARROW, "shared_expert_intermediate_size": 64}
_LLAMA4: dict[str, Any] = {
    "head_dim": 16, "intermediate_size_mlp": 128, "num_local_experts": 2, "interleave_moe_layer_step": 2,
    "attention_chunk_size": 64,
}  # fmt: skip
_FOUR_BIT = {"mapped": "yes", "each load": "made at each load", "no": "no"}


def _write(made_by: Any, config: Any, directory: Path, dtype: torch.dtype = torch.float32) -> None:
    """A random checkpoint without zeros, which would hide that something is forgotten, or is given no gradient."""
    torch.manual_seed(0)
    model = made_by.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "gate.weight")) or "expert" in name or "router" in name or not parameter.any():
                parameter.normal_(std=0.1)
    model.to(dtype).save_pretrained(directory)


def _config(model_type: str, tree: dict[str, Any]) -> Any:
    return AutoConfig.for_model(model_type, **{key: value for key, value in tree.items() if value is not ...})


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of causal language models; ``title`` is what people call it, ``model_type`` transformers' name.

    Attributes:
        targets: what ``all-linear`` adapts.
        changes: of the tiny config.
        four_bit: ``mapped`` from the quantized cache, made at ``each load`` by transformers, or ``no``.
        published: the auto class that the published checkpoints are of; their tensors are named by it.
        experts: ``4 bits``, each quantized and adapted where ``adapter.experts`` asks for it; ``dense``; or it has none.
        limits: for the page: what it can't do beside that.
    """

    title: str
    model_type: str
    targets: str = _SEVEN
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    four_bit: str = "mapped"
    experts: str = ""
    limits: str = "–"
    published: str = "AutoModelForCausalLM"

    def config(self) -> Any:
        """Of two layers, of width 64."""
        config = _config(self.model_type, {**_COMMON, **self.changes})
        config.architectures = [getattr(transformers, self.published)._model_mapping[type(config)].__name__]
        return config

    def write(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        """Its checkpoint, with a tokenizer."""
        _write(getattr(transformers, self.published), self.config(), directory, dtype)
        small_tokenizer().save_pretrained(directory)

    @property
    def quantization(self) -> str:
        """Of the recipe."""
        return "none" if self.four_bit == "no" else "nf4"

    @property
    def merged_base(self) -> Literal["original", "dequantized"]:
        """Into which weights a merged export has the logits of the run."""
        return "original" if self.four_bit == "no" else "dequantized"

    def row(self, found: dict[str, str]) -> list[str]:
        """Of the page's table, by what the steps of tests/architectures.py did."""
        if "lora" not in found:
            return [self.title, f"`{self.model_type}`", *["–"] * 5, self.limits]
        has_gguf = self.config().architectures[0] in gguf_families.FAMILIES
        four_bit = "experts too" if self.experts == "4 bits" else _FOUR_BIT[self.four_bit]
        answers = [*(found[step] == RIGHT for step in ("packing", "serve", "lora")), has_gguf]
        return [self.title, f"`{self.model_type}`", four_bit, *("yes" if x else "no" for x in answers), self.limits]


def _mixture(*about: Any, **more: Any) -> Family:
    """A family whose experts are in 4 bits."""
    return dataclasses.replace(Family(*about, **more), experts="4 bits")


def _with_images(
    title: str, model_type: str, text: dict[str, Any], vision: dict[str, Any], token: str = "image_token_id",
    targets: str = _SEVEN, limits: str = "–", **more: Any,
) -> Family:  # fmt: skip
    """A family whose published checkpoints take images; ``token`` is what its config calls the token of one."""
    changes = {**_PARTS, token: 300, "text_config": {**_TEXT, **text}, "vision_config": vision, **more}
    return Family(title, model_type, targets, changes, limits=limits, published=_IMAGES)


_FAMILIES = [
    Family("Llama 2, 3, 3.x, SmolLM2", "llama", changes={"rope_parameters": _LLAMA3_ROPE}),
    _mixture("Llama 4, text", "llama4_text", changes=_LLAMA4),
    Family("Mistral", "mistral", changes={"head_dim": 16, "sliding_window": None}),
    Family("Qwen2, Qwen2.5", "qwen2"),
    Family("Qwen3", "qwen3", changes={"head_dim": 16}),
    Family("Gemma", "gemma", changes={"head_dim": 16}),
    Family("Gemma 2", "gemma2", changes={"head_dim": 16, "sliding_window": 64}),
    Family("Gemma 3, text", "gemma3_text", changes={"head_dim": 16, "sliding_window": 64}),
    Family("Phi-1.5, Phi-2", "phi", "q_proj k_proj v_proj dense fc1 fc2"),
    Family("Phi-3, Phi-4", "phi3", "qkv_proj o_proj gate_up_proj down_proj"),
    Family("OLMo 2", "olmo2"),
    Family("Granite 3", "granite"),
    Family("SmolLM3", "smollm3"),
    Family("Command R", "cohere"),
    Family("Command R7B, Command A", "cohere2", changes={"sliding_window": 64}),
    Family("StableLM", "stablelm"),
    Family("StarCoder2", "starcoder2", f"{_ATTENTION} c_fc c_proj", {"sliding_window": None}),
    Family("GPT-NeoX, Pythia", "gpt_neox", _NEOX, _NO_GROUPS),
    Family(
        "OPT", "opt", "q_proj k_proj v_proj out_proj fc1 fc2",
        {"num_key_value_heads": ..., "ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0},
    ),
    Family("GPT-2", "gpt2", "c_attn c_proj c_fc", {**_NO_GROUPS, **_NO_DROPOUT}, "each load"),
    Family("Falcon", "falcon", _NEOX, {"num_key_value_heads": ...}),
    _mixture("Mixtral", "mixtral", _ATTENTION, _LOCAL_EXPERTS),
    _mixture("Qwen3 with experts", "qwen3_moe", _ATTENTION, {**_HEADS, **_EXPERTS, **_NARROW}),
    _mixture("gpt-oss", "gpt_oss", _ATTENTION, {**_HEADS, **_LOCAL_EXPERTS, **_WINDOW}),
    _with_images(
        "Gemma 3 with images", "gemma3", _WINDOW, _TOWER, "image_token_index", mm_tokens_per_image=4,
        boi_token_index=301, eoi_token_index=302,
    ),
    Family(
        "Gemma 4 with images", "gemma4", f"{_ATTENTION} {_MLP} {_PER_LAYER}", published=_IMAGES,
        changes={
            **_PARTS, "image_token_id": 300, "audio_config": None,
            "text_config": {
                **_TEXT, **_WINDOWED, "global_head_dim": 32, "num_kv_shared_layers": 0,
                "vocab_size_per_layer_input": 304, "hidden_size_per_layer_input": 16,
            },
            "vision_config": {**_TOWER, "head_dim": 16, "num_key_value_heads": 2},
        },
    ),
    _with_images(
        "Mistral Small 3 with images", "mistral3", {"model_type": "mistral", "sliding_window": None},
        {**_TOWER, "model_type": "pixtral", "head_dim": 16}, "image_token_index",
    ),
    Family(
        "Mistral 4", "mistral4", f"{_LATENT_ATTENTION} {_MLP}",
        {**_LATENT, **_ROUTED, "first_k_dense_replace": 0, "n_shared_experts": 1}, experts="4 bits", published=_IMAGES,
    ),
    Family("Qwen2.5-VL", "qwen2_5_vl", published=_IMAGES, changes={**_QWEN_IMAGES, "text_config": {**_TEXT, **_THREE_ROPES}}),
    Family("Qwen3-VL", "qwen3_vl", published=_IMAGES, changes={**_QWEN_IMAGES, "text_config": {**_TEXT, **_THREE_ROPES}}),
    Family(
        "Qwen3-VL with experts", "qwen3_vl_moe", _ATTENTION, experts="4 bits", published=_IMAGES,
        changes={**_QWEN_IMAGES, "text_config": {**_TEXT, **_THREE_ROPES, **_EXPERTS, **_NARROW}},
    ),
    Family(
        "Qwen3.5", "qwen3_5", f"{_SEVEN} {_IN_PROJ} out_proj", published=_IMAGES,
        changes={**_QWEN_IMAGES, "text_config": {**_TEXT, **_LINEAR}},
    ),
    Family(
        "Qwen3.5 with experts", "qwen3_5_moe", f"{_SEVEN} {_IN_PROJ} out_proj", experts="4 bits",
        published=_IMAGES, changes={**_QWEN_IMAGES, "text_config": {**_TEXT, **_LINEAR, **_SHARED_EXPERT}},
    ),
    _with_images("SmolVLM", "smolvlm", {"model_type": "llama"}, _TOWER, scale_factor=2),
    _with_images("Idefics 3", "idefics3", {"model_type": "llama"}, _TOWER, scale_factor=2),
    _with_images(
        "LFM2-VL", "lfm2_vl", {**_CONV, "model_type": "lfm2", "block_auto_adjust_ff_dim": False},
        {**_TOWER, "model_type": "siglip2_vision_model", "num_patches": 16, "patch_size": 4},
        targets="q_proj k_proj v_proj out_proj in_proj w1 w2 w3", projector_hidden_size=64,
    ),
    Family(
        "Llama 4 with images", "llama4", experts="4 bits", published=_IMAGES,
        changes={
            **_PARTS, "image_token_index": 300, "text_config": {**_COMMON, **_LLAMA4},
            "vision_config": {
                **_TOWER, "intermediate_size": 128, "vision_output_dim": 64, "projector_input_dim": 64,
                "projector_output_dim": 64,
            },
        },
    ),
    Family(
        "Aria", "aria", experts="4 bits", published=_IMAGES,
        changes={
            **_PARTS, "image_token_index": 300, "projector_patch_to_query_dict": {4: 4},
            "text_config": {**_TEXT, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
            "vision_config": {**_TOWER, "model_type": "idefics3_vision"},
        },
    ),
    _with_images("DeepSeek-VL", "deepseek_vl", {"model_type": "llama"}, _SIGLIP),
    Family(
        "GLM-4V", "glm4v", "q_proj k_proj v_proj o_proj gate_up_proj down_proj", published=_IMAGES,
        changes={
            **_QWEN_IMAGES,
            "text_config": {
                **_TEXT, "rope_parameters": {
                    "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1],
                    "partial_rotary_factor": 0.5,
                },
            },
        },
    ),
    _with_images(
        "GOT-OCR 2", "got_ocr2", {"model_type": "qwen2"},
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 64, "image_size": 64,
         "output_channels": 32}, "image_token_index",
    ),
    _with_images(
        "Idefics 2", "idefics2", {"model_type": "mistral"}, _TOWER, perceiver_config={
            "hidden_size": 64, "resampler_n_latents": 4, "resampler_n_heads": 4, "resampler_head_dim": 16,
            "num_key_value_heads": 2, "resampler_depth": 1,
        },
    ),
    _with_images(
        "InternVL 3", "internvl", {"model_type": "qwen2"}, {**_TOWER, "image_size": [28, 28], "patch_size": [14, 14]},
    ),
    _with_images(
        "LLaVA 1.5", "llava", {"model_type": "llama"}, {**_TOWER, "model_type": "clip_vision_model"}, "image_token_index",
    ),
    _with_images("LLaVA-OneVision", "llava_onevision", {"model_type": "qwen2"}, _SIGLIP, "image_token_index"),
    _with_images(
        "Llama 3.2 Vision", "mllama", {**_ROPE, "cross_attention_layers": [1]},
        {**_TOWER, "num_global_layers": 1, "attention_heads": 2, "vision_output_dim": 64,
         "intermediate_layers_indices": [1]}, "image_token_index",
        limits="refused: its layers for images get no gradient from text; name `adapter.targets` of the others",
    ),
    _with_images("Ovis 2", "ovis2", {"model_type": "qwen2"}, {**_TOWER, "vocab_size": 64}, hidden_size=64),
    _with_images("PaddleOCR-VL", "paddleocr_vl", _THREE_ROPES, _TOWER),
    _with_images(
        "PaliGemma", "paligemma", {"model_type": "gemma"}, _SIGLIP, "image_token_index", projection_dim=64,
        limits="refused: it shows each token of the prompt the later ones",
    ),
    _with_images(
        "Qwen2-VL", "qwen2_vl", _THREE_ROPES,
        {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
         "temporal_patch_size": 2},
    ),
    _mixture(
        "Trinity", "afmoe", changes={**_EXPERTS, **_HEADS, **_WINDOW, **_NARROW, "num_dense_layers": 1,
        "num_shared_experts": 1, "global_attn_every_n_layers": 2},
    ),
    Family("Apertus", "apertus", f"{_ATTENTION} up_proj down_proj"),
    Family("Apertus 1.5, text", "apertus1p5_text", f"{_ATTENTION} up_proj down_proj"),
    Family("Arcee AFM", "arcee", f"{_ATTENTION} up_proj down_proj"),
    _mixture("Aria, text", "aria_text", changes={"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}),
    _mixture("A.X K1", "axk1", f"{_LATENT_ATTENTION} {_MLP}", {**_LATENT, **_ROUTED, **_DENSE_FIRST}),
    _mixture(
        "A.X K2", "axk2", f"{_MLP} q_a_proj q_gate_proj kv_a_proj_with_mqa kv_b_proj o_proj fc1 fc2", {**_LATENT,
        **_ROUTED, **_INDEXED, **_DENSE_FIRST, "head_dim": 8, "gated_norm_rank": 16},
    ),
    _mixture(
        "Ling 2.5 hybrid", "bailing_hybrid", f"{_ATTENTION} {_MLP} f_proj b_proj g_proj kv_a_proj_with_mqa kv_b_proj",
        {**_LOCAL_EXPERTS, **_HEADS, **_NARROW, "q_lora_rank": ..., "kv_lora_rank": 32, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "layer_group_size": 2},
    ),
    Family("Bamba", "bamba", f"{_ATTENTION} {_MLP} in_proj out_proj", {**_MAMBA, "attn_layer_indices": [1]}),
    Family(
        "BioGPT", "biogpt", "k_proj v_proj q_proj out_proj fc1 fc2", {**_NO_GROUPS, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0},
    ),
    Family("BitNet", "bitnet"),
    Family("BLOOM", "bloom", _NEOX, {**_NO_GROUPS, "n_layer": 2, "n_head": 4}),
    Family("CodeGen", "codegen", "out_proj qkv_proj fc_in fc_out", {**_NO_GROUPS, "rotary_dim": 8}),
    _mixture(
        "Command with experts", "cohere2_moe", _ATTENTION, {**_EXPERTS, **_HEADS, **_WINDOW, "sliding_window_pattern":
        2},
    ),
    Family(
        "Cohere Compass, text", "cohere_compass_text", changes={**_WINDOWED,
        "rope_parameters": {"full_attention": None, "sliding_attention": {"rope_type": "default",
        "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}},
    ),
    Family(
        "CPM-Ant", "cpmant", "project_q project_k project_v attention_out w_0 w_1 w_out", {**_NO_GROUPS,
        "dim_head": 16, "dim_ff": 128},
        limits="refused: it takes token 0 for padding, on the left",
    ),
    Family(
        "CTRL", "ctrl", "Wq Wk Wv dense 0 2", {**_NO_GROUPS, "n_embd": 64, "n_layer": 2, "n_head": 4, "dff": 128,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0},
        limits=_KEPT,
    ),
    Family("CWM", "cwm", changes={**_WINDOWED, **_HEADS}),
    _mixture(
        "DBRX", "dbrx", "Wqkv out_proj", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}, "ffn_config": {"ffn_hidden_size": 64,
        "moe_num_experts": 4, "moe_top_k": 2}},
    ),
    _mixture(
        "DeepSeek V2", "deepseek_v2", f"{_LATENT_ATTENTION} {_MLP}", {**_LATENT, **_ROUTED, "first_k_dense_replace":
        1},
    ),
    _mixture(
        "DeepSeek V3, R1", "deepseek_v3", f"{_LATENT_ATTENTION} {_MLP}", {**_LATENT, **_ROUTED,
        "first_k_dense_replace": 1},
    ),
    _mixture(
        "DeepSeek V3.2", "deepseek_v32", f"{_LATENT_ATTENTION} {_MLP}", {**_LATENT, **_ROUTED, **_INDEXED,
        **_DENSE_FIRST, "head_dim": 8},
    ),
    _mixture(
        "DeepSeek V4", "deepseek_v4", f"{_MLP} q_a_proj q_b_proj kv_proj o_b_proj", {**_INDEXED, **_HEADS, **_WINDOW,
        **_NARROW, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": ..., "topk_group": ..., "q_lora_rank":
        32, "num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 16, "qk_rope_head_dim": 8},
    ),
    Family("DiffLlama", "diffllama"),
    Family("Doge", "doge", f"{_ATTENTION} {_MLP} dt_proj"),
    Family(
        "Dory", "dory", changes={**_HEADS, **_WINDOW, "n_input_layers": 1, "n_output_layers": 1,
        "n_recurrent_layers": 1, "num_hidden_layers": 3},
    ),
    _mixture("dots.llm1", "dots1", changes={**_ROUTED, **_WINDOW, "n_shared_experts": 1, "first_k_dense_replace": 1}),
    _mixture(
        "dots 3 Note, text", "dots3_note_text", f"{_LATENT_ATTENTION} {_MLP} g_proj", {**_LATENT, **_ROUTED,
        **_INDEXED, **_HEADS, **_DENSE_FIRST, "shared_experts_intermediate_size": 64},
    ),
    Family("ERNIE 4.5", "ernie4_5", changes=_HEADS),
    _mixture(
        "ERNIE 4.5 with experts", "ernie4_5_moe", changes={**_NARROW, "moe_k": 2, "moe_num_experts": 4,
        "moe_num_shared_experts": 1},
    ),
    Family("EXAONE 4", "exaone4", changes=_WINDOWED),
    _mixture("K-EXAONE", "exaone_moe", changes={**_EXPERTS, **_WINDOWED, **_NARROW}),
    Family("Falcon-H1", "falcon_h1", f"{_ATTENTION} {_MLP} in_proj out_proj", {**_MAMBA, "mamba_d_ssm": 128}),
    Family("Falcon Mamba", "falcon_mamba", "in_proj x_proj out_proj", _NO_GROUPS),
    _mixture("FlexOlmo", "flex_olmo", _ATTENTION, _EXPERTS),
    Family("Flint", "flint", changes={**_SHARED_EXPERT, **_HEADS, **_WINDOW}),
    Family(
        "Gemma 3n, text", "gemma3n_text",
        f"{_ATTENTION} {_MLP} modality_router linear_left linear_right {_PER_LAYER}",
        {**_HEADS, **_WINDOW, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention",
        "sliding_attention", "full_attention"], "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 304, "laurel_rank": 8},
    ),
    Family(
        "Gemma 4, text", "gemma4_text",
        f"{_ATTENTION} {_MLP} {_PER_LAYER}", {**_WINDOWED,
        **_HEADS, "global_head_dim": 32, "vocab_size_per_layer_input": 304, "hidden_size_per_layer_input": 16},
    ),
    Family("Gemma 4 unified, text", "gemma4_unified_text", changes={**_WINDOWED, **_HEADS}),
    Family("GLM 4 (2024)", "glm", f"{_ATTENTION} gate_up_proj down_proj", _HEADS),
    Family("GLM 4 (2025)", "glm4", f"{_ATTENTION} gate_up_proj down_proj", _HEADS),
    _mixture("GLM 4.5 to 4.7", "glm4_moe", changes={**_ROUTED, **_HEADS, "first_k_dense_replace": 1}),
    _mixture("GLM 4.7 Flash", "glm4_moe_lite", f"{_LATENT_ATTENTION} {_MLP}", {**_LATENT, **_ROUTED, **_DENSE_FIRST}),
    _mixture(
        "GLM 5", "glm_moe_dsa", f"{_LATENT_ATTENTION} {_MLP}", {**_LATENT, **_ROUTED, **_INDEXED, **_DENSE_FIRST,
        "head_dim": 8},
    ),
    Family(
        "GLM 5.3 Flash", "glm5_next",
        f"{_ATTENTION} {_MLP} f_a_proj f_b_proj b_proj g_a_proj g_b_proj q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj",
        {
            **_PARTS, "image_token_id": 300, "video_token_id": 301,
            "text_config": {
                **_COMMON, **_INDEXED, **_DENSE_FIRST, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 0,
                "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4, "moe_intermediate_size": 64,
                "n_routed_experts": 4, "num_experts_per_tok": 2, "hc_mult": 2, "index_kpool": 2,
                "layer_types": ["linear_attention", "indexed_attention"], "linear_head_dim": 16, "linear_num_heads": 4,
            },
            "vision_config": {
                "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "image_size": 28,
                "patch_size": 14, "out_hidden_size": 64, "projection_intermediate_size": 64,
            },
        }, experts="4 bits", published=_IMAGES,
    ),
    Family("StarCoder, SantaCoder", "gpt_bigcode", "c_attn c_proj c_fc", {**_NO_DROPOUT, **_NO_GROUPS}),
    Family(
        "GPT-Neo", "gpt_neo", "k_proj v_proj q_proj out_proj c_fc c_proj", {"num_layers": 2, "num_heads": 4,
        "attention_types": [[["global", "local"], 1]], "resid_dropout": 0.0, "embed_dropout": 0.0,
        "attention_dropout": 0.0},
    ),
    Family(
        "GPT-NeoX Japanese", "gpt_neox_japanese", _NEOX, {**_NO_GROUPS, "hidden_dropout": 0.0,
        "attention_dropout": 0.0},
        limits=_KEPT,
    ),
    Family("GPT-J", "gptj", "k_proj v_proj q_proj out_proj fc_in fc_out", {**_NO_GROUPS, "rotary_dim": 8}),
    Family("Granite with windows", "granite_swa", changes=_WINDOWED),
    _mixture("Granite 3 with experts", "granitemoe", _ATTENTION, _LOCAL_EXPERTS),
    _mixture("Granite with experts and windows", "granitemoe_swa", _ATTENTION, {**_LOCAL_EXPERTS, **_WINDOWED}),
    _mixture(
        "Granite 4", "granitemoehybrid", f"{_ATTENTION} input_linear output_linear in_proj out_proj", {**_MAMBA,
        **_LOCAL_EXPERTS, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 64},
    ),
    _mixture(
        "Granite with shared experts", "granitemoeshared", f"{_ATTENTION} input_linear output_linear",
        {**_LOCAL_EXPERTS, "shared_intermediate_size": 64},
    ),
    Family("Helium", "helium", changes=_HEADS),
    Family("HRM, text", "hrm_text", changes=_HEADS),
    Family("Hunyuan V1", "hunyuan_v1_dense", changes={**_HEADS, **_ROPE}),
    _mixture("Hunyuan V1 with experts", "hunyuan_v1_moe", changes={**_HEADS, **_ROPE, "num_experts": 4, "moe_topk": 2}),
    _mixture("Hunyuan 3", "hy_v3", changes={**_EXPERTS, **_HEADS, **_NARROW, **_DENSE_FIRST, "num_shared_experts": 1}),
    _mixture(
        "Hunyuan 4", "hy_v4", f"{_LATENT_ATTENTION} {_MLP}", {**_LATENT, **_ROUTED, **_INDEXED, **_HEADS,
        **_DENSE_FIRST},
    ),
    Family("HyperCLOVA X", "hyperclovax"),
    _mixture(
        "Inkling 2 loop, text", "inkling2_loop_text",
        "linear gate_proj sink_proj down_proj forget_gate_proj message_gate_proj", {**_INKLING, **_NARROW,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "unpadded_vocab_size": 304, "n_layers_per_attn_res_block": 1,
        "num_hidden_layers": 3, "loop_layer_index_start": 1, "loop_layer_index_end": 2, "loop_gate_rank": 8},
        limits="refused: transformers cuts rows off the head of its files",
    ),
    _mixture(
        "Inkling 2, text", "inkling2_text", "linear gate_proj sink_proj", {**_INKLING, **_NARROW, "n_routed_experts":
        4, "num_experts_per_tok": 2, "unpadded_vocab_size": 304, "n_layers_per_attn_res_block": 1},
        limits="refused: transformers cuts rows off the head of its files",
    ),
    _mixture(
        "Inkling, text", "inkling_text", f"{_ATTENTION} r_proj", {**_INKLING, **_NARROW, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_shared_experts": 1, "intermediate_size": 64},
        limits="refused: it computes its logits in a way that the loss does not know",
    ),
    Family("InternLM 3", "internlm3", changes=_HEADS),
    Family("IQuest-Coder", "iquestcoder", changes=_HEADS),
    Family("Jais 2", "jais2", f"{_ATTENTION} up_proj down_proj"),
    _mixture(
        "Jamba", "jamba", f"{_ATTENTION} {_MLP} in_proj x_proj out_proj", {**_EXPERTS, "attn_layer_period": 2,
        "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 16,
        "mamba_dt_rank": 8, "use_mamba_kernels": False},
    ),
    _mixture(
        "JetMoE", "jetmoe", "kv_proj", {**_LOCAL_EXPERTS, "kv_channels": 16, "num_attention_heads": 4,
        "num_key_value_heads": 2}, limits=_KEPT,
    ),
    _mixture(
        "Kimi Linear", "kimi_linear",
        f"{_ATTENTION} {_MLP} f_a_proj f_b_proj b_proj g_a_proj g_b_proj kv_a_proj_with_mqa kv_b_proj",
        {**_LOCAL_EXPERTS, **_NARROW, **_DENSE_FIRST, "q_lora_rank": ..., "kv_lora_rank": 32, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1,
        "layer_types": ["linear_attention", "full_attention"], "linear_head_dim": 16, "linear_num_heads": 4},
    ),
    _mixture("Kolibri", "kolibri1", changes={**_SHARED_EXPERT, **_WINDOWED, **_HEADS}),
    _mixture(
        "Laguna", "laguna", f"{_ATTENTION} {_MLP} g_proj", {**_SHARED_EXPERT, **_WINDOWED, **_HEADS, **_DENSE_FIRST},
    ),
    _mixture(
        "Lara mini", "lara_mini", f"{_ATTENTION} {_MLP} out_proj {_IN_PROJ}", {**_LINEAR, **_SHARED_EXPERT, **_HEADS,
        **_WINDOW},
    ),
    Family("LFM2", "lfm2", "in_proj out_proj w1 w3 w2 q_proj k_proj v_proj", _CONV),
    _mixture(
        "LFM2 with experts", "lfm2_moe", "in_proj out_proj w1 w3 w2 q_proj k_proj v_proj", {**_EXPERTS, **_NARROW,
        **_CONV, "num_dense_layers": 1},
    ),
    Family("LFM3", "lfm3", f"{_ATTENTION} in_proj out_proj w1 w3 w2 g_proj", {**_HEADS, **_WINDOW, **_CONV}),
    _mixture(
        "LongCat-Flash", "longcat_flash", f"{_LATENT_ATTENTION} {_MLP}", {**_LATENT, "num_layers": 2,
        "ffn_hidden_size": 128, "head_dim": 8, "moe_topk": 2, "n_routed_experts": 4, "zero_expert_num": 2,
        "expert_ffn_hidden_size": 64, "num_hidden_layers": ...},
    ),
    Family("Mamba", "mamba", "in_proj x_proj out_proj", _NO_GROUPS),
    Family(
        "Mamba 2", "mamba2", "in_proj out_proj", {**_HEADS, **_NO_GROUPS, "num_heads": 8, "state_size": 16,
        "n_groups": 2, "chunk_size": 8, "num_attention_heads": ...},
    ),
    _mixture("Mellum", "mellum", _ATTENTION, {**_EXPERTS, **_WINDOWED, **_HEADS, **_NARROW}),
    _mixture(
        "MiMo V2 Flash", "mimo_v2_flash", changes={**_ROUTED, **_WINDOWED, **_HEADS, **_DENSE_FIRST, "v_head_dim": 16},
    ),
    Family("MiniCPM 3", "minicpm3", f"{_LATENT_ATTENTION} {_MLP}", {**_LATENT, "dim_model_base": 32, "scale_emb": 12}),
    _mixture(
        "MiniMax-01, M1", "minimax", f"{_ATTENTION} qkv_proj out_proj output_gate", {**_LOCAL_EXPERTS, **_HEADS,
        "layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    ),
    _mixture("MiniMax M2", "minimax_m2", _ATTENTION, {**_LOCAL_EXPERTS, **_HEADS}),
    _mixture(
        "MiniMax M3, text", "minimax_m3_vl_text", f"{_ATTENTION} gate_up_proj down_proj", {**_LOCAL_EXPERTS, **_HEADS,
        **_DENSE_FIRST, "dense_intermediate_size": 128, "shared_intermediate_size": 64, "rotary_dim": 8,
        "index_n_heads": 2, "index_head_dim": 16, "index_block_size": 8, "index_topk_blocks": 2},
    ),
    Family("Ministral", "ministral", changes={**_WINDOWED, **_HEADS, **_ROPE}),
    Family("Ministral 3, text", "ministral3", changes=_HEADS),
    Family(
        "ModernBERT decoder", "modernbert-decoder", "", {**_NO_GROUPS, "cls_token_id": 1, "sep_token_id": 2,
        "local_attention": 64, "layer_types": ["sliding_attention", "full_attention"]},
        limits="refused: it computes its logits in a way that the loss does not know",
    ),
    Family(
        "MPT", "mpt", "Wqkv out_proj up_proj down_proj", {**_NO_GROUPS, "d_model": 64, "n_heads": 4, "n_layers": 2,
        "max_seq_len": 128},
    ),
    Family("nanochat", "nanochat", f"{_ATTENTION} fc1 fc2"),
    Family("Nemotron 3, 4", "nemotron", f"{_ATTENTION} up_proj down_proj"),
    _mixture(
        "Nemotron-H, Nemotron 3 Nano", "nemotron_h", f"{_ATTENTION} in_proj out_proj up_proj down_proj", {**_ROUTED,
        **_HEADS, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 8,
        "layers_block_type": ["mamba", "attention", "moe"], "num_hidden_layers": 3,
        "moe_shared_expert_intermediate_size": 64},
    ),
    Family("OLMo", "olmo"),
    Family("OLMo 3", "olmo3", changes=_WINDOWED),
    Family("OLMo hybrid", "olmo_hybrid", f"{_ATTENTION} {_MLP} a_proj b_proj g_proj", _LINEAR),
    _mixture("OLMoE", "olmoe", _ATTENTION, _EXPERTS),
    Family("GPT", "openai-gpt", "c_attn c_proj c_fc", {**_NO_DROPOUT, **_NO_GROUPS}, "each load", limits=f"{_KEPT}; not served"),
    Family("Persimmon", "persimmon", _NEOX, _NO_GROUPS),
    _mixture("Phi-3.5 MoE", "phimoe", _ATTENTION, {**_LOCAL_EXPERTS, "router_jitter_noise": 0.0}),
    _mixture("Qwen1.5, Qwen2 with experts", "qwen2_moe", changes=_SHARED_EXPERT),
    _mixture(
        "Qwen3.5 with experts, text", "qwen3_5_moe_text", f"{_ATTENTION} {_MLP} out_proj {_IN_PROJ}", {**_LINEAR,
        **_SHARED_EXPERT, **_HEADS},
    ),
    Family("Qwen3.5, text", "qwen3_5_text", f"{_ATTENTION} {_MLP} out_proj {_IN_PROJ}", {**_LINEAR, **_HEADS}),
    _mixture(
        "Qwen3-Next", "qwen3_next", f"{_ATTENTION} {_MLP} in_proj_qkvz in_proj_ba out_proj", {**_LINEAR,
        **_SHARED_EXPERT, **_HEADS},
    ),
    _mixture(
        "Qwen4 experimental, text", "qwen4_exp_text",
        f"{_ATTENTION} {_MLP} out_proj {_IN_PROJ} input_mix_weight_down input_mix_weight_up block_inject_weight index_qk_proj",
        {**_LINEAR, **_SHARED_EXPERT, **_HEADS, "hc_count": 2, "hc_lowrank": 16, "ngram_vocab_size_base": 512,
        "heads_per_ngram": 2, "split_ngram_parts": 2, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim":
        16, "indexer_budget": 8, "indexer_compress_ratio": 2},
    ),
    Family(
        "RecurrentGemma", "recurrent_gemma", f"{_ATTENTION} {_MLP} linear_y linear_x linear_out",
        {"num_key_value_heads": 1, "attention_window_size": 64, "block_types": ["recurrent", "attention"]},
    ),
    Family(
        "RWKV 4", "rwkv", "key value receptance output", {**_NO_GROUPS, "context_length": 128,
        "num_attention_heads": ...},
        limits="refused: it changes its weights between training and evaluation",
    ),
    _mixture(
        "Sarvam 105B", "sarvam_mla", f"{_MLP} q_proj kv_a_proj_with_mqa kv_b_proj o_proj", {**_ROUTED, "q_lora_rank":
        None, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
        "num_key_value_heads": 4, "first_k_dense_replace": 1},
    ),
    _mixture("Sarvam 30B", "sarvam_moe", changes={**_ROUTED, **_HEADS, "first_k_dense_replace": 1}),
    Family("Seed-OSS", "seed_oss", changes={**_HEADS, "attention_dropout": 0.0, "residual_dropout": 0.0}),
    _mixture("Solar Open", "solar_open", changes={**_ROUTED, **_HEADS}),
    Family("VaultGemma", "vaultgemma", changes={**_WINDOWED, **_HEADS}),
    Family(
        "xLSTM", "xlstm", "q k v ogate_preact igate_preact fgate_preact out_proj proj_up_gate proj_up proj_down",
        {"num_heads": 4, "chunk_size": 16, "num_blocks": 2, "qk_dim_factor": 1.0},
        limits="refused: it computes its logits in a way that the loss does not know",
    ),
    Family(
        "Phi-4 multimodal, on text", "phi4_multimodal", "qkv_proj o_proj gate_up_proj down_proj", {
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
            "vision_config": {**_TOWER, "crop_size": 28},
            "audio_config": {
                "hidden_size": 32, "intermediate_size": 64, "num_blocks": 2, "num_attention_heads": 2,
                "nemo_conv_channels": 32, "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32,
                "input_size": 16,
            },
        }, limits="its towers of vision and audio are neither adapted nor trained",
    ),
    Family("Youtu-LLM", "youtu", f"{_LATENT_ATTENTION} {_MLP}", _LATENT),
    Family(
        "Zamba", "zamba", f"{_ATTENTION} {_MLP} in_proj out_proj linear", {"layers_block_type": ["mamba", "hybrid",
        "hybrid"], "mamba_d_state": 16, "n_mamba_heads": 2, "use_mamba_kernels": False, "num_key_value_heads": 4,
        "num_hidden_layers": 3},
    ),
    Family(
        "Zamba 2", "zamba2", f"{_ATTENTION} in_proj out_proj linear gate_up_proj down_proj 0 1",
        {"layers_block_type": ["mamba", "hybrid", "hybrid"], "mamba_d_state": 16, "n_mamba_heads": 4, "chunk_size": 8,
        "num_key_value_heads": 4, "adapter_rank": 8, "num_hidden_layers": 3, "num_mem_blocks": 1},
    ),
    _mixture(
        "ZAYA1", "zaya", "o_proj q_proj k_proj v_proj_current v_proj_delayed", {**_HEADS, **_NARROW, "num_experts": 4,
        "router_hidden_size": 32},
    ),
]  # fmt: skip
FAMILIES = {family.model_type: family for family in _FAMILIES}

_ENCODER: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 304,
    "max_position_embeddings": 128, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0,
    "initializer_range": 0.1,
}  # fmt: skip
_VISION = {"image_size": 32, "patch_size": 8, "num_channels": 3}
_DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": 64}


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A family of models that are given a head for classes.

    ``published`` is the auto class that the published checkpoints are of; their tensors are named by it.
    """

    title: str
    model_type: str
    published: str
    targets: str
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    four_bit: str = "mapped"
    takes_images: bool = False

    def write(self, directory: Path) -> None:
        """A checkpoint as the published ones are."""
        config = _config(self.model_type, {**_ENCODER, **self.changes})
        _write(getattr(transformers, self.published), config, directory)
        beside = image_processor(config.image_size) if self.takes_images else small_tokenizer()
        beside.save_pretrained(directory)

    def row(self) -> list[str]:
        """Of the page's table."""
        return [self.title, f"`{self.model_type}`", ", ".join(self.targets.split()), _FOUR_BIT[self.four_bit]]


ENCODERS: dict[str, Encoder] = {
    "bert": Encoder("BERT, MiniLM", "bert", "AutoModel", "query key value dense"),
    "roberta": Encoder("RoBERTa, XLM-R", "roberta", "AutoModelForMaskedLM", "query key value dense"),
    "deberta-v2": Encoder(
        "DeBERTa v2, v3", "deberta-v2", "AutoModelForMaskedLM", "query_proj key_proj value_proj dense",
        {**_DEBERTA, "position_buckets": 16, "norm_rel_ebd": "layer_norm", "share_att_key": True},
    ),
    "distilbert": Encoder(
        "DistilBERT", "distilbert", "AutoModelForMaskedLM", "q_lin k_lin v_lin out_lin lin1 lin2",
        {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "dropout": 0.0, "attention_dropout": 0.0,
         "seq_classif_dropout": 0.0, "hidden_size": ..., "num_hidden_layers": ..., "num_attention_heads": ...},
    ),
    "modernbert": Encoder(
        "ModernBERT", "modernbert", "AutoModelForMaskedLM", "Wqkv Wi Wo",
        {"bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2},
    ),
    "gpt2": Encoder(
        "GPT-2", "gpt2", "AutoModel", "c_attn c_proj c_fc",
        {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}, "each load",
    ),
    "gemma3": Encoder(
        "Gemma 3 with images, on text", "gemma3", _IMAGES, _SEVEN,
        {**dict.fromkeys(_ENCODER, ...), **FAMILIES["gemma3"].changes},
    ),
    "vit": Encoder("ViT", "vit", "AutoModel", "q_proj k_proj v_proj o_proj fc1 fc2", _VISION, takes_images=True),
}  # fmt: skip


def read_results() -> dict[str, dict[str, str]]:
    """By model type, what each step of tests/architectures.py did: `RIGHT`, ``refused: …`` or ``wrong: …``."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))["results"] if RESULTS.exists() else {}


def page() -> str:
    """docs/models.md with the tables of today."""
    text, results = PAGE.read_text(encoding="utf-8"), read_results()
    columns = "| family | `model_type` | 4 bits | packing | continuous batches | LoRA | GGUF | limits |"
    trained = [family.row(results[name]) for name, family in FAMILIES.items() if name in results]
    encoders = [family.row() for family in ENCODERS.values()]
    for name, title, rows in (
        ("families", columns, sorted(trained, key=lambda row: row[0].lower())),
        ("encoders", "| family | `model_type` | `all-linear` adapts | 4 bits |", encoders),
    ):
        lines = [f"| {' | '.join(row)} |" for row in rows]
        text = with_table(text, name, "\n".join([title, "|" + "---|" * (title.count("|") - 1), *lines]))
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
