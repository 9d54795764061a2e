"""The model families that docs/models.md lists: a tiny random checkpoint of each, and what is expected of it.

`python -m tests.families` writes the table of that page.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bench.common import with_table
from qvera.exporting.gguf import architecture as gguf_families
from tests.conftest import small_tokenizer
from tests.tasks.images import image_processor

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"

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
_NEOX = "query_key_value dense dense_h_to_4h dense_4h_to_h"
_FOUR_BIT = {"mapped": "mapped from the cache", "each load": "made at each load", "no": "no"}


def _write(made_by: Any, config: Any, directory: Path) -> None:
    """A random checkpoint, with biases that are not zero: zeros would hide that one is forgotten."""
    torch.manual_seed(0)
    model = made_by.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "gate.weight")) or "expert" in name or "router" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(directory)


def _config(model_type: str, tree: dict[str, Any]) -> Any:
    return AutoConfig.for_model(model_type, **{key: value for key, value in tree.items() if value is not ...})


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of causal language models; ``title`` is what people call it, ``model_type`` transformers' name.

    Attributes:
        targets: what ``all-linear`` adapts.
        changes: of the tiny config.
        four_bit: ``mapped`` from the quantized cache, made at ``each load`` by transformers, or ``no``.
        joins: whether rows can stand in one sequence: ``data.prefix_once`` and ``data.packing``.
        continuous: whether `qvera serve` takes it in continuous batches; else in static ones.
        experts: ``4 bits``, each quantized and adapted where ``adapter.experts`` asks for it; ``dense``; or it has none.
        limits: for the page: what it can't do beside that.
    """

    title: str
    model_type: str
    targets: str = _SEVEN
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    four_bit: str = "mapped"
    joins: bool = False
    continuous: bool = True
    experts: str = ""
    limits: str = "–"

    def config(self) -> Any:
        """Of two layers, of width 64."""
        return _config(self.model_type, {**_COMMON, **self.changes})

    def write(self, directory: Path) -> None:
        """Its checkpoint, with a tokenizer."""
        _write(AutoModelForCausalLM, self.config(), directory)
        small_tokenizer().save_pretrained(directory)

    def row(self) -> list[str]:
        """Of the page's table."""
        has_gguf = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.model_type] in gguf_families.FAMILIES
        targets = ", ".join(self.targets.split()) if self.targets != _SEVEN else "the seven of Llama"
        targets += ", and experts with `adapter.experts`" if self.experts == "4 bits" else ""
        answers = ["yes" if x else "no" for x in (self.joins, self.continuous, has_gguf)]
        return [self.title, f"`{self.model_type}`", targets, _FOUR_BIT[self.four_bit], *answers, self.limits]


FAMILIES: dict[str, Family] = {
    "llama": Family("Llama 2, 3, 3.x, SmolLM2", "llama", changes={"rope_parameters": _LLAMA3_ROPE}, joins=True),
    "llama4": Family(
        "Llama 4, text", "llama4_text", experts="4 bits",
        changes={
            "head_dim": 16, "intermediate_size_mlp": 128, "num_local_experts": 2, "interleave_moe_layer_step": 2,
            "attention_chunk_size": 64,
        },
    ),
    "mistral": Family("Mistral", "mistral", changes={"head_dim": 16, "sliding_window": None}, joins=True),
    "qwen2": Family("Qwen2, Qwen2.5", "qwen2", joins=True),
    "qwen3": Family("Qwen3", "qwen3", changes={"head_dim": 16}, joins=True),
    "gemma": Family("Gemma", "gemma", changes={"head_dim": 16}, joins=True),
    "gemma2": Family("Gemma 2", "gemma2", changes={"head_dim": 16, "sliding_window": 64}),
    "gemma3": Family("Gemma 3, text", "gemma3_text", changes={"head_dim": 16, "sliding_window": 64}),
    "gemma3_images": Family(
        "Gemma 3 with images, trained on text", "gemma3", limits="its vision tower is neither adapted nor trained",
        changes={
            **dict.fromkeys(_COMMON, ...), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
            "text_config": {**_COMMON, "head_dim": 16, "sliding_window": 64}, "mm_tokens_per_image": 4,
            "vision_config": {
                "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                "image_size": 28, "patch_size": 14,
            },
        },
    ),
    "phi": Family("Phi-1.5, Phi-2", "phi", "q_proj k_proj v_proj dense fc1 fc2", joins=True),
    "phi3": Family("Phi-3, Phi-4", "phi3", "qkv_proj o_proj gate_up_proj down_proj", joins=True),
    "olmo2": Family("OLMo 2", "olmo2", joins=True),
    "granite": Family("Granite 3", "granite", joins=True),
    "smollm3": Family("SmolLM3", "smollm3", joins=True),
    "cohere": Family("Command R", "cohere", joins=True),
    "cohere2": Family("Command R7B, Command A", "cohere2", changes={"sliding_window": 64}),
    "stablelm": Family("StableLM", "stablelm", continuous=False),
    "starcoder2": Family("StarCoder2", "starcoder2", f"{_ATTENTION} c_fc c_proj", {"sliding_window": None}, joins=True),
    "gpt_neox": Family(
        "GPT-NeoX, Pythia", "gpt_neox", _NEOX, {"num_key_value_heads": ...}, joins=True
    ),
    "opt": Family(
        "OPT", "opt", "q_proj k_proj v_proj out_proj fc1 fc2",
        {"num_key_value_heads": ..., "ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0},
    ),
    "gpt2": Family(
        "GPT-2", "gpt2", "c_attn c_proj c_fc",
        {"num_key_value_heads": ..., "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, "each load",
    ),
    "falcon": Family(
        "Falcon", "falcon", _NEOX, {"num_key_value_heads": ...}, "no", continuous=False,
        limits="not in 4 bits: its linears are of a class of their own. Set `model.quantization: none`",
    ),
    "mixtral": Family(
        "Mixtral", "mixtral", _ATTENTION, {"num_local_experts": 4, "num_experts_per_tok": 2}, experts="4 bits",
        joins=True,
    ),
    "qwen3_moe": Family(
        "Qwen3 with experts", "qwen3_moe", _ATTENTION,
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}, experts="4 bits",
        joins=True,
    ),
    "gpt_oss": Family(
        "gpt-oss", "gpt_oss", _ATTENTION,
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64},
        experts="4 bits",
    ),
}  # fmt: skip

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
    "vit": Encoder("ViT", "vit", "AutoModel", "q_proj k_proj v_proj o_proj fc1 fc2", _VISION, takes_images=True),
}  # fmt: skip


def page() -> str:
    """docs/models.md with the tables of today."""
    text = PAGE.read_text(encoding="utf-8")
    columns = "| family | `model_type` | `all-linear` adapts | 4-bit weights |"
    more = " packing, `prefix_once` | continuous batches | GGUF | limits |"
    for name, title, members in (("families", columns + more, FAMILIES), ("encoders", columns, ENCODERS)):
        rows = [f"| {' | '.join(one.row())} |" for one in members.values()]
        text = with_table(text, name, "\n".join([title, "|" + "---|" * (title.count("|") - 1), *rows]))
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
