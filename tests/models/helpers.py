"""Checkpoints in 4 bits as stock transformers makes them, and the loss of labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qvera.data import IGNORED
from qvera.models.loss import Head, states_at, target_loss
from tests.conftest import small_tokenizer


def stock_load(source: Path, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Any:
    """Quantized by transformers while it loads: NF4 with double quantization, unless ``settings`` say otherwise."""
    wanted = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    config = BitsAndBytesConfig(load_in_4bit=True, **{**wanted, **settings})
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, quantization_config=config)


def stock_four_bit(source: Path, out: Path, **settings: Any) -> Path:
    """The same, saved, with a tokenizer."""
    stock_load(source, **settings).save_pretrained(out)
    small_tokenizer().save_pretrained(out)
    return out


def summed_loss(
    hidden: torch.Tensor, labels: torch.Tensor, head: Head, chunk_tokens: int, **more: Any
) -> tuple[torch.Tensor, int]:
    """The `target_loss` of hidden states [B, T, hidden] for labels [B, T], and how many of these count."""
    row, place = torch.nonzero(labels[:, 1:] != IGNORED, as_tuple=True)
    places = row * labels.shape[1] + place
    targets = labels.reshape(-1, 1)[places + 1]
    return target_loss(states_at(hidden, places), targets, head, chunk_tokens, **more)[0], len(places)
