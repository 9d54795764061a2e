"""Which masks a decoder's attention needs.

A batch is padded on the right. In a causal decoder no token sees a later one, so no token of a row sees the padding
behind it, and what the padding computes reaches neither loss nor gradient. Such a batch needs no mask. Without one,
attention takes its fastest kernel: transformers makes no mask [B, 1, T, T], sdpa repeats no grouped keys and values,
and no layer waits for the device to look at the mask.
"""

from __future__ import annotations

from transformers import PreTrainedModel

_CAUSAL = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt2", "gpt_neox", "olmo2",
    "granite", "stablelm", "cohere", "smollm3", "opt", "falcon",
)  # fmt: skip
"""Model types whose loss and gradients are the same to the bit without a padding mask in fp32; each is tested."""


def needs_padding_mask(model: PreTrainedModel) -> bool:
    """Whether right padding has to be masked: for each model that is not known to look at earlier tokens only.

    A model with experts keeps its mask too: the padding's tokens change the order in which an expert adds.
    """
    config = model.config
    two_way = getattr(config, "use_bidirectional_attention", None) or getattr(config, "is_causal", None) is False
    own_code = not type(model).__module__.startswith("transformers.")
    return config.model_type not in _CAUSAL or bool(two_way) or own_code
