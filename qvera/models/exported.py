"""An exported checkpoint as a model to compare with: the one place that decides how, and how much memory that takes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qvera.models.mmap import NotMappable, load_mapped
from qvera.utils.safetensors_io import checkpoint_tensors


def load_exported(directory: Path, device: torch.device) -> Any:
    """The checkpoint in evaluation mode: as plain transformers loads it on CUDA, mapped and computing in fp32 on a CPU.

    fp16 products are slow or missing on CPUs; in fp32 the numbers are the very ones that the file holds.
    """
    if device.type == "cuda":
        return AutoModelForCausalLM.from_pretrained(directory, dtype="auto", device_map={"": device}).eval()
    try:
        return load_mapped(directory, AutoConfig.from_pretrained(directory), torch.float32, device)
    except NotMappable:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def load_exported_bytes(directory: Path, device: torch.device) -> int:
    """Memory that `load_exported` takes on ``device``, from the checkpoint's headers; mapped, one cast weight at a time."""
    entries = checkpoint_tensors(directory)
    if device.type == "cuda":
        return sum(file.stat().st_size for file in {e.file for e in entries})
    return 4 * max(math.prod(e.shape) for e in entries)
