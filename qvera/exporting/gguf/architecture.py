"""The models that are written as GGUF: llama.cpp's names of tensors and settings, and its order of q and k.

The result equals that of llama.cpp's ``convert_hf_to_gguf.py``. Settings that llama.cpp would ignore are refused.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Family:
    """How llama.cpp holds the models of one transformers class."""

    name: str
    paired: bool = False  # the rows of a head of q and k are in pairs (Llama's first release)
    adds_one: bool = False  # transformers multiplies norms by 1 + weight, and llama.cpp by the weight
    activation: str = "silu"  # of the MLP; llama.cpp has no other for it
    rope_types: tuple[str, ...] = ("default", "linear", "yarn", "llama3")  # those that were compared
    slides: bool = False  # llama.cpp has its sliding attention. Otherwise the context is limited to the window


def head_size(config: PretrainedConfig) -> int:
    """Elements of a head of queries."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


_GEMMA: dict[str, Any] = {"adds_one": True, "activation": "gelu_pytorch_tanh"}
FAMILIES = {
    "LlamaForCausalLM": Family("llama", paired=True),
    "MistralForCausalLM": Family("llama", paired=True),
    "Qwen2ForCausalLM": Family("qwen2"),
    "Qwen3ForCausalLM": Family("qwen3"),
    "GraniteForCausalLM": Family("granite", paired=True),
    "SmolLM3ForCausalLM": Family("smollm3", paired=True),
    "Olmo2ForCausalLM": Family("olmo2"),
    "Phi3ForCausalLM": Family("phi3", rope_types=("default", "longrope")),
    "GemmaForCausalLM": Family("gemma", rope_types=("default",), **_GEMMA),
    "Gemma2ForCausalLM": Family("gemma2", rope_types=("default",), slides=True, **_GEMMA),
    "Gemma3ForCausalLM": Family("gemma3", rope_types=("default", "linear"), slides=True, **_GEMMA),
}
"""A test has loaded files of each in llama.cpp and compared it with transformers."""
FAMILIES["Gemma3ForConditionalGeneration"] = FAMILIES["Gemma3ForCausalLM"]  # its text model alone


def _difference(name: str, config: PretrainedConfig) -> str | None:
    """What llama.cpp would do otherwise, since it derives this from the family and the number of layers."""
    numbers = range(1, config.num_hidden_layers + 1)
    if name == "smollm3":
        if config.use_sliding_window:
            return "use_sliding_window"
        same = list(config.no_rope_layers) == [int(number % 4 != 0) for number in numbers]
        return None if same else f"no_rope_layers {config.no_rope_layers}"
    if name == "gemma3":
        sliding = config.rope_parameters["sliding_attention"]
        if sliding.get("rope_type", "default") != "default":
            return f"rope_type {sliding['rope_type']} of sliding layers"
        if config.attn_logit_softcapping is not None:
            return f"attn_logit_softcapping {config.attn_logit_softcapping}"
        if config.use_bidirectional_attention:
            return "use_bidirectional_attention"
    if name in ("gemma2", "gemma3"):
        every, largest = {"gemma2": (2, 46), "gemma3": (6, 62)}[name]
        layers = [("sliding" if number % every else "full") + "_attention" for number in numbers]
        if list(config.layer_types) != layers:
            return f"layer_types {config.layer_types}"
        is_largest = config.num_hidden_layers == largest
        scaled_by = config.hidden_size // config.num_attention_heads if is_largest else config.head_dim
        scalar = config.query_pre_attn_scalar
        return None if scalar == scaled_by else f"query_pre_attn_scalar {scalar} (not {scaled_by})"
    return None


_NOT_WRITTEN = re.compile(r"\.rotary_emb\.inv_freq$|(^|\.)(vision_tower|multi_modal_projector)\.")
_TEXT_MODEL = re.compile(r"(^|\.)language_model\.")  # only this part of a model of images and text is written
_PAIRED = re.compile(r"\.(q|k)_proj\.(weight|bias)$")


