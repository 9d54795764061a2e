"""The step hooks of a run, as its recipe asks for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvera.adapters.methods import method_of
from qvera.adapters.stepping.step_hook import StepHook, StepHooks
from qvera.data import BilevelBatches
from qvera.training.bilevel import BilevelHook
from qvera.training.engine import trained_vectors
from qvera.training.resample import ResampleHook

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from qvera.config.schema import Recipe
    from qvera.data import Batches
    from qvera.distributed.group import Group


def build_hooks(
    recipe: Recipe, model: PeftModel, optimizer: torch.optim.Optimizer, batches: Batches, steps: int, group: Group
) -> StepHooks:
    """What a run does between its optimizer steps.

    Args:
        model: base and adapter.
        optimizer: over the adapter's trained vectors; under ZeRO DeepSpeed steps copies of these.
        batches: the rows of each step.
        steps: how many the run has.
        group: its processes.

    Raises:
        InputError: what the recipe asks for does not fit the adapter's method.
    """
    hooks: dict[str, StepHook] = {}
    method = method_of(recipe.adapter)
    if (own := method.step_hook(model, recipe, optimizer, steps, group)) is not None:
        hooks[recipe.adapter.method] = own
    if isinstance(batches, BilevelBatches):
        hooks["bilevel"] = BilevelHook(batches, trained_vectors(model), method)
    if model.peft_config["default"].seed_chain:
        hooks["resample"] = ResampleHook(model, optimizer, recipe.training)
    return StepHooks(hooks)
