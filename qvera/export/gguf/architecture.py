"""How llama.cpp names a model's tensors and settings, and in which order it wants the rows of q and k.

What is written equals what llama.cpp's ``convert_hf_to_gguf.py`` writes for the same checkpoint.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PretrainedConfig


class Architecture(NamedTuple):
    """What llama.cpp calls it, and whether its q and k have the rows of a head as pairs (Llama's first release)."""

    name: str
    paired: bool


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", True),
    "MistralForCausalLM": Architecture("llama", True),
    "Qwen2ForCausalLM": Architecture("qwen2", False),
    "Qwen3ForCausalLM": Architecture("qwen3", False),
}
"""Those whose files a test has loaded in llama.cpp and compared with transformers."""
_NOT_WRITTEN = re.compile(r"\.rotary_emb\.inv_freq$")
_PAIRED = re.compile(r"\.(q|k)_proj\.(weight|bias)$")


class GgufArchitecture:
    """The layout of one model.

    Attributes:
        name: llama.cpp's name of the architecture.

    Raises:
        InputError: the architecture, or one of its settings, is none that has been compared with llama.cpp.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config
        written = (config.architectures or ["?"])[0]
        if written not in ARCHITECTURES:
            raise _refused(f"{written}; here {', '.join(ARCHITECTURES)} are written")
        self.name, self.paired = ARCHITECTURES[written]
        self.head_size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.rope: dict[str, Any] = dict(config.rope_parameters or {})
        if self.rope.get("rope_type", "default") not in ("default", "linear", "yarn", "llama3"):
            raise _refused(f"{written} with rope_type {self.rope['rope_type']}")
        if getattr(config, "hidden_act", "silu") != "silu":
            raise _refused(f"{written} with hidden_act {config.hidden_act}")
        import gguf

        number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.name)
        self._names = gguf.get_tensor_name_map(number, config.num_hidden_layers)

    def tensor_name(self, name: str) -> str | None:
        """llama.cpp's name of the checkpoint's tensor ``name``; None for one that it computes itself.

        Raises:
            InputError: it has no name for it.
        """
        if _NOT_WRITTEN.search(name):
            return None
        found: str | None = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise _refused(f"a tensor {name}")
        return found

    def is_paired(self, name: str) -> bool:
        """Whether the rows of ``name`` change places (`paired_rows`)."""
        return self.paired and _PAIRED.search(name) is not None

    def paired_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """All rows of q or k, in llama.cpp's order: element i of each head beside element i + half of it."""
        found = _PAIRED.search(name)
        assert found is not None
        heads = self.config.num_attention_heads if found[1] == "q" else self.config.num_key_value_heads
        halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
        return halves.transpose(1, 2).reshape(rows.shape)

    def extra_tensors(self) -> dict[str, torch.Tensor]:
        """Tensors that no checkpoint has: the factors by which Llama 3.1 divides its rotary frequencies."""
        if self.rope.get("rope_type") != "llama3":
            return {}
        frequencies = 1.0 / (self.rope["rope_theta"] ** (torch.arange(0, self.head_size, 2).float() / self.head_size))
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
        # llama.cpp gives these architectures no sliding window: within one window the answers are the same
        context = min(config.max_position_embeddings, getattr(config, "sliding_window", None) or math.inf)
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
            writer.add_key_length(self.head_size)
            writer.add_value_length(self.head_size)
        if self.name == "llama":
            writer.add_vocab_size(config.vocab_size)
            writer.add_rope_dimension_count(self.head_size)


def _refused(what: str) -> InputError:
    return InputError(
        f"--to gguf: {what} has not been compared with llama.cpp, so it is not written. Convert the merged export "
        "(--to merged) with llama.cpp's convert_hf_to_gguf.py."
    )
