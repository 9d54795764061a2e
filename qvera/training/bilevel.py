"""Two groups of parameters, trained on two disjoint parts of the rows in turn (BiLoRA, arXiv 2403.13037)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from qvera.adapters.hooks import SCHEDULES, TrainingHook
from qvera.adapters.methods import method_of
from qvera.data import BilevelBatches
from qvera.training.engine import trained_vectors

if TYPE_CHECKING:
    from torch import nn

    from qvera.adapters.methods import Method


class BilevelHook(TrainingHook):
    """Lets the vectors of the step's level alone get gradients; an optimizer leaves those without one as they are.

    First order: a step of one level takes the other's vectors as constants, so it costs what any step costs, less the
    gradients that it does not need. Which level a step has is a function of the step (`BilevelBatches.is_upper`).
    """

    def __init__(self, batches: BilevelBatches, vectors: dict[str, nn.Parameter], method: Method) -> None:
        """``vectors`` are those that are trained, by their keys in the adapter file."""
        self.batches = batches
        self.upper = [v for name, v in vectors.items() if name.rpartition(".")[2] in method.upper_kinds]
        self.lower = [v for name, v in vectors.items() if name.rpartition(".")[2] not in method.upper_kinds]

    def before_step(self, step: int) -> None:
        """See `TrainingHook.before_step`."""
        upper = self.batches.is_upper(step - 1)
        _set_trained(self.upper, upper)
        _set_trained(self.lower, not upper)

    def after_step(self, step: int, loss_scale: float = 1.0) -> None:
        """See `TrainingHook.after_step`."""
        _set_trained([*self.upper, *self.lower], True)


def _set_trained(vectors: Iterable[nn.Parameter], trained: bool) -> None:
    for vector in vectors:
        vector.requires_grad_(trained)


def _hook(training: Any) -> BilevelHook | None:
    if not isinstance(training.batches, BilevelBatches):
        return None
    return BilevelHook(training.batches, trained_vectors(training.model), method_of(training.recipe.adapter))


SCHEDULES["bilevel"] = _hook
