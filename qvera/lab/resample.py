"""``training.resample_every``: VeRA in phases, each with a new random pair.

    ΔW = Σ_p s diag(b_p) B_p diag(d_p) A_p        A_p, B_p of seed p, all of rank r

One pair only reaches changes of rank r; the sum of all has rank p r. ReLoRA also merges and begins again, and Flora
(arXiv 2402.03293) draws new random subspaces. Nothing is merged into the base here, and the sum is an exact LoRA.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from qvera.adapters.config import QveraConfig
from qvera.adapters.factors import Factors
from qvera.adapters.hooks import TrainingHook
from qvera.adapters.layer import QveraLinear, adapted_layers
from qvera.adapters.methods.base import LinearSpec, Method, Tensors
from qvera.adapters.methods.vera import Vera
from qvera.adapters.projection import Pair, vera_scale
from qvera.config.plugins import Schedule
from qvera.config.sections import MOST_RANK
from qvera.data import planned_steps
from qvera.lab.keys import Settings
from qvera.utils.errors import InputError


class Resample(Schedule):
    """``training.resample_every``."""

    name = "resample"
    keys = ("training.resample_every",)

    def check(self, recipe: Any, method: Method) -> None:
        if recipe.adapter.method != Vera.name or recipe.adapter.magnitude:
            other = "adapter.magnitude" if recipe.adapter.magnitude else f"adapter.method {recipe.adapter.method}"
            raise InputError(
                f"training.resample_every: phases are VeRA's b and d alone, not with {other}. Remove one of the two."
            )

    def config(self, recipe: Any, rows: int) -> dict[str, Any]:
        section, phases = recipe.adapter, phase_count(recipe, rows)
        if phases == 1:
            return {}
        chain = [(section.seed + phase) % 2**64 for phase in range(phases)]
        return {"rank": section.rank * phases, "b_groups": phases, "seed_chain": chain}

    def whole(self, recipe: Any, rows: int) -> Any:
        section, training, phases = recipe.adapter, recipe.training, phase_count(recipe, rows)
        return recipe.replace(
            adapter=section.replace(rank=section.rank * phases, b_groups=phases),
            training=training.replace(resample_every=0, resample_momentum="clear"),
        )

    def note(self, recipe: Any) -> str:
        return (
            "This is the first phase alone: without the rows nobody knows how many training.resample_every makes. Set "
            "training.max_steps to plan all of them."
        )

    def hook(self, training: Any) -> ResampleHook | None:
        if not training.model.peft_config["default"].seed_chain:
            return None
        return ResampleHook(training.model, training.optimizer, training.recipe.training)


def phase_count(recipe: Any, rows: int) -> int:
    """Count the phases of a run. InputError if their ranks sum to too much."""
    phases = max(1, -(-planned_steps(recipe, rows) // recipe.training.resample_every))
    if phases * recipe.adapter.rank > MOST_RANK:
        raise InputError(
            f"training.resample_every: {phases} phases of rank {recipe.adapter.rank:,} are one adapter of rank "
            f"{phases * recipe.adapter.rank:,}, and {MOST_RANK:,} is the most. Raise it, or lower adapter.rank."
        )
    return phases


class VeraPhases(Vera):
    """VeRA whose vectors freeze at the end of a phase; the next phase has a new random pair and new vectors.

    Its tensors are those of VeRA with ``b_groups``: A [p r, n] and B [m, p r] hold the pairs of all seeds, d is [p r]
    and b [p, m]. The scale is that of rank r. Phases that have not begun are left out of the products.
    """

    peft_type = None

    def variant(self, adapter: Settings) -> VeraPhases:
        return self

    def rank_at(self, adapter: Settings, spec: LinearSpec) -> int:
        phases, current = _phases(adapter)
        return adapter.rank // phases * (current + 1)

    def factors(self, adapter: Settings, spec: LinearSpec, tensors: Tensors, pair: Pair | None) -> Factors:
        (phases, current), d, b = _phases(adapter), tensors["qvera_d"], tensors["qvera_b"]
        if getattr(adapter, "current_phase", None) is not None:
            rank = adapter.rank // phases
            d = torch.cat([d[: current * rank].detach(), d[current * rank : (current + 1) * rank]])
            b = torch.cat([b[:current].detach(), b[current : current + 1]])
        return super().factors(adapter, spec, {"qvera_d": d, "qvera_b": b}, pair)

    def scale(self, adapter: Settings, spec: LinearSpec) -> float:
        return vera_scale(adapter.rank // len(adapter.seed_chain), spec.in_features)


def _phases(adapter: Any) -> tuple[int, int]:
    """Return the number of phases, and the index of the last one in use."""
    phases, current = len(adapter.seed_chain), getattr(adapter, "current_phase", None)
    return phases, phases - 1 if current is None else current


_PHASES = VeraPhases()


class ResampledVera(Vera):
    """VeRA; with a chain of seeds it is `VeraPhases`."""

    def variant(self, adapter: Settings) -> Method:
        return _PHASES if getattr(adapter, "seed_chain", None) else super().variant(adapter)


class ResampleHook(TrainingHook):
    """Begins a phase every ``every`` steps: b = 0, d = d_initial, and optimizer state from `move_state` or none."""

    def __init__(self, model: PeftModel, optimizer: torch.optim.Optimizer, training: Any) -> None:
        self.config: QveraConfig = model.peft_config["default"]
        self.layers = [layer for layer in adapted_layers(model) if layer.carries("default")]
        self.optimizer, self.every = optimizer, training.resample_every
        self.moves = training.resample_momentum == "move"
        self._enter(0)

    def state_dict(self) -> dict[str, Any]:
        """The phase: a run that is resumed after its last step is scored with it."""
        return {"phase": self.config.current_phase}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._enter(state.get("phase", 0))

    def _enter(self, phase: int) -> None:
        self.config.current_phase = min(phase, len(self.config.seed_chain or ()) - 1)

    def before_step(self, step: int) -> None:
        self._enter((step - 1) // self.every)

    def after_step(self, step: int, loss_scale: float = 1.0) -> None:
        before = self.config.current_phase
        self._enter(step // self.every)
        for layer in self.layers if self.config.current_phase != before else ():
            if self.moves:
                move_state(layer, self.config, self.optimizer)
            else:
                for vector in layer.vectors("default").values():
                    self.optimizer.state.pop(vector, None)


@torch.no_grad()
def move_state(layer: QveraLinear, config: QveraConfig, optimizer: torch.optim.Optimizer) -> None:
    """Make AdamW's state for the new phase of a linear from that of the phase before.

    b keeps the part of its momentum that the new subspace has (`carried_share`). The momentum of d begins at 0: it has
    no gradient while the new b is 0. Second moments stay, since the new directions are as long as the old ones.
    """
    phase, rank, both = config.current_phase, config.rank // config.b_groups, layer.parts("default")
    assert phase
    assert both.d is not None
    slices = (slice((phase - 1) * rank, phase * rank), slice(phase * rank, (phase + 1) * rank))
    share = carried_share(*(Factors(both.A[at], both.B[:, at], both.d[at], scale=both.scale) for at in slices))
    for name, vector in layer.vectors("default").items():
        if not (state := optimizer.state.get(vector)):
            continue
        momentum, squares = (state[key].view(config.b_groups, -1) for key in ("exp_avg", "exp_avg_sq"))
        momentum[phase] = share.to(momentum.dtype) * momentum[phase - 1] if name == "qvera_b" else 0.0
        momentum[phase - 1] = 0.0
        squares[phase] = squares[phase - 1]


def carried_share(old: Factors, new: Factors) -> Tensor:
    """Return the factors [m] by which the momentum of VeRA's b is carried over from one phase of a linear to the next.

    Flora keeps G Pᵀ of a gradient G and moves it as (G P_oldᵀ P_old) P_newᵀ. ∂b_i = s (B_i ⊙ d) A ∂W_iᵀ is the gradient
    of row i of W in one direction, v_i = s (B_i ⊙ d) A [n]. P_old is replaced by v_i / ‖v_i‖². So the factor is
    v_i · v'_i / ‖v_i‖², about 1 / √n for random pairs.
    """
    assert old.d is not None
    assert new.d is not None
    left, right = old.scale * old.B.float() * old.d, new.scale * new.B.float() * new.d
    A, A_new = old.A.float(), new.A.float()
    own = ((left @ (A @ A.t())) * left).sum(1)
    return ((left @ (A @ A_new.t())) * right).sum(1) / own
