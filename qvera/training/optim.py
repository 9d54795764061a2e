"""Optimizer and learning-rate schedule of a recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.amp import GradScaler
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from qvera.config.lr_range import LrRange
from qvera.config.schema import Recipe, TrainingSection
from qvera.models.bitsandbytes_import import bitsandbytes
from qvera.utils import accelerator
from qvera.utils.errors import InputError
from qvera.utils.formatting import first_of

if TYPE_CHECKING:
    from torch import nn
    from torch.optim.lr_scheduler import LRScheduler


def build_optimizer(
    section: TrainingSection, vectors: dict[str, nn.Parameter], rate_factors: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """AdamW over the vectors, torch's own or one of bitsandbytes' by its recipe name.

    ``rate_factors``: vector name → its learning rate relative to ``training.learning_rate``; without an entry 1. Each
    factor is a parameter group, that of 1 the first, and says so as ``rate_factor``.

    Raises:
        InputError: a paged optimizer was asked for without CUDA.
    """
    settings: dict[str, Any] = {
        "lr": section.learning_rate,
        "betas": (section.adam_beta1, section.adam_beta2),
        "eps": section.adam_epsilon,
        "weight_decay": section.weight_decay,
    }
    by_factor: dict[float, list[nn.Parameter]] = {}
    for name, vector in vectors.items():
        by_factor.setdefault((rate_factors or {}).get(name, 1.0), []).append(vector)
    groups: list[dict[str, Any]] = [
        {"params": by_factor[factor], "lr": section.learning_rate * factor, "rate_factor": factor}
        for factor in sorted(by_factor, key=lambda factor: (factor != 1.0, factor))
    ]
    if section.optim == "adamw":
        return torch.optim.AdamW(groups, **settings)
    if section.optim.startswith("paged") and not accelerator.pages_optimizer_state():
        raise InputError(
            f"training.optim: {section.optim} pages its state through CUDA, and there is no GPU here; use adamw."
        )
    classes = {
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "paged_adamw": bitsandbytes.optim.PagedAdamW,
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
    }
    return classes[section.optim](groups, **settings)


def require_all_stepped(optimizer: torch.optim.Optimizer, vectors: Mapping[str, nn.Parameter], recipe: Recipe) -> None:
    """Refuse (InputError) a method's own optimizer that leaves out a tensor to train, such as a task's head."""
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if left_out := [name for name, vector in vectors.items() if id(vector) not in stepped]:
        raise InputError(
            f"adapter.method: {recipe.adapter.method} steps its own tensors only, and task: {recipe.task} trains "
            f"{first_of(left_out)} too. Use another method."
        )


def build_scaler(section: TrainingSection, dtype: torch.dtype, device: torch.device) -> GradScaler | None:
    """Dynamic loss scaling for a run that computes in float16 (Micikevicius et al., arXiv 1710.03740); None for others.

    Gradients below 6e-8 are zero in float16. The scale lifts them above that in the backward pass, and the gradients
    of the fp32 vectors are divided by it again.
    """
    if dtype != torch.float16:
        return None
    return GradScaler(
        device.type, init_scale=2.0**section.initial_scale_power, growth_interval=section.loss_scale_window
    )


def current_rate(schedule: LRScheduler) -> float:
    """What ``training.learning_rate`` is now by its schedule: the rate of a parameter group whose factor is 1."""
    return float(schedule.get_last_lr()[0]) / schedule.optimizer.param_groups[0].get("rate_factor", 1.0)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state as it is held, counting a tensor that several vectors share once."""
    held = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }
    return sum(held.values())


def build_schedule(section: TrainingSection, optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """The learning rate over ``steps`` optimizer steps: a cosine, linear or constant schedule as in transformers.

    The warm-up differs from transformers' in one thing. There the first of w steps has rate 0 and changes nothing; here
    step i (from 0) has the share (i + 1) / (w + 1) of ``learning_rate``. Step w has all of it in both.
    """
    return LambdaLR(optimizer, lr_lambda(section, steps))


def lr_lambda(section: TrainingSection, steps: int) -> Callable[[int], float]:
    """What share of ``learning_rate`` each of ``steps`` optimizer steps (from 0) has, as `build_schedule` says."""
    warmup = section.warmup_steps or math.ceil(section.warmup_ratio * steps)
    name = "constant_with_warmup" if section.lr_scheduler_type == "constant" else section.lr_scheduler_type
    unused = torch.optim.SGD([torch.zeros(1)])  # transformers makes its functions for an optimizer only
    share = get_scheduler(name, unused, warmup, steps).lr_lambdas[0]
    return lambda step: (step + 1) / (warmup + 1) if step < warmup else share(step)


def build_range_test(section: TrainingSection, optimizer: torch.optim.Optimizer, ramp: LrRange) -> LambdaLR:
    """Rates that grow by the same factor each step, from ``ramp.start`` to ``ramp.end``, in place of `build_schedule`.

    They are what ``training.learning_rate`` would be.
    """
    growth = (ramp.end / ramp.start) ** (1 / (ramp.steps - 1))
    first = ramp.start / section.learning_rate
    return LambdaLR(optimizer, lambda step: first * growth**step)
