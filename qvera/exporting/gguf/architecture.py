"""How llama.cpp names a model's tensors and settings, and in which order it wants the rows of q and k.

What is written equals what llama.cpp's ``convert_hf_to_gguf.py`` writes for the same checkpoint.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import torch

from qvera.exporting.gguf.families import FAMILIES, head_size
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PretrainedConfig


_NOT_WRITTEN = re.compile(r"\.rotary_emb\.inv_freq$|(^|\.)(vision_tower|multi_modal_projector)\.")
_TEXT_MODEL = re.compile(r"(^|\.)language_model\.")
"""The part of a model of images and text that is written."""
_PAIRED = re.compile(r"\.(q|k)_proj\.(weight|bias)$")


class GgufArchitecture:
    """The layout of one model.

    Attributes:
        name: llama.cpp's name of the architecture.

    Raises:
        InputError: the architecture, or one of its settings, is none that has been compared with llama.cpp.
    """

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
        if (difference := self.family.difference(config)) is not None:
            raise _refused(f"{written} with {difference}")
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
        text_name = _TEXT_MODEL.sub(r"\1", name)
        found: str | None = self._names.get_name(text_name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise _refused(f"a tensor {name}")
        return found

    def is_paired(self, name: str) -> bool:
        """Whether the rows of ``name`` change places (`paired_rows`)."""
        return self.family.paired and _PAIRED.search(name) is not None

    def shifted(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """The rows of ``name`` as llama.cpp multiplies by them: a norm that adds one to its weight has it added."""
        is_norm = self.family.adds_one and name.endswith("norm.weight")
        return rows.float() + 1 if is_norm else rows

    def paired_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """All rows of q or k, in llama.cpp's order: element i of each head beside element i + half of it."""
        found = _PAIRED.search(name)
        assert found is not None
        heads = self.config.num_attention_heads if found[1] == "q" else self.config.num_key_value_heads
        halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
        return halves.transpose(1, 2).reshape(rows.shape)

    def extra_tensors(self) -> dict[str, torch.Tensor]:
        """Tensors that no checkpoint has: the factors by which Llama 3.1 and Phi-3 divide their rotary frequencies."""
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
        self.family.add_settings(config, writer)


def _refused(what: str, known: str = "") -> InputError:
    return InputError(
        f"--to gguf: {what} has not been compared with llama.cpp, so it is not written. Convert the merged export "
        f"(--to merged) with llama.cpp's convert_hf_to_gguf.py.{known}"
    )
