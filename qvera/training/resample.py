"""New projections every some steps: the phases of a run, and what happens between two of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from qvera.adapters.factors import Factors
from qvera.adapters.hooks import SCHEDULES, TrainingHook
from qvera.adapters.layer import QveraLinear
from qvera.config.schema.adapter import MOST_RANK
from qvera.data import planned_steps
from qvera.training.momentum import carried_share
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from peft import PeftModel

    from qvera.adapters.config import QveraConfig
    from qvera.config.schema import Recipe, TrainingSection


def phase_count(recipe: Recipe, rows: int) -> int:
    """How many phases a run over that many training rows has; 1 without ``training.resample_every``.

    Raises:
        InputError: they come to a larger rank than an adapter may have.
    """
    every = recipe.training.resample_every
    if not every:
        return 1
    phases = max(1, -(-planned_steps(recipe, rows) // every))
    if phases * recipe.adapter.rank > MOST_RANK:
        raise InputError(
            f"training.resample_every: {phases} phases of rank {recipe.adapter.rank:,} are one adapter of rank "
            f"{phases * recipe.adapter.rank:,}, and {MOST_RANK:,} is the most. Raise it, or lower adapter.rank."
        )
    return phases


def with_phases(recipe: Recipe, phases: int) -> Recipe:
    """The recipe of a run that takes as much as this one does in its last phase: all phases as groups of one rank."""
    if not recipe.training.resample_every:
        return recipe
    adapter = recipe.adapter.replace(rank=recipe.adapter.rank * phases, b_groups=phases)
    return recipe.replace(
        adapter=adapter, training=recipe.training.replace(resample_every=0, resample_momentum="clear")
    )


class ResampleHook(TrainingHook):
    """Begins a phase every ``every`` steps; which one a step is in is a function of the step.

    A new phase begins with b = 0 and d = d_initial, and without optimizer state, or with what `move_state` makes of it.
    """

    def __init__(self, model: PeftModel, optimizer: torch.optim.Optimizer, training: TrainingSection) -> None:
        self.config: QveraConfig = model.peft_config["default"]
        self.layers = [m for m in model.modules() if isinstance(m, QveraLinear) and m.carries("default")]
        self.optimizer, self.every = optimizer, training.resample_every
        self.moves = training.resample_momentum == "move"
        self._enter(0)

    def state_dict(self) -> dict[str, Any]:
        """The phase: it is what a run that goes on after its last step is scored with."""
        return {"phase": self.config.current_phase}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `TrainingHook.load_state_dict`."""
        self._enter(state.get("phase", 0))

    def _enter(self, phase: int) -> None:
        self.config.current_phase = min(phase, len(self.config.seed_chain or ()) - 1)

    def before_step(self, step: int) -> None:
        """See `TrainingHook.before_step`."""
        self._enter((step - 1) // self.every)

    def after_step(self, step: int, loss_scale: float = 1.0) -> None:
        """See `TrainingHook.after_step`."""
        before = self.config.current_phase
        self._enter(step // self.every)
        if self.config.current_phase == before:
            return
        for layer in self.layers:
            if self.moves:
                move_state(layer, self.config, self.optimizer)
            else:
                for vector in layer.vectors("default").values():
                    self.optimizer.state.pop(vector, None)


@torch.no_grad()
def move_state(layer: QveraLinear, config: QveraConfig, optimizer: torch.optim.Optimizer) -> None:
    """AdamW's state of a linear for the phase that has just begun, made of that of the phase before.

    The momentum of b goes over as far as the new subspace has it (`momentum.carried_share`). d has no gradient while
    the new b is 0, so its momentum begins at 0. The second moments stay: they are sizes, and the new directions are as
    long as the old ones.
    """
    phase, rank = config.current_phase, config.rank // config.b_groups
    assert phase
    both = layer.parts("default")
    assert both.d is not None
    parts = [
        Factors(both.A[at : at + rank], both.B[:, at : at + rank], both.d[at : at + rank], scale=both.scale)
        for at in ((phase - 1) * rank, phase * rank)
    ]
    share = carried_share(*parts)
    for name, vector in layer.vectors("default").items():
        if not (state := optimizer.state.get(vector)):
            continue
        momentum, squares = (state[key].view(config.b_groups, -1) for key in ("exp_avg", "exp_avg_sq"))
        momentum[phase] = share.to(momentum.dtype) * momentum[phase - 1] if name == "qvera_b" else 0.0
        momentum[phase - 1] = 0.0
        squares[phase] = squares[phase - 1]


def _hook(training: Any) -> ResampleHook | None:
    if not training.model.peft_config["default"].seed_chain:
        return None
    return ResampleHook(training.model, training.optimizer, training.recipe.training)


SCHEDULES["resample"] = _hook
