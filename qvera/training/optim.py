"""Optimizer and learning-rate schedule of a recipe."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from qvera.config.schema import RangeTest, TrainingSection
from qvera.models import quantization
from qvera.utils.errors import InputError


def build_optimizer(section: TrainingSection, vectors: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW over the vectors, torch's own or one of bitsandbytes' by its recipe name.

    Raises:
        InputError: a paged optimizer was asked for without CUDA.
    """
    settings: dict[str, Any] = {
        "lr": section.learning_rate,
        "betas": (section.adam_beta1, section.adam_beta2),
        "eps": section.adam_epsilon,
        "weight_decay": section.weight_decay,
    }
    groups: list[dict[str, Any]] = [{"params": list(vectors.values())}]
    if section.optim == "adamw":
        return torch.optim.AdamW(groups, **settings)
    if section.optim.startswith("paged") and not torch.cuda.is_available():
        raise InputError(
            f"training.optim: {section.optim} pages its state through CUDA, and there is no GPU here; use adamw."
        )
    return quantization.bitsandbytes_optimizer(section.optim, groups, **settings)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state as it is held, counting a tensor that several vectors share once."""
    held = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }
    return sum(held.values())


def build_schedule(section: TrainingSection, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """The learning-rate schedule over ``steps`` optimizer steps (transformers' cosine, linear or constant, with warmup)."""
    warmup = section.warmup_steps or math.ceil(section.warmup_ratio * steps)
    name = "constant_with_warmup" if section.lr_scheduler_type == "constant" else section.lr_scheduler_type
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)


def build_ramp(section: TrainingSection, optimizer: torch.optim.Optimizer, ramp: RangeTest) -> Any:
    """Rates that grow by the same factor each step, from ``ramp.start`` to ``ramp.end``, in the place of `build_schedule`.

    They are what ``training.learning_rate`` would be.
    """
    growth = (ramp.end / ramp.start) ** (1 / (ramp.steps - 1))
    first = ramp.start / section.learning_rate
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: first * growth**step)
