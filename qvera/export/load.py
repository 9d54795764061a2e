"""An exported checkpoint as a model to compare with: the one place that decides how, and how much memory that takes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ..shards import checkpoint_tensors


def load_exported(directory: Path, device: torch.device) -> Any:
    """The checkpoint as plain transformers loads it, in evaluation mode; in fp32 on a CPU."""
    # fp16 products are slow or missing on CPUs; fp32 shows the very numbers that the file holds
    dtype = "auto" if device.type == "cuda" else torch.float32
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, device_map={"": device}).eval()


def load_exported_bytes(directory: Path, device: torch.device) -> int:
    """Memory that `load_exported` takes on ``device``, from the checkpoint's headers."""
    entries = checkpoint_tensors(directory)
    if device.type == "cuda":
        return sum(file.stat().st_size for file in {e.file for e in entries})
    return 4 * sum(math.prod(e.shape) for e in entries)
