"""How much memory the keys and values of running requests take."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qvera.serve.requests import EngineSettings
from qvera.utils import accelerator, memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAGE_TOKENS = 16
"""Tokens of a page, and so of what is shared: a common prefix of fewer is computed again."""


def cache_tokens(model: PreTrainedModel, settings: EngineSettings, dtype: torch.dtype) -> int:
    """How many tokens' keys and values are kept: as the settings say, or what an eighth of the free memory holds.

    Half of it on an accelerator with memory of its own. At most what all running requests can fill.
    """
    if settings.cache_tokens is not None:
        return settings.cache_tokens
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # keys and values in the cache, a column of the attention mask, and what transformers adds for each token
    activations = (2 * config.num_attention_heads + heads) * size
    token_bytes = (config.num_hidden_layers * 2 * heads * size + settings.step_tokens + activations) * dtype.itemsize
    share = 2 if accelerator.has_own_memory(model.device) else 8
    fits = memory.available_bytes(model.device) // share // token_bytes
    return max(PAGE_TOKENS, min(fits, settings.max_running * config.max_position_embeddings))
