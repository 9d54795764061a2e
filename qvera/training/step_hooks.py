"""The step hooks of a run, as its recipe asks for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvera.adapters.methods import method_of
from qvera.adapters.step_hook import StepHook, StepHooks

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from qvera.config.schema import Recipe


def build_hooks(recipe: Recipe, model: PeftModel, optimizer: torch.optim.Optimizer) -> StepHooks:
    """What a run does between its optimizer steps.

    Args:
        model: base and adapter.
        optimizer: over the adapter's trained vectors; under ZeRO DeepSpeed steps copies of these.
    """
    hooks: dict[str, StepHook] = {}
    if (own := method_of(recipe.adapter).step_hook(model, recipe, optimizer)) is not None:
        hooks[recipe.adapter.method] = own
    return StepHooks(hooks)
