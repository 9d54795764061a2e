"""How many tokens a model takes that has a learned table of positions, such as GPT-2, OPT and BERT."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from qvera.models.structure import decoder_of
from qvera.utils.errors import InputError

_TABLES = ("wpe", "embed_positions", "position_embeddings", "position_embedding")


def position_limit(model: nn.Module) -> int | None:
    """The most tokens of a row; None for a model that computes its positions (RoPE, ALiBi).

    Of a model that takes images too the table of its text counts, which is in its decoder.
    """
    of_peft: Any = getattr(model, "get_base_model", None)
    inner: Any = model if of_peft is None else of_peft()
    backbone: nn.Module = inner if inner.get_output_embeddings() is None else decoder_of(inner)
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _TABLES:
            # OPT begins at its offset, RoBERTa behind the padding's position
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - int(getattr(module, "offset", unused))
    return None


def require_positions(model: nn.Module, lengths: np.ndarray) -> None:
    """Refuse rows that the model has no positions for.

    Args:
        lengths: tokens of each row.

    Raises:
        InputError: one is longer than `position_limit`.
    """
    limit = position_limit(model)
    if limit is not None and len(lengths) and lengths.max() > limit:
        raise InputError(
            f"data.max_length: a row has {lengths.max():,} tokens, and the model has positions for {limit:,}. Set it "
            f"to {limit} or less."
        )
