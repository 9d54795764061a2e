"""The model classes that are written as GGUF, and what llama.cpp has to be told of each.

Whatever a model's config says that llama.cpp can't be told, and decides in its own way, is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PretrainedConfig

_ROPE_TYPES = ("default", "linear", "yarn", "llama3")
_GEMMA_ACTIVATION = "gelu_pytorch_tanh"


def _nothing(config: PretrainedConfig) -> str | None:
    return None


def _no_settings(config: PretrainedConfig, writer: GGUFWriter) -> None:
    pass


@dataclass(frozen=True)
class Family:
    """How llama.cpp holds the models of one class of transformers.

    Attributes:
        name: llama.cpp's name of the architecture.
        paired: q and k have the rows of a head as pairs (Llama's first release).
        adds_one: its norms multiply by 1 + weight, and llama.cpp's by the weight.
        activation: of its MLP, the only one that llama.cpp has for it.
        rope_types: that were compared.
        slides: llama.cpp knows its sliding attention. Where it does not, a context is no longer than the window.
        difference: a config → what it has otherwise than llama.cpp; None: nothing.
        add_settings: writes the settings that this architecture has beside the usual ones.
    """

    name: str
    paired: bool = False
    adds_one: bool = False
    activation: str = "silu"
    rope_types: tuple[str, ...] = _ROPE_TYPES
    slides: bool = False
    difference: Callable[[PretrainedConfig], str | None] = _nothing
    add_settings: Callable[[PretrainedConfig, GGUFWriter], None] = _no_settings


def _of_llama(config: PretrainedConfig, writer: GGUFWriter) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head_size(config))


def _of_granite(config: PretrainedConfig, writer: GGUFWriter) -> None:
    _of_llama(config, writer)
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def _smollm3_difference(config: PretrainedConfig) -> str | None:
    if config.use_sliding_window:
        return "use_sliding_window"
    layers = [int((number + 1) % 4 != 0) for number in range(config.num_hidden_layers)]
    return None if list(config.no_rope_layers) == layers else f"no_rope_layers {config.no_rope_layers}"


def _sliding_difference(config: PretrainedConfig, every: int, largest: int) -> str | None:
    """Of Gemma 2 and 3, whose sliding layers and attention's scale llama.cpp knows by the number of layers alone."""
    layers = [("full" if (n + 1) % every == 0 else "sliding") + "_attention" for n in range(config.num_hidden_layers)]
    if list(config.layer_types) != layers:
        return f"layer_types {config.layer_types}"
    is_largest = config.num_hidden_layers == largest
    scaled_by = config.hidden_size // config.num_attention_heads if is_largest else config.head_dim
    scalar = config.query_pre_attn_scalar
    return None if scalar == scaled_by else f"query_pre_attn_scalar {scalar} (not {scaled_by})"


def _gemma2_difference(config: PretrainedConfig) -> str | None:
    return _sliding_difference(config, 2, 46)


def _gemma3_difference(config: PretrainedConfig) -> str | None:
    sliding = config.rope_parameters["sliding_attention"]
    if sliding.get("rope_type", "default") != "default":
        return f"rope_type {sliding['rope_type']} of sliding layers"
    if config.attn_logit_softcapping is not None:
        return f"attn_logit_softcapping {config.attn_logit_softcapping}"
    if config.use_bidirectional_attention:
        return "use_bidirectional_attention"
    return _sliding_difference(config, 6, 62)


def _of_gemma2(config: PretrainedConfig, writer: GGUFWriter) -> None:
    writer.add_sliding_window(config.sliding_window)
    if config.attn_logit_softcapping is not None:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if config.final_logit_softcapping is not None:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _of_gemma3(config: PretrainedConfig, writer: GGUFWriter) -> None:
    _of_gemma2(config, writer)
    writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])


def _of_phi3(config: PretrainedConfig, writer: GGUFWriter) -> None:
    rope = config.rope_parameters
    writer.add_rope_dimension_count(int(head_size(config) * rope.get("partial_rotary_factor", 1.0)))
    writer.add_sliding_window(0)  # its attention does not slide in llama.cpp
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    writer.add_rope_scaling_orig_ctx_len(original)
    if rope.get("rope_type") == "longrope":
        scale = config.max_position_embeddings / original
        factor = rope.get("attention_factor")
        if factor is None:
            factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        writer.add_rope_scaling_attn_factors(factor)


def head_size(config: PretrainedConfig) -> int:
    """Numbers of a head of queries."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


FAMILIES = {
    "LlamaForCausalLM": Family("llama", paired=True, add_settings=_of_llama),
    "MistralForCausalLM": Family("llama", paired=True, add_settings=_of_llama),
    "Qwen2ForCausalLM": Family("qwen2"),
    "Qwen3ForCausalLM": Family("qwen3"),
    "GraniteForCausalLM": Family("granite", paired=True, add_settings=_of_granite),
    "SmolLM3ForCausalLM": Family("smollm3", paired=True, difference=_smollm3_difference, add_settings=_of_llama),
    "Olmo2ForCausalLM": Family("olmo2"),
    "Phi3ForCausalLM": Family("phi3", rope_types=("default", "longrope"), add_settings=_of_phi3),
    "GemmaForCausalLM": Family("gemma", adds_one=True, activation=_GEMMA_ACTIVATION, rope_types=("default",)),
    "Gemma2ForCausalLM": Family(
        "gemma2", adds_one=True, activation=_GEMMA_ACTIVATION, rope_types=("default",), slides=True,
        difference=_gemma2_difference, add_settings=_of_gemma2,
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3", adds_one=True, activation=_GEMMA_ACTIVATION, rope_types=("default", "linear"), slides=True,
        difference=_gemma3_difference, add_settings=_of_gemma3,
    ),
}  # fmt: skip
"""Those whose files a test has loaded in llama.cpp and compared with transformers."""
FAMILIES["Gemma3ForConditionalGeneration"] = FAMILIES["Gemma3ForCausalLM"]  # its text model alone
