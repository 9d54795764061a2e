"""Checkpoints in 4 bits as stock transformers makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

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
