"""New projections every some steps: the phases of a run, and what happens between two of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvera.adapters.methods import method_of
from qvera.adapters.step_hook import StepHook
from qvera.data import planned_steps
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from qvera.adapters.config import QveraConfig
    from qvera.config.schema import Recipe


def phase_count(recipe: Recipe, rows: int) -> int:
    """How many phases a run over that many training rows has; 1 without ``training.resample_every``.

    Raises:
        InputError: the adapter's method has no phases.
    """
    every = recipe.training.resample_every
    if not every:
        return 1
    if not method_of(recipe.adapter).can_resample:
        raise InputError(
            f"training.resample_every: draws new projections of a seed, and adapter.method {recipe.adapter.method} "
            "has none to draw. Remove one of the two."
        )
    return max(1, -(-planned_steps(recipe, rows) // every))


def with_phases(recipe: Recipe, phases: int) -> Recipe:
    """The recipe of a run that takes as much as this one does in its last phase: all phases as groups of one rank."""
    if phases == 1:
        return recipe
    adapter = recipe.adapter.replace(rank=recipe.adapter.rank * phases, b_groups=phases)
    return recipe.replace(adapter=adapter, training=recipe.training.replace(resample_every=0))


class ResampleHook(StepHook):
    """Begins a phase every ``every`` steps; which one a step is in is a function of the step.

    A new phase begins with b = 0, d = d_initial and no optimizer state. Flora moves the momentum from the old subspace
    to the new one. For VeRA next to nothing would come over: the gradient of b_i is that of row i of W along one
    direction, s Aᵀ (d ⊙ B_i), and two such directions of n elements have a cosine of about 1 / √n. The gradient of the
    new d is 0 while its b is.
    """

    def __init__(
        self, config: QveraConfig, vectors: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, every: int
    ) -> None:
        self.config, self.vectors, self.optimizer, self.every = config, vectors, optimizer, every
        self._enter(0)

    def _enter(self, phase: int) -> None:
        self.config.current_phase = min(phase, len(self.config.seed_chain or ()) - 1)

    def before_step(self, step: int) -> None:
        """See `StepHook.before_step`."""
        self._enter((step - 1) // self.every)

    def after_step(self, step: int, loss_scale: float = 1.0) -> None:
        """See `StepHook.after_step`."""
        if step % self.every == 0 and self.config.current_phase != step // self.every:
            self._enter(step // self.every)
            for vector in self.vectors.values():
                self.optimizer.state.pop(vector, None)