class GgufArchitecture:
    """The layout of one model. InputError: the architecture or a setting was never compared with llama.cpp."""

    def __init__(self, config: PretrainedConfig) -> None:
        written = (config.architectures or ["?"])[0]
        self.config = config = config.get_text_config()
        if written not in FAMILIES:
            raise _refused(written, f" What is written: {', '.join(FAMILIES)}.")
        self.family = FAMILIES[written]
        self.name = self.family.name
        rope = config.rope_parameters or {}
        self.rope: dict[str, Any] = dict(rope.get("full_attention", rope))
        if self.rope.get("rope_type", "default") not in self.family.rope_types:
            raise _refused(f"{written} with rope_type {self.rope['rope_type']}")
        activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "silu")
        if activation != self.family.activation:
            raise _refused(f"{written} with hidden_act {activation}")
        if (difference := _difference(self.name, config)) is not None:
            raise _refused(f"{written} with {difference}")
        import gguf

        number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.name)
        self._names = gguf.get_tensor_name_map(number, config.num_hidden_layers)

    def tensor_name(self, name: str) -> str | None:
        """llama.cpp's name of a tensor; None for one that it computes itself. InputError: it has none."""
        if _NOT_WRITTEN.search(name):
            return None
        text_name = _TEXT_MODEL.sub(r"\1", name)
        found: str | None = self._names.get_name(text_name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise _refused(f"a tensor {name}")
        return found

    def is_paired(self, name: str) -> bool:
        """Whether its rows change places (`paired_rows`)."""
        return self.family.paired and _PAIRED.search(name) is not None

    def paired_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """All rows of q or k in llama.cpp's order: element i of a head beside element i + half."""
        found = _PAIRED.search(name)
        assert found is not None
        heads = self.config.num_attention_heads if found[1] == "q" else self.config.num_key_value_heads
        halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
        return halves.transpose(1, 2).reshape(rows.shape)

    def extra_tensors(self) -> dict[str, torch.Tensor]:
        """Factors by which Llama 3.1 and Phi-3 divide rotary frequencies; checkpoints do not have them."""
        if self.rope.get("rope_type") == "longrope":
            return {
                f"rope_factors_{kind}.weight": torch.tensor(self.rope[f"{kind}_factor"]) for kind in ("long", "short")
            }
        if self.rope.get("rope_type") != "llama3":
            return {}
        size = head_size(self.config)
        frequencies = 1.0 / (self.rope["rope_theta"] ** (torch.arange(0, size, 2).float() / size))
        factor, low, high = (self.rope[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
        context = self.rope["original_max_position_embeddings"]
        factors = []
        for frequency in frequencies.tolist():
            length = 2 * math.pi / frequency
            smooth = min(max((context / length - low) / (high - low), 0.0), 1.0)
            factors.append(1 / ((1 - smooth) / factor + smooth))
        return {"rope_freqs.weight": torch.tensor(factors)}

    def add_settings(self, writer: GGUFWriter) -> None:
        """Write the model's sizes and settings."""
        import gguf

        config, rope = self.config, self.rope
        window = None if self.family.slides else getattr(config, "sliding_window", None)
        # where llama.cpp's attention does not slide, the answers are the same within one window
        context = min(config.max_position_embeddings, window or math.inf)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(int(context))
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(rope.get("rope_theta", 10_000.0))
        if rope.get("rope_type") in ("linear", "yarn"):
            writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
            writer.add_rope_scaling_factor(rope["factor"])
        if rope.get("rope_type") == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            for key, add in (
                ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
                ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
                ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
            ):
                if rope.get(key) is not None:
                    add(rope[key])
        if getattr(config, "head_dim", None):
            writer.add_key_length(config.head_dim)
            writer.add_value_length(config.head_dim)
        if self.name in ("llama", "granite", "smollm3"):
            writer.add_vocab_size(config.vocab_size)
            writer.add_rope_dimension_count(head_size(config))
        if self.name == "granite":
            writer.add_attention_scale(config.attention_multiplier)
            writer.add_embedding_scale(config.embedding_multiplier)
            writer.add_residual_scale(config.residual_multiplier)
            writer.add_logit_scale(config.logits_scaling)
        if self.name in ("gemma2", "gemma3"):
            writer.add_sliding_window(config.sliding_window)
            if config.attn_logit_softcapping is not None:
                writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
            if config.final_logit_softcapping is not None:
                writer.add_final_logit_softcapping(config.final_logit_softcapping)
        if self.name == "gemma3":
            writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
        if self.name == "phi3":
            rope = config.rope_parameters
            writer.add_rope_dimension_count(int(head_size(config) * rope.get("partial_rotary_factor", 1.0)))
            writer.add_sliding_window(0)  # its attention does not slide in llama.cpp
            original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
            writer.add_rope_scaling_orig_ctx_len(original)
            if rope.get("rope_type") == "longrope":
                scale, factor = config.max_position_embeddings / original, rope.get("attention_factor")
                if factor is None:
                    factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
                writer.add_rope_scaling_attn_factors(factor)


def _refused(what: str, known: str = "") -> InputError:
    return InputError(
        f"--to gguf: {what} has not been compared with llama.cpp, so it is not written. Convert the merged export "
        f"(--to merged) with llama.cpp's convert_hf_to_gguf.py.{known}"
    )
